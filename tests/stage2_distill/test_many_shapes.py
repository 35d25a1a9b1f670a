"""Three sizes and two lengths in one run: any number of ranks, any batch size, exact resume, previews and facts."""

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from common.condition import Condition
from common.video import FrameSize, VideoSpec
from shards import latent_store
from shards.mixture import RecordStream, open_data_sets
from stage2_distill.checkpointing.format import load_checkpoint, newest_checkpoint, read_facts
from stage2_distill.model.activation_checkpoint import block_runner
from stage2_distill.model.layers import ExecutionPlan, maybe_compile
from stage2_distill.model.wan import load_transformer, make_denoiser
from stage2_distill.monitoring.preview import PreviewOptions, open_previews
from stage2_distill.train import student_facts
from tests.stage2_distill.test_ranks import OPTIONS, losses, samples
from tests.stage2_distill.training_helpers import (
    SPEC,
    assert_same,
    make_config,
    make_shards,
    run_here,
    run_jobs,
    tensors,
)
from tests.tiny_models import TEXT_DIM

SIZES = ((64, 64), (32, 96), (96, 32))
SHAPES = {"num_frames": "5,9:2", "iterations": 1, "global_batch": 8, "student_update_interval": 2}  # both updates
CASES = {  # name: (ranks, batch size)
    "alone": (1, 1),
    "1": (1, 4),
    "2": (2, 2),
    "4": (4, 1),
}


