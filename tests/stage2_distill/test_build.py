"""Whole runs in the compact form: the standard mode's losses and masters, resume, ranks, refusals."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stage2_distill.build import choose_optimizer_form
from stage2_distill.checkpointing.format import load_checkpoint, newest_checkpoint
from stage2_distill.config import DistillConfig
from stage2_distill.distributed.process_group import start_process_group
from stage2_distill.model.split_float32 import join_master
from stage2_distill.offload import pinned_memory
from stage2_distill.optim.optimizers import OptimizerSettings
from stage2_distill.planning.network_size import TransformerSize
from tests.stage2_distill.training_helpers import make_config, make_shards, run_here, run_worker, tensors

HALF = {"dtype": "bfloat16", "grad_clip": 1e6, "global_batch": 2}


@pytest.fixture(scope="module")
def shards(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards") / "data", model)


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [value for line in lines for key, value in line.items() if key.endswith("_loss")]


def masters(found: dict[str, torch.Tensor], role: str) -> dict[str, torch.Tensor]:
    """Float32 masters of a role in a checkpoint of either mode."""
    weights = {name.removeprefix(f"{role}."): value for name, value in found.items() if name.startswith(f"{role}.")}
    rest = {name: found.get(f"{role}_optimizer.{name}.remainder") for name in weights}
    return {name: value if rest[name] is None else join_master(value, rest[name]) for name, value in weights.items()}


def both_modes(model: Path, shards: Path, folder: Path, iterations: int) -> tuple[Path, Path]:
    """Runs of the standard mode and of the compact one with a float32 second moment."""
    options = HALF | {"second_moment": "float32", "iterations": iterations, "checkpoint_every": iterations}
    standard, compact = (
        run_here(make_config(shards, model, folder / memory, **options, optimizer_form=memory))
        for memory in ("standard", "compact")
    )
    return standard, compact


def test_an_iteration_leaves_the_standard_modes_masters(model: Path, shards: Path, tmp_path: Path) -> None:
    """Bit for bit, but for the text embedder: FSDP adds up the blocks' bf16 gradients by it in another order."""
    standard, compact = map(tensors, both_modes(model, shards, tmp_path, 1))
    for role in ("student", "critic"):
        expected, found = masters(standard, role), masters(compact, role)
        for name, value in expected.items():
            if "text_embedder" not in name:
                assert torch.equal(found[name], value), name
    assert torch.equal(compact["ema.proj_out.weight"], standard["ema.proj_out.weight"])


def test_20_iterations_have_the_standard_modes_losses(model: Path, shards: Path, tmp_path: Path) -> None:
    standard, compact = both_modes(model, shards, tmp_path, 20)
    assert losses(compact.parent) == pytest.approx(losses(standard.parent), rel=2e-2)
    assert len(losses(compact.parent)) == 30
    assert all(map(math.isfinite, losses(compact.parent)))


def test_stopped_and_resumed_equals_unbroken(model: Path, shards: Path, tmp_path: Path) -> None:
    options = HALF | {"optimizer_form": "compact", "global_batch": 4}
    whole = tensors(run_here(make_config(shards, model, tmp_path / "whole", **options)))
    run_here(make_config(shards, model, tmp_path / "half", **options, iterations=3))
    again = tensors(run_here(make_config(shards, model, tmp_path / "half", **options)))
    assert whole.keys() == again.keys()
    assert any(value.dtype == torch.int16 for value in whole.values())
    for name, value in whole.items():
        assert torch.equal(value, again[name]), name


def test_two_ranks_equal_one_and_change_into_each_other(model: Path, shards: Path, tmp_path: Path) -> None:
    options = HALF | {
        "optimizer_form": "compact",
        "global_batch": 4,
        "eps": 1e-2,
        "student_lr": 1e-2,
        "critic_lr": 1e-2,
    }
    alone = run_here(make_config(shards, model, tmp_path / "one", batch_size=2, **options))
    half = make_config(shards, model, tmp_path / "elastic", batch_size=2, **options, iterations=3)
    run_here(half)
    together = make_config(shards, model, tmp_path / "two", batch_size=1, **options)
    elastic = make_config(shards, model, tmp_path / "elastic", batch_size=1, **options)
    expected = tensors(alone)
    for run in run_worker([together, elastic], 2, tmp_path):
        assert losses(run) == pytest.approx(losses(alone.parent), rel=2e-2), run.name
        found = {name: torch.zeros_like(value) for name, value in expected.items()}
        load_checkpoint(newest_checkpoint(run), found)
        for role in ("student", "critic"):
            mine, theirs = masters(found, role), masters(expected, role)
            off = sum((mine[n] - theirs[n]).square().sum() for n in theirs) / sum(
                v.square().sum() for v in theirs.values()
            )
            assert off.sqrt() < 2e-3, (run.name, role)


