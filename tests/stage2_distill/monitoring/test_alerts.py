"""The metrics of a run, its warnings, and how it stops if a number is not finite."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch

from common.condition import Condition
from common.options import write_config
from common.timer import PhaseTimer
from shards.mixture import RecordStream, open_data_sets
from shards.record import Record
from stage2_distill import build, train, trainer
from stage2_distill.checkpointing.format import newest_checkpoint
from stage2_distill.config import DistillConfig
from stage2_distill.dmd.latent_stats import latent_stats
from stage2_distill.dmd.schedule import Schedule
from stage2_distill.monitoring import alerts
from stage2_distill.monitoring.alerts import WINDOW_ITERATIONS, MetricAlerts
from tests.forked import run_python
from tests.stage2_distill.dmd.sample_shapes import one_size
from tests.stage2_distill.training_helpers import make_config, make_shards, run_here, tensors


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_latent_stats_in_closed_form() -> None:
    x = torch.zeros(2, 48, 3, 4, 4)
    x[:, :, 1], x[:, :, 2] = 3.0, -3.0
    x[1, :, 0] = 1.0
    condition = Condition(torch.zeros(2, 48, 1, 4, 4), torch.zeros(2, 1, 1))
    assert latent_stats(x, condition).tolist() == pytest.approx([3.0, (6 + 56 / 9) / 2, (3 + 2) / 2], rel=1e-5)
    text_only = Condition(None, torch.zeros(2, 1, 1))
    assert latent_stats(x, text_only)[0].item() == pytest.approx((6**0.5 + (19 / 3) ** 0.5) / 2, rel=1e-5)


def test_timer_counts_phases_and_resets() -> None:
    timer = PhaseTimer(torch.device("cpu"))
    for _ in range(2):
        with timer("work"):
            pass
    assert list(timer.time_items(iter([1, 2]), "data")) == [1, 2]
    first = timer.read_seconds()
    assert set(first) == {"work", "data"}
    assert timer.read_seconds() == {}


def test_lines_have_every_metric(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = make_shards(tmp_path / "data", model)
    run_here(make_config(shards, model, tmp_path / "run", iterations=2, checkpoint_every=2))
    first, second = lines(tmp_path / "run")
    shown = f"critic {second['critic_loss']:.4f}, {second['seconds']:.2f} s, data {second['seconds_data']:.2f} s, "
    assert re.search(rf"distill: 2/2, +\S+, 00:00 left, {re.escape(shown)}\d+\.\d GiB\n", capsys.readouterr().err)
    metrics = {"iteration", "seconds", "memory_gib", "critic_loss", "critic_grad_norm", "critic_exit"}
    metrics |= {f"seconds_{phase}" for phase in ("data", "rollout", "scores", "backward", "update")}
    metrics |= {"latent_saturation", "latent_temporal_variance", "latent_first_frame_distance"}
    student = {"student_loss", "student_grad_norm", "student_exit", "critic_teacher_gap"}
    exits = [{f"{role}_loss_exit{line[f'{role}_exit']}" for role in roles} for line, roles in
             ((first, ("critic", "student")), (second, ("critic",)))]  # fmt: skip
    assert set(first) == metrics | student | exits[0]
    assert set(second) == metrics | exits[1]
    assert first[f"critic_loss_exit{first['critic_exit']}"] == first["critic_loss"]
    assert first["critic_teacher_gap"] == pytest.approx(math.sqrt(2 * first["student_loss"]))
    assert 0.01 < first["memory_gib"] < 100
    phases = sum(value for name, value in first.items() if name.startswith("seconds_"))
    assert 0 < phases <= first["seconds"] + 0.01


def healthy(iteration: int) -> dict[str, float]:
    latents = {"latent_saturation": 1.0, "latent_temporal_variance": 0.5, "latent_first_frame_distance": 0.3}
    return {"iteration": iteration, "critic_loss": 0.1, "critic_teacher_gap": 1.0} | latents


@pytest.mark.parametrize(
    ("drift", "message"),
    [
        ({"latent_saturation": 2.5}, "over-saturate"),
        ({"latent_saturation": 0.1}, "lose their contrast"),
        ({"latent_temporal_variance": 0.0}, "stand still"),
        ({"latent_first_frame_distance": 2.0}, "leave their first frame"),
        ({"critic_teacher_gap": 9.0}, "far from the teacher"),
        ({"critic_loss": 1.5}, "no longer tracks the student"),
    ],
)
def test_drift_warns_once(drift: dict[str, float], message: str) -> None:
    alerts_of_run, warnings = MetricAlerts(), []
    for iteration in range(100):
        line = healthy(iteration) | (drift if iteration >= 40 else {})
        new = alerts_of_run.check_line(line)
        assert not new or 40 <= iteration < 40 + WINDOW_ITERATIONS
        warnings += new
    assert len(warnings) == 1
    assert message in warnings[0]
    assert "outside" in warnings[0]


def test_single_outlier_is_no_drift() -> None:
    alerts_of_run = MetricAlerts()
    assert [
        alerts_of_run.check_line(healthy(i) | ({"latent_saturation": 9.0} if i == 50 else {})) for i in range(100)
    ] == [[]] * 100


def test_a_resumed_run_does_not_warn_again(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bounds that every run leaves after two iterations; the run stops at 3 and resumes to 6."""
    never = dataclasses.replace(alerts.METRIC_BOUNDS[0], low=90.0, high=91.0)
    monkeypatch.setattr(alerts, "METRIC_BOUNDS", (never,))
    monkeypatch.setattr(alerts, "WINDOW_ITERATIONS", 2)
    shards = make_shards(tmp_path / "data", model)
    for iterations in (3, 6):
        run_here(make_config(shards, model, tmp_path / "run", iterations=iterations))
    warnings = [record.message for record in caplog.records if "latent_saturation is" in record.message]
    assert len(warnings) == 1
    assert warnings[0].startswith("warning: iteration 1: ")


