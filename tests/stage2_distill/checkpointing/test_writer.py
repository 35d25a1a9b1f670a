"""The checkpoint writer by itself, and from where a run may start."""

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from common.timer import PhaseTimer
from stage2_distill.checkpointing import staging
from stage2_distill.checkpointing import writer as module
from stage2_distill.checkpointing.format import (
    StudentFacts,
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    read_facts,
    write_best,
)
from stage2_distill.checkpointing.writer import CheckpointOptions, CheckpointWriter, SaveError
from stage2_distill.config import DistillConfig
from stage2_distill.distributed.process_group import start_process_group
from stage2_distill.dmd.schedule import CRITIC, STUDENT
from stage2_distill.model.wan import load_transformer as load_network
from stage2_distill.optim.ema import EmaWeights
from tests.stage2_distill.training_helpers import flip, make_config, make_shards, run_here, tensors


@pytest.fixture(scope="module")
def shards(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards") / "data", model)


@pytest.fixture(scope="module")
def other(model: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run to start from."""
    return run_here(make_config(shards, model, tmp_path_factory.mktemp("other") / "run", iterations=2, seed=7))


@pytest.fixture
def config(tmp_path: Path) -> DistillConfig:
    return make_config(tmp_path, tmp_path, tmp_path, keep_last=1)


@pytest.fixture
def facts(other: Path) -> StudentFacts:
    return replace(read_facts(other), iteration=1)


def test_training_continues_and_does_not_change_the_checkpoint(
    config: DistillConfig, facts: StudentFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed, write = threading.Event(), module.CheckpointJob.write

    def write_late(*arguments) -> module.FileIndex:
        assert changed.wait(30)
        return write(*arguments)

    def copy_slowly(*arguments) -> None:
        time.sleep(0.2)
        copy(*arguments)

    copy = staging.StagedState.copy_from_host
    monkeypatch.setattr(module.CheckpointJob, "write", write_late)
    monkeypatch.setattr(staging.StagedState, "copy_from_host", copy_slowly)
    live = {"student.weight": torch.arange(6.0).view(2, 3), "student.step": torch.tensor(5.0)}
    with CheckpointWriter(tmp_path, config.select(CheckpointOptions), start_process_group("cpu")) as writer:
        writer.save(live, facts)
        assert not list_checkpoints(tmp_path)  # save has returned and nothing is written yet
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
        clock = PhaseTimer(torch.device("cpu"))
        writer.register_step_hooks({STUDENT: optimizer}, clock)
        optimizer.step()  # waits for the copies
        assert clock.read_seconds()["checkpoint"] > 0
        for value in live.values():
            value.zero_()
        changed.set()
        writer.finish()
    stored = tensors(list_checkpoints(tmp_path)[0])
    assert torch.equal(stored["student.weight"], torch.arange(6.0).view(2, 3))
    assert stored["student.step"] == 5


def test_a_step_waits_for_the_copies_of_its_role_alone(
    config: DistillConfig, facts: StudentFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The role that is updated next is copied first, and its step waits for no other."""
    may_copy, started, copy = threading.Event(), [], staging.StagedState.copy_from_host

    def watched_copy(self: staging.StagedState, name: str) -> None:
        started.append(name)
        assert name.startswith("critic") or may_copy.wait(5)
        copy(self, name)

    monkeypatch.setattr(staging, "COPY_THREADS", 1)
    monkeypatch.setattr(staging.StagedState, "copy_from_host", watched_copy)
    names = "student.w", "ema.w", "critic.w", "student_optimizer.w", "critic_optimizer.w"
    clock, optimizers = PhaseTimer(torch.device("cpu")), {}
    for role in (STUDENT, CRITIC):
        optimizers[role] = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    with CheckpointWriter(tmp_path, config.select(CheckpointOptions), start_process_group("cpu")) as writer:
        writer.register_step_hooks(optimizers, clock)
        writer.save({name: torch.ones(3) for name in names}, facts, first=CRITIC)
        optimizers[CRITIC].step()
        assert started[:2] == ["critic.w", "critic_optimizer.w"]
        staged = writer.staged
        assert sum(not task.done() for task in staged.host_tasks[STUDENT]) == 3
        threading.Timer(0.2, may_copy.set).start()
        optimizers[STUDENT].step()
        assert not staged.is_pending(STUDENT)
        writer.finish()


def test_previews_wait_for_copies_of_the_student(
    model: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A preview puts the average in the student's place: not while the student is being copied for a checkpoint."""
    options = {"iterations": 4, "ema_start": 0, "checkpoint_every": 3, "keep_last": 2}
    options |= {"preview_every": 4, "preview_count": 1}
    swapped, ends, copy, in_place_of = (
        threading.Event(),
        [],
        staging.StagedState.copy_from_host,
        EmaWeights.swapped_into,
    )

    def copy_late(self: staging.StagedState, name: str) -> None:
        ends.append(time.monotonic() + 2)
        if name.startswith("student."):
            swapped.wait(max(0, ends[0] - time.monotonic()))
        copy(self, name)

    @contextmanager
    def watched_swap(self: EmaWeights, net: torch.nn.Module) -> Iterator[None]:
        with in_place_of(self, net):
            if ends:  # there is a preview before the first iteration too
                swapped.set()
            yield

    quick = run_here(make_config(shards, model, tmp_path / "quick", **options))
    monkeypatch.setattr(staging.StagedState, "copy_from_host", copy_late)
    monkeypatch.setattr(EmaWeights, "swapped_into", watched_swap)
    run_here(make_config(shards, model, tmp_path / "late", **options))
    first = quick.with_name("step-000003")
    expected, stored = tensors(first), tensors(tmp_path / "late" / first.name)
    assert all(torch.equal(value, stored[name]) for name, value in expected.items())


def test_files_that_read_back_differently_are_discarded_and_prune_nothing(
    config: DistillConfig, facts: StudentFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = {"student.weight": torch.arange(600.0)}
    save = module.dcp.save

    def save_lossy(*arguments, **options) -> None:
        save(*arguments, **options)
        for path in tmp_path.glob("*.partial/*.safetensors"):
            flip(path)

    with CheckpointWriter(tmp_path, config.select(CheckpointOptions), start_process_group("cpu")) as writer:
        writer.save(live, facts)
        writer.finish()
        monkeypatch.setattr(module.dcp, "save", save_lossy)
        writer.save(live, replace(facts, iteration=2))
        with pytest.raises(SaveError, match="student.weight is not what was written"):
            writer.finish()
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-000001"]


def test_a_rank_splits_its_part_into_files_of_bounded_size(
    config: DistillConfig, facts: StudentFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FILE_BYTES", 1000)
    live = {f"student.{n}": torch.full((100,), float(n)) for n in range(10)}
    with CheckpointWriter(tmp_path, config.select(CheckpointOptions), start_process_group("cpu")) as writer:
        writer.save(live, facts)
        writer.finish()
    files = sorted(list_checkpoints(tmp_path)[0].glob("*.safetensors"))
    assert len(files) == 4  # of 400 bytes a tensor, at most three begin within 1000
    assert tensors(list_checkpoints(tmp_path)[0])["student.9"][0] == 9


def test_pruning_keeps_the_newest_the_best_and_every_nth(tmp_path: Path) -> None:
    for iteration in range(1, 10):
        folder = tmp_path / f"step-{iteration:06d}"
        folder.mkdir()
        (folder / "student.json").write_text("{}")
    write_best(tmp_path, "step-000005", distance=1.0, iteration=5)
    prune_checkpoints(tmp_path, 2, keep_every=3)
    assert [int(path.name[5:]) for path in sorted(tmp_path.glob("step-*"))] == [3, 5, 6, 8, 9]
    prune_checkpoints(tmp_path, 1)
    assert [int(path.name[5:]) for path in sorted(tmp_path.glob("step-*"))] == [5, 9]


def test_finish_prunes_what_a_killed_run_left(
    config: DistillConfig, facts: StudentFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        monkeypatch.context() as killed,
        CheckpointWriter(tmp_path, config.select(CheckpointOptions), start_process_group("cpu")) as writer,
    ):
        killed.setattr(module.layout, "prune_checkpoints", lambda *_: None)
        for iteration in (1, 2):
            writer.save({"student.weight": torch.arange(6.0)}, replace(facts, iteration=iteration))
        writer.wait()
    assert len(list_checkpoints(tmp_path)) == 2
    with CheckpointWriter(tmp_path, config.select(CheckpointOptions), start_process_group("cpu")) as writer:
        writer.finish()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000002"]


def test_synchronous_checkpoints_are_the_same(model: Path, shards: Path, other: Path, tmp_path: Path):
    config = make_config(shards, model, tmp_path / "run", iterations=2, seed=7, async_checkpoint=False)
    synchronous, asynchronous = tensors(run_here(config)), tensors(other)
    assert all(torch.equal(value, synchronous[name]) for name, value in asynchronous.items())


def initial_state(model: Path, shards: Path, out: Path, source: Path) -> dict[str, torch.Tensor]:
    """The state after one iteration at learning rates of 0: that with which the run started."""
    config = make_config(
        shards, model, out, iterations=1, init_from=str(source), student_lr=0.0, critic_lr=0.0, ema_start=0
    )
    return tensors(run_here(config))


def test_init_from_a_run(model: Path, shards: Path, other: Path, tmp_path: Path) -> None:
    state, source = initial_state(model, shards, tmp_path / "run", other.parent), tensors(other)
    for name in ("student", "critic"):
        weights = [key for key in source if key.startswith(f"{name}.")]
        assert all(torch.equal(state[key], source[key]) for key in weights)
        assert not torch.equal(state[f"{name}.proj_out.weight"], load_network(model, torch.float32).proj_out.weight)
    assert torch.equal(state["ema.proj_out.weight"], source["student.proj_out.weight"])
    assert state["student_optimizer.proj_out.weight.step"] == 1  # the optimizers start from zero


@pytest.mark.parametrize("inner", ["", "transformer"])
def test_init_from_a_diffusers_folder(model: Path, shards: Path, tmp_path: Path, inner: str) -> None:
    from tests.tiny_models import make_transformer

    torch.manual_seed(5)
    make_transformer(tmp_path / "copy" / "transformer")
    state = initial_state(model, shards, tmp_path / "run", tmp_path / "copy" / inner)
    network = load_network(tmp_path / "copy", torch.float32)
    for role in ("student", "critic", "ema"):
        for name, value in network.named_parameters():
            assert torch.equal(state[f"{role}.{name}"], value), (role, name)


def test_init_from_anything_else_is_rejected(model: Path, shards: Path, other: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        initial_state(model, shards, tmp_path / "a", tmp_path / "nowhere")
    copy = shutil.copytree(other.parent, tmp_path / "copy")
    flip(next((copy / other.name).glob("*.safetensors")))
    with pytest.raises(ValueError, match="init_from=.*is damaged: shard-"):
        initial_state(model, shards, tmp_path / "b", copy)


def test_another_model_is_rejected_on_resume(model: Path, shards: Path, other: Path, tmp_path: Path) -> None:
    """Its encoders are the same, so the data set matches, but the teacher would change during the run."""
    from tests.tiny_models import make_transformer

    shutil.copytree(model, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "transformer")
    make_transformer(tmp_path / "copy" / "transformer")
    shutil.copytree(other.parent, tmp_path / "run")
    config = make_config(shards, tmp_path / "copy", tmp_path / "run", iterations=3, seed=7)
    with pytest.raises(ValueError, match=f"model={tmp_path / 'copy'}: its transformer is not that of .*{other.name} "):
        run_here(config)


def test_reading_a_truncated_checkpoint_names_it(other: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(other, tmp_path / other.name)
    path = next(copy.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"{path}: cannot be read"):
        load_checkpoint(copy, {"student.proj_out.weight": tensors(other)["student.proj_out.weight"]})


def test_missing_host_memory_names_the_option(
    model: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "allocate_host_buffers", Mock(side_effect=MemoryError("20 GB")))
    with pytest.raises(SaveError, match=r"async_checkpoint=True: no host memory .*20 GB.* --no-async-checkpoint"):
        run_here(make_config(shards, model, tmp_path / "run", iterations=1))