@pytest.mark.parametrize(("change", "words"), [({"beta1": 0.9}, "beta1=0.9"), ({"dtype": "float32"}, "dtype=float32")])
def test_what_the_compact_form_cannot_do_is_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DistillConfig(shards=("s",), model="m", out="o", **({"optimizer_form": "compact"} | change))


def test_auto_is_standard_where_it_fits(model: Path, shards: Path, tmp_path: Path) -> None:
    config = make_config(shards, model, tmp_path / "run", optimizer_form="auto", dtype="bfloat16")
    assert choose_optimizer_form(config, start_process_group("cpu"), TransformerSize()) == "standard"
    assert (
        choose_optimizer_form(
            make_config(shards, model, tmp_path, optimizer_form="compact", dtype="bfloat16"),
            start_process_group("cpu"),
            TransformerSize(),
        )
        == "compact"
    )


@pytest.mark.parametrize(
    ("offload", "clips", "waits"), [("average", 2, False), ("average", 4, True), ("all", 2, True), ("none", 4, False)]
)
def test_the_students_state_makes_room_for_summed_gradients(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offload: str, clips: int, waits: bool
) -> None:
    """One GPU's 80 GB hold the 5B's float32 sums, 19 GiB, or the student's state beside bf16 gradients, not both."""
    asked: dict[str, bool] = {}
    monkeypatch.setattr(pinned_memory.PinnedPool, "__init__", lambda self, *, offload: asked.update(given=offload))
    monkeypatch.setattr(pinned_memory.PinnedPool, "place_tensor", lambda self, value: value)
    config = make_config(tmp_path, model, tmp_path, **HALF | {"optimizer_form": "compact", "offload": offload})
    config = replace(config, batch_size=2, global_batch=clips)
    settings = OptimizerSettings.of(config, start_process_group("cpu"), "compact")
    found = {}
    for role in ("student", "critic"):
        settings.build_optimizer(torch.nn.Linear(64, 2, dtype=torch.bfloat16), role)
        found[role] = asked["given"]
    assert found == {"student": waits, "critic": False}


def test_auto_goes_on_in_the_form_of_the_checkpoints(model: Path, shards: Path, tmp_path: Path) -> None:
    """On the CPU `auto` would choose the standard form, in which the same names are other numbers."""
    whole = tensors(run_here(make_config(shards, model, tmp_path / "whole", **HALF, optimizer_form="compact")))
    half = make_config(shards, model, tmp_path / "half", **HALF, optimizer_form="compact", iterations=3)
    run_here(half)
    with pytest.raises(ValueError, match=r"step-000003: .* use --optimizer-form compact, as before"):
        run_here(replace(half, iterations=6, optimizer_form="standard"))
    cut = shutil.copytree(tmp_path / "half" / "step-000003", tmp_path / "half" / "step-000004") / "student.json"
    cut.write_text(cut.read_text()[:100])
    again = tensors(run_here(replace(half, iterations=6, optimizer_form="auto")))
    assert [name for name, value in whole.items() if not torch.equal(value, again[name])] == []


@pytest.mark.parametrize("source", ["standard", "compact"])
@pytest.mark.parametrize("form", ["standard", "compact"])
def test_another_run_gives_its_masters_to_the_bit(
    model: Path, shards: Path, tmp_path: Path, source: str, form: str
) -> None:
    given = run_here(make_config(shards, model, tmp_path / "source", **HALF, optimizer_form=source, iterations=1))
    still = {"iterations": 1, "student_lr": 0.0, "critic_lr": 0.0, "init_from": str(given)}
    found = tensors(run_here(make_config(shards, model, tmp_path / "run", **HALF | still, optimizer_form=form)))
    for role in ("student", "critic"):
        for name, value in masters(tensors(given), role).items():
            assert torch.equal(masters(found, role)[name], value), (role, name)