def with_infinite_text(record: Record) -> Record:
    return dataclasses.replace(record, text=torch.full_like(record.text, math.inf))


def first_use(config: DistillConfig, bad: int, world: int) -> tuple[int, int]:
    """(iteration, rank) in which record number `bad` is first used."""
    stream = RecordStream(open_data_sets(config.shards), seed=config.seed)
    uses = [
        (part.iteration, part.role != "student", rank)
        for rank in range(world)
        for part in Schedule.of(config, world).micro_batches(start=0, rank=rank, shapes=one_size(config))
        if any(stream.record_index(position) == bad for position in part.positions)
    ]
    iteration, _, rank = min(uses)
    return iteration, rank


def test_one_bad_rank_stops_all_and_is_named(model: Path, tmp_path: Path) -> None:
    """Two ranks, a record of infinite embeddings on one of them."""
    bad = 13
    shards = make_shards(
        tmp_path / "data", model, change=lambda n, record: with_infinite_text(record) if n == bad else record
    )
    config = make_config(shards, model, tmp_path / "run", checkpoint_every=1, keep_last=99)
    seeds = (dataclasses.replace(config, seed=seed) for seed in range(50))
    config = next(c for c in seeds if first_use(c, bad, 2)[0] == 1 and first_use(c, bad, 2)[1] == 1)
    write_config(tmp_path / "config.yaml", config)
    process = run_python("cli.py", "distill", "--config", tmp_path / "config.yaml", ranks=2)
    assert process.returncode != 0
    assert "iteration 1: " in process.stderr, process.stderr[-4000:]
    assert "not finite on rank 1." in process.stderr
    assert "Last good checkpoint: step-000001" in process.stderr
    assert newest_checkpoint(tmp_path / "run").name == "step-000001"
    assert [line["iteration"] for line in lines(tmp_path / "run")] == [0]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_update_that_is_not_finite_is_not_taken(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The loss, or only its gradient, is infinite: neither weights nor optimizer move."""
    shards = make_shards(tmp_path / "data", model)
    built: list[trainer.Roles] = []
    real, good = build.build_roles, trainer.critic_loss

    def remember(*arguments: object) -> trainer.Roles:
        built.append(real(*arguments))
        return built[-1]

    monkeypatch.setattr(train, "build_roles", remember)

    def bad(x0: torch.Tensor, condition: Condition, **options: object) -> torch.Tensor:
        loss = good(x0, condition, **options)
        return loss * math.inf if what == "loss" else loss + 1e38 * ((loss - loss.detach()) * 1e38)

    run_here(make_config(shards, model, tmp_path / "run", iterations=1, checkpoint_every=1))
    before = tensors(tmp_path / "run" / "step-000001")
    monkeypatch.setattr(trainer, "critic_loss", bad)
    with pytest.raises(trainer.DivergedError, match=r"iteration 1: .*Last good checkpoint: step-000001"):
        run_here(make_config(shards, model, tmp_path / "run", iterations=3, checkpoint_every=1))
    for name, value in train.training_state(built[-1]).items():
        if name.startswith("critic"):
            assert torch.equal(value, before[name]), name
