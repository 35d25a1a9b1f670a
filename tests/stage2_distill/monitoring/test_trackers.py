"""TensorBoard and W&B have the metrics of metrics.jsonl, also after a run was interrupted."""

import builtins
import json
import shutil
import sys
import time
from pathlib import Path
from types import ModuleType
from unittest.mock import Mock, call

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stage2_distill.monitoring.trackers import ExperimentTrackers, open_wandb
from tests.stage2_distill.training_helpers import make_config, make_shards, run_here


def test_tensorboard_has_every_metric_once_after_a_stop(model: Path, tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "data", model)
    for iterations in (4, 6):  # the second resumes from 3, as if the first had been killed before its end
        run_here(make_config(shards, model, tmp_path / "run", iterations=iterations))
        if iterations == 4:
            (tmp_path / "run" / "step-000004" / "student.json").unlink()  # as if killed before it was complete
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    tags = {name.replace("_", "/", 1) for line in lines for name in line if name != "iteration"}
    checkpoint = {"seconds/checkpoint"}  # its tag remains from the purged iteration
    assert set(events.Tags()["scalars"]) - checkpoint == tags - checkpoint
    for name in ("critic_loss", "student_loss", "latent_saturation", "seconds_rollout"):
        expected = [(line["iteration"], line[name]) for line in lines if name in line]
        logged = [(event.step, event.value) for event in events.Scalars(name.replace("_", "/", 1))]
        assert [step for step, _ in logged] == [step for step, _ in expected]
        assert [value for _, value in logged] == pytest.approx([value for _, value in expected], rel=1e-6)


def test_wandb_offline_keeps_the_run_on_disk(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    shards = make_shards(tmp_path / "data", model)
    run_here(make_config(shards, model, tmp_path / "run", iterations=1, checkpoint_every=1, wandb="offline"))
    (stored,) = (tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb")
    for _ in range(200):  # W&B's own process may write a little after the run has ended
        content = stored.read_bytes()
        if b"loss" in content and b"critic_lr" in content:
            break
        time.sleep(0.1)
    assert b"loss" in content
    assert b"critic_lr" in content


def test_missing_wandb_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def import_without_wandb(name: str, *rest: object) -> object:
        if name == "wandb":
            raise ImportError(name)
        return real_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", import_without_wandb)
    with pytest.raises(ValueError, match="pip install"):
        open_wandb(tmp_path, "online", {})


def test_missing_tensorboard_is_one_line_and_training_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    trackers = ExperimentTrackers(tmp_path, start=0, wandb="off", options={})
    trackers.write({"iteration": 0, "critic_loss": 1.0})
    trackers.close()
    (message,) = caplog.messages
    assert message.startswith("tensorboard: not installed, curves go to metrics.jsonl only; ")
    assert message.endswith("; pip install 'ti2v-distill[tensorboard]'")
    assert list(tmp_path.iterdir()) == []


def fake_wandb(monkeypatch: pytest.MonkeyPatch, **attributes: object) -> ModuleType:
    wandb = ModuleType("wandb")
    wandb.Error = type("Error", (Exception,), {})
    vars(wandb).update(attributes)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return wandb


def test_wandb_without_a_login_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = fake_wandb(monkeypatch)
    wandb.init = Mock(side_effect=wandb.Error("api_key\nnot configured"))
    with pytest.raises(ValueError, match=r"^wandb=online: api_key not configured; log in, or leave --wandb off$"):
        open_wandb(tmp_path, "online", {})


@pytest.mark.parametrize("offline_works", [True, False])
def test_wandb_without_network_stops_nothing(
    offline_works: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is kept offline, or if that fails too, left out."""
    run, wandb = Mock(), fake_wandb(monkeypatch)
    failure = wandb.Error("Run initialization has timed out\nafter 90 s")
    wandb.init = Mock(side_effect=[failure, run if offline_works else OSError("no space")])
    trackers = ExperimentTrackers(tmp_path, start=0, wandb="online", options={})
    trackers.write({"iteration": 0, "critic_loss": 1.0})
    trackers.close()
    assert [call.kwargs["mode"] for call in wandb.init.call_args_list] == ["online", "offline"]
    assert caplog.messages[0].startswith("wandb: cannot start online (Run initialization has timed out after 90 s)")
    assert len(caplog.messages) == (1 if offline_works else 2)
    assert run.log.call_args_list == ([call({"critic/loss": 1.0}, step=0)] if offline_works else [])


@pytest.mark.parametrize("failing", ["log", "finish"])
def test_a_tracker_that_fails_later_is_dropped_with_one_line(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, wandb = Mock(), fake_wandb(monkeypatch)
    wandb.init = Mock(return_value=run)
    getattr(run, failing).side_effect = wandb.Error("the connection\nis closed")
    trackers = ExperimentTrackers(tmp_path, start=0, wandb="online", options={})
    for iteration in range(3):
        trackers.write({"iteration": iteration, "critic_loss": 1.0})
    trackers.close()
    assert run.log.call_count == (1 if failing == "log" else 3)
    (message,) = caplog.messages
    assert message.startswith("wandb: failed (the connection is closed); metrics.jsonl goes on")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("critic/loss")] == [0, 1, 2], "the other one goes on"


def test_a_run_goes_on_without_its_tensorboard_folder(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards = make_shards(tmp_path / "data", model)
    run_here(make_config(shards, model, tmp_path / "run", iterations=1))
    shutil.rmtree(tmp_path / "run" / "tensorboard")
    (tmp_path / "run" / "tensorboard").write_text("a file")
    assert run_here(make_config(shards, model, tmp_path / "run", iterations=2)).name == "step-000002"
    (message,) = [message for message in caplog.messages if message.startswith("tensorboard: failed (")]
    assert "metrics.jsonl goes on" in message
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
