"""Damaged checkpoints: each file that is not what was written is named, and nothing is read from it."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from stage2_distill.checkpointing.format import (
    INDEX_FILE,
    STUDENT_FILE,
    FileFacts,
    checkpoint_damage,
    delete_unfinished,
    load_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    read_facts,
    refuse_damaged,
    stored_dtypes,
)
from stage2_distill.config import DistillConfig
from stage2_distill.sampling.config import SampleConfig
from stage2_distill.sampling.student_sampler import open_student
from tests.stage2_distill.training_helpers import flip, make_config, make_shards, run_here


@pytest.fixture(scope="module")
def config(model: Path, tmp_path_factory: pytest.TempPathFactory) -> DistillConfig:
    """A run of two checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    shards = make_shards(folder / "data", model)
    config = make_config(shards, model, folder / "run", iterations=2, checkpoint_every=1)
    run_here(config)
    return config


@pytest.fixture
def step(config: DistillConfig, tmp_path: Path) -> Path:
    """A copy of the newest checkpoint, in a copy of its run."""
    return shutil.copytree(config.out, tmp_path / "run") / "step-000002"


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def take_from_another(path: Path) -> None:
    shutil.copy(path.parents[1] / "step-000001" / path.name, path)


def cut(size: int) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[:size])


def write_bytes(data: bytes) -> Callable[[Path], int]:
    return lambda path: path.write_bytes(data)


DAMAGES = [
    Path.unlink, flip, replace_by_folder, replace_by_pipe, take_from_another, cut(0), cut(7), cut(100),
    write_bytes(b"null"), write_bytes(b"[]"), write_bytes(b"{}"), write_bytes(b"[" * 100_000), write_bytes(bytes(999)),
]  # fmt: skip


@pytest.mark.parametrize("pattern", ["*.safetensors", STUDENT_FILE])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_and_another_checkpoint_too(pattern: str, damage: Callable, step: Path) -> None:
    refuse_damaged(step, "ema")
    (path,) = step.glob(pattern)
    if damage is replace_by_pipe and pattern == STUDENT_FILE:
        return
    damage(path)
    with pytest.raises(ValueError, match=rf"^checkpoint={step}: is damaged: {path.name} .*such as \S+step-000001$"):
        refuse_damaged(step, "ema")


@pytest.mark.parametrize("damage", [damage for damage in DAMAGES if damage is not take_from_another])
def test_an_unreadable_file_of_tensors_is_one_line(damage: Callable, step: Path, caplog) -> None:
    (path,) = step.glob("*.safetensors")
    damage(path)
    for read in (stored_dtypes, lambda step: load_checkpoint(step, {})):
        if damage not in (flip, Path.unlink):  # a flipped bit of a tensor is only seen by its hash
            with pytest.raises(ValueError, match=rf"^{path}: cannot be read"):
                read(step)
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(
    "name", ["../step-000001/student.json", "/etc/passwd", "a\0.json", "", ".", "x" * 5000, "student.json/", "a\n.json"]
)
def test_an_index_lists_files_of_its_checkpoint_only(name: str, step: Path) -> None:
    index = json.loads((step / INDEX_FILE).read_text())
    (step / INDEX_FILE).write_text(json.dumps(index | {name: {"size": 1, "sha256": ""}}))
    assert checkpoint_damage(step).startswith(f"{step / INDEX_FILE}: lists ")
    del index[STUDENT_FILE]
    (step / INDEX_FILE).write_text(json.dumps(index))
    assert checkpoint_damage(step) == f"{step / INDEX_FILE}: does not list student.json"


def test_a_renamed_checkpoint_is_not_resumed_as_another(config: DistillConfig, step: Path, caplog) -> None:
    renamed = step.replace(step.with_name("step-000009"))
    assert checkpoint_damage(renamed) == "student.json is that of iteration 2"
    assert run_here(replace(config, out=str(step.parent), iterations=3)).name == "step-000003"
    assert "step-000009 is damaged" in caplog.text and "resuming from step-000001 instead" in caplog.text


def test_weights_without_an_index_are_read_with_a_warning(step: Path, caplog: pytest.LogCaptureFixture) -> None:
    (step / INDEX_FILE).unlink()
    refuse_damaged(step, "ema")
    assert f"{step / INDEX_FILE}: is missing; the files are read unchecked" in caplog.text


@pytest.mark.parametrize("missing", [STUDENT_FILE, INDEX_FILE, "*.safetensors"])
def test_a_missing_file_of_the_newest_checkpoint_is_said_on_resume(
    missing: str, config: DistillConfig, step: Path, caplog: pytest.LogCaptureFixture
) -> None:
    next(step.glob(missing)).unlink()
    assert run_here(replace(config, out=str(step.parent), iterations=3)).name == "step-000003"
    assert "step-000002 is damaged: " in caplog.text and missing.strip("*") in caplog.text
    assert "resuming from step-000001 instead" in caplog.text


def test_sampling_names_damage(step: Path, model: Path) -> None:
    config = SampleConfig(str(step.parent), str(model), "o", data="x", dtype="float32", device="cpu")
    flip(next(step.glob("*.safetensors")))
    with pytest.raises(ValueError, match="step-000002: is damaged: .*other bytes than were written; name another one"):
        open_student(config)
    (step / STUDENT_FILE).unlink()
    with pytest.raises(ValueError, match="student.json: cannot be read"):
        open_student(config)
    assert newest_checkpoint(step) == step


FORGED = [
    {"shift": 0}, {"shift": -3}, {"ladder": []}, {"ladder": [1, 2]}, {"ladder": [1000, 0]}, {"ladder": None},
    {"iteration": -1}, {"iteration": "2"}, {"spec": {"height": 0}}, {"spec": []}, {"base_model": None},
    {"position": 2**70},
]  # fmt: skip
FORGED_OPTIONS = [
    {"lora_rank": "four"}, {"lora_rank": -4}, {"lora_rank": 1.5}, {"lora_alpha": "x"}, {"guidance_scale": None},
    {"iterations": "x"}, {"shards": 7},
]  # fmt: skip


@pytest.mark.parametrize("change", [*FORGED, *({"config": options} for options in FORGED_OPTIONS)])
def test_facts_of_a_wrong_kind_are_one_line_with_their_file(change: dict, step: Path) -> None:
    facts = json.loads((step / STUDENT_FILE).read_text())
    options = change.get("config")
    (step / STUDENT_FILE).write_text(json.dumps(facts | ({"config": facts["config"] | options} if options else change)))
    index = json.loads((step / INDEX_FILE).read_text())
    index[STUDENT_FILE] = vars(FileFacts.read(step / STUDENT_FILE))
    (step / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"^{step / STUDENT_FILE}: [^\n]+$"):
        read_facts(step)


def test_a_damaged_best_deletes_nothing(step: Path, caplog: pytest.LogCaptureFixture) -> None:
    (step.parent / "best").write_text('{"checkpoint": "step-0')
    prune_checkpoints(step.parent, 1)
    assert step.with_name("step-000001").is_dir()
    assert f"{step.parent / 'best'}: is damaged" in caplog.text


def test_unfinished_checkpoints_are_deleted(step: Path) -> None:
    shutil.copytree(step, step.with_name("step-000004.partial"))
    delete_unfinished(step.parent)
    assert sorted(path.name for path in step.parent.glob("step-*")) == ["step-000001", "step-000002"]
