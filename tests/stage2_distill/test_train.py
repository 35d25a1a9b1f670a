"""Whole runs: the same twice, stopped and resumed, and under the import hook of lock 3."""

import errno
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from common.options import write_config
from shards import latent_store
from stage2_distill.checkpointing.format import list_checkpoints, newest_checkpoint, read_facts
from tests.stage2_distill.training_helpers import ROOT, assert_same, make_config, make_shards, run_here, tensors


@pytest.fixture(scope="module")
def shards(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards") / "data", model)


@pytest.fixture(scope="module")
def unbroken(model: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_here(make_config(shards, model, tmp_path_factory.mktemp("unbroken") / "run"))


def test_one_seed_one_result(model: Path, shards: Path, unbroken: Path, tmp_path: Path) -> None:
    assert_same(unbroken, run_here(make_config(shards, model, tmp_path / "run")))
    other = tensors(run_here(make_config(shards, model, tmp_path / "other", seed=1)))
    assert not torch.equal(other["student.proj_out.weight"], tensors(unbroken)["student.proj_out.weight"])


def test_every_role_moved_and_the_average_lags(unbroken: Path, model: Path) -> None:
    found = tensors(unbroken)
    student, critic, ema = (found[f"{role}.proj_out.weight"] for role in ("student", "critic", "ema"))
    assert not torch.equal(student, critic)
    assert not torch.equal(student, ema)
    assert found["student_optimizer.proj_out.weight.step"] == 3
    assert found["critic_optimizer.proj_out.weight.step"] == 6


def test_stopped_at_3_and_resumed_to_6_equals_6(model: Path, shards: Path, unbroken: Path, tmp_path: Path) -> None:
    half = make_config(shards, model, tmp_path / "run", iterations=3)
    assert run_here(half).name == "step-000003"
    whole = make_config(shards, model, tmp_path / "run")
    assert_same(unbroken, run_here(whole))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(6))
    assert ["student_loss" in line for line in lines] == [True, False] * 3


def test_a_finished_run_runs_no_more(model: Path, shards: Path, unbroken: Path) -> None:
    before = unbroken.stat().st_mtime_ns
    assert run_here(make_config(shards, model, unbroken.parent)) == unbroken
    assert unbroken.stat().st_mtime_ns == before


def test_checkpoint_says_what_the_student_is(unbroken: Path, model: Path) -> None:
    facts = read_facts(unbroken)
    assert facts.iteration == 6
    assert facts.sigmas == pytest.approx((1, 0.9375, 0.8333333, 0.625))
    assert newest_checkpoint(unbroken.parent) == unbroken
    assert [path.name for path in list_checkpoints(unbroken.parent)] == ["step-000003", "step-000006"]


def test_other_options_are_refused_by_name(model: Path, shards: Path, unbroken: Path) -> None:
    with pytest.raises(ValueError, match=r"seed: 5, was 0"):
        run_here(make_config(shards, model, unbroken.parent, seed=5))


def test_the_second_run_in_a_folder_is_refused(model: Path, shards: Path, unbroken: Path, tmp_path: Path) -> None:
    shutil.copytree(unbroken.parent, tmp_path / "run")
    code = f"import sys, pathlib; from common.files import FolderLock; FolderLock(pathlib.Path({str(tmp_path / 'run')!r})).hold(); print(); sys.stdin.read()"  # noqa: E501
    first = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    first.stdout.readline()
    with pytest.raises(
        ValueError, match=rf"^out={tmp_path / 'run'}: process {first.pid} on \S+ is working on it; wait"
    ):
        run_here(make_config(shards, model, tmp_path / "run", iterations=7))
    first.kill()
    first.wait()
    assert run_here(make_config(shards, model, tmp_path / "run", iterations=7)).name == "step-000007"


def test_a_full_disk_while_a_preview_is_written_recovers_by_the_same_command(
    model: Path, shards: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(shards, model, tmp_path / "run", preview_every=4, preview_count=1)
    monkeypatch.setattr(
        latent_store, "finish_group", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    )
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            run_here(config)
    (tmp_path / "run" / "step-000005.partial").mkdir()  # what a kill in a save leaves, perhaps all the space there was
    monkeypatch.undo()
    assert_same(unbroken, run_here(config))
    assert latent_store.complete_groups(tmp_path / "run" / "previews.zarr") == ["step-000000", "step-000004"]
    assert not list((tmp_path / "run").glob("*.partial"))


def test_foreign_folder_is_refused(model: Path, shards: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match=r"holds other files \(letter.txt\)"):
        run_here(make_config(shards, model, tmp_path))


@pytest.mark.parametrize(("change", "words"), [({"height": 96}, "height: 64, expected 96"), ({"fps": 24}, "fps: 8")])
def test_shards_of_another_size_are_refused(
    model: Path, shards: Path, tmp_path: Path, change: dict[str, int], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        run_here(make_config(shards, model, tmp_path / "run", **change))


def test_shards_of_another_encoder_are_refused(shards: Path, tmp_path: Path) -> None:
    from tests.tiny_models import make_model

    other = make_model(tmp_path / "model", seed=1)
    with pytest.raises(ValueError, match=r"vae: .* expected .*; text_encoder: "):
        run_here(make_config(shards, other, tmp_path / "run"))


HOOK = """
import sys
class Wall:
    def find_spec(self, name, path=None, target=None):
        bad = ("stage1_encode", "decord", "diffusers.models.autoencoders.autoencoder_kl", "transformers.models.umt5")
        if name.startswith(bad):
            raise ImportError("behind the wall: " + name)
sys.meta_path.insert(0, Wall())
from common.options import resolve_config
from stage2_distill.config import DistillConfig
from stage2_distill.train import distill
{extra}
distill(resolve_config(DistillConfig, {{"config": sys.argv[1]}}))
"""


@pytest.mark.parametrize(("extra", "code"), [("", 0), ("from diffusers import AutoencoderKLWan", 1)])
def test_lock_3_a_whole_run_behind_an_import_wall(
    model: Path, shards: Path, tmp_path: Path, extra: str, code: int
) -> None:
    write_config(tmp_path / "c.yaml", make_config(shards, model, tmp_path / "run", iterations=1))
    command = [sys.executable, "-c", HOOK.format(extra=extra), str(tmp_path / "c.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert ("behind the wall" in done.stderr) is bool(code)


def test_options_may_change_until_an_iteration_is_done(model: Path, shards: Path, tmp_path: Path) -> None:
    config = make_config(shards, model, tmp_path / "run", iterations=1, init_from="nowhere")
    for advised in (replace(config, max_text_tokens=2), replace(config, max_text_tokens=8)):
        with pytest.raises(ValueError, match="nowhere" if advised.max_text_tokens == 8 else "max_text_tokens=2"):
            run_here(advised)
    checkpoint = run_here(replace(config, init_from=None))
    for _ in ("with its checkpoint", "killed before it"):
        with pytest.raises(ValueError, match="seed: 1, was 0"):
            run_here(replace(config, init_from=None, seed=1))
        shutil.rmtree(checkpoint, ignore_errors=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_text_tokens": 600}, "max_text_tokens=600: must be between 1 and 512"),
        ({"grad_clip": 0.0}, "grad_clip=0.0: must be more than 0"),
        ({"score_low": 0.98}, "score_low=0.98: must be less than score_high=0.98"),
        ({"lora_alpha": 8.0}, "lora_alpha=8.0: needs --lora-rank"),
        ({"preview_every": 5, "preview_count": 0}, "preview_count=0: must be at least 1"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(tmp_path: Path, change: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_config(tmp_path, tmp_path, tmp_path, **change)