@pytest.fixture(scope="module")
def shards(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards") / "data", model, sizes=SIZES)


@pytest.fixture(scope="module")
def made(model: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs of all cases, from one launch."""
    folder = tmp_path_factory.mktemp("shapes")
    jobs = []
    for world in (1, 2, 4):
        own = {name: size for name, (ranks, size) in CASES.items() if ranks == world}
        changes = OPTIONS | SHAPES
        jobs.append(
            (world, [make_config(shards, model, folder / name, batch_size=own[name], **changes) for name in own], {})
        )
    run_jobs(jobs, folder)
    return folder


@pytest.mark.parametrize("name", list(CASES)[1:])
def test_any_ranks_and_batch_sizes_give_the_same_run(made: Path, name: str) -> None:
    assert samples(made / name) == samples(made / "alone")
    assert losses(made / name) == pytest.approx(losses(made / "alone"), rel=1e-6)
    expected = tensors(newest_checkpoint(made / "alone"))
    found = {key: torch.zeros_like(value) for key, value in expected.items()}
    load_checkpoint(newest_checkpoint(made / name), found)
    for role in ("student.", "critic.", "ema."):
        keys = [key for key in expected if key.startswith(role)]
        off = sum((found[key] - expected[key]).square().sum() for key in keys)
        assert off.sqrt() / sum(expected[key].square().sum() for key in keys).sqrt() < 1e-6, role


def test_checkpoints_know_sizes_and_lengths(made: Path) -> None:
    facts = read_facts(newest_checkpoint(made / "alone"))
    assert facts.spec == SPEC and facts.lengths == (5, 9)
    assert facts.sizes == facts.frame_sizes == (FrameSize(32, 96), FrameSize(64, 64), FrameSize(96, 32))


def test_one_shape_leaves_no_new_keys(model: Path, tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "data", model, records=8)
    facts = student_facts(make_config(shards, model, tmp_path / "run"), model, open_data_sets([str(shards)]))
    assert not {"sizes", "lengths"} & facts.stored_fields.keys()
    assert facts.frame_sizes == (SPEC.frame_size,) and facts.frame_counts == (SPEC.num_frames,)


@pytest.mark.parametrize("reuse", [False, True])
def test_stopped_and_resumed_is_the_same_run(model: Path, shards: Path, tmp_path: Path, reuse: bool) -> None:
    """With reuse it stops within a trajectory, whose shape the resumed run must find again."""
    changes = SHAPES | {"iterations": 2, "global_batch": 2, "batch_size": 1, "rollout_reuse": reuse}
    changes |= {"student_update_interval": 3, "text_only_fraction": 0.3}
    whole = run_here(make_config(shards, model, tmp_path / "whole", **changes))
    run_here(make_config(shards, model, tmp_path / "half", **changes | {"iterations": 1}))
    again = run_here(make_config(shards, model, tmp_path / "half", **changes))
    assert_same(whole, again)


def test_the_start_says_how_many_shapes(
    model: Path, shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    options = SHAPES | {"iterations": 1, "preview_every": 1, "preview_count": 4}
    run = run_here(make_config(shards, model, tmp_path / "run", **options)).parent
    assert "3 sizes x 2 lengths: a micro-batch has one shape; memory is that of 9 x 64 x 64" in caplog.text
    steps = [f"step-00000{step}-{size}" for step in (0, 1) for size in ("32x96", "64x64", "96x32")]
    assert latent_store.complete_groups(run / "previews.zarr") == steps
    groups = {step: latent_store.describe_group(run / "previews.zarr", step) for step in steps}
    assert groups[steps[0]].spec == VideoSpec(9, 32, 96, 8) and len(groups[steps[0]].keys) == 2
    assert [len(groups[step].keys) for step in steps] == [2, 1, 1] * 2


def test_every_shape_is_compiled_once_and_its_graphs_are_used_again(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit of torch does not count; it is lowered here, as more shapes would only take longer."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # the graphs without their kernels
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 3)
    graphs = torch._dynamo.utils.counters["stats"]
    block_runner.cache_clear()
    maybe_compile.cache_clear()
    torch._dynamo.reset()
    plain = make_denoiser(load_transformer(model, torch.float32), torch.float32)
    compiled = make_denoiser(
        load_transformer(model, torch.float32, ExecutionPlan(checkpointing="selective", compiled=True)), torch.float32
    )
    shapes = [VideoSpec(9, 64, 96), VideoSpec(9, 96, 64), VideoSpec(9, 64, 64)]
    counted = []
    for _ in range(2):
        before = graphs["unique_graphs"]
        for spec in shapes:
            generator = torch.Generator().manual_seed(0)
            first_frame = torch.randn(1, *spec.first_frame_shape, generator=generator)
            condition = Condition(first_frame, torch.randn(1, 8, TEXT_DIM, generator=generator))
            x_t, sigma = torch.randn(1, *spec.latent_shape, generator=generator), torch.tensor([0.7])
            with torch.no_grad():
                without_gradient = compiled(x_t, sigma, condition)
                torch.testing.assert_close(without_gradient, plain(x_t, sigma, condition), rtol=1e-5, atol=1e-5)
            compiled(x_t, sigma, condition).sum().backward()
        counted.append(graphs["unique_graphs"] - before)
    block_runner.cache_clear()
    maybe_compile.cache_clear()
    # Landscape and portrait have equally many tokens, so they share their graphs: two of a block and of the final
    # norm, each with and without gradient.
    assert counted == [2 * 2 * 2, 0]


def test_a_size_that_no_record_has_is_refused(model: Path, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="height=64: no record is of 64x96 pixels, but 32x96, 64x64, 96x32; give --height"
    ):
        run_here(make_config(shards, model, tmp_path / "run", width=96))
    with pytest.raises(ValueError, match="batch_size=2: rollout_reuse and videos of several sizes"):
        run_here(make_config(shards, model, tmp_path / "run", rollout_reuse=True))
    assert not (tmp_path / "run").exists()


def test_previews_of_other_sizes_than_those_of_training_are_refused(model: Path, shards: Path, tmp_path: Path) -> None:
    plain = make_shards(tmp_path / "plain", model, records=8)
    config = make_config(plain, model, tmp_path / "run", preview_every=1, preview_data=str(shards))
    data = open_data_sets(config.shards)
    options = config.select(PreviewOptions, spec=config.spec, sigmas=config.sigmas)
    with pytest.raises(
        ValueError, match="has records of 32x96, 96x32 pixels, on which the run does not train; its sizes are 64x64"
    ):
        open_previews(tmp_path, options, data)
    (group,) = open_previews(tmp_path, replace(options, preview_data=str(plain)), data).groups
    assert group.suffix == "" and group.spec == SPEC


def test_data_sets_of_several_sizes_are_mixed_by_their_weights(model: Path, shards: Path, tmp_path: Path) -> None:
    wide = make_shards(tmp_path / "wide", model, records=8, sizes=SIZES[1:2])
    data = open_data_sets([str(shards), f"{wide}:0.5"], many_sizes=True)
    assert data.size_shares == pytest.approx(
        {VideoSpec(9, 32, 96, 8): 2 / 9 + 1 / 3, VideoSpec(9, 64, 64, 8): 2 / 9, VideoSpec(9, 96, 32, 8): 2 / 9}
    )
    stream = RecordStream(data, seed=3)
    for position in range(36):
        spec, record = stream.record_spec(position), data.read_record(stream.record_index(position))
        assert record.first_frame.shape == spec.first_frame_shape
