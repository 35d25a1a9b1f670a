"""Previews: the averaged student on fixed conditions, from any number of ranks, after any interruption."""

import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from common.seed import draw_normal, make_generator
from shards import latent_store
from shards.dataset import open_data_set
from shards.record import collate_records
from stage2_distill import train as module
from stage2_distill.checkpointing.format import load_checkpoint
from stage2_distill.dmd.rollout import rollout
from stage2_distill.model.wan import load_transformer as load_network
from stage2_distill.model.wan import make_denoiser
from stage2_distill.monitoring import preview
from tests.stage2_distill.training_helpers import make_config, make_shards, run_here, run_worker, tensors


@pytest.fixture(scope="module")
def shards(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards") / "data", model)


@pytest.fixture(scope="module")
def run(model: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("previews") / "run"
    return run_here(make_config(shards, model, out, iterations=4, preview_every=2, preview_count=3)).parent


def stored(run: Path, step: str) -> torch.Tensor:
    return latent_store.read_latent_rows(run / "previews.zarr", step, 0, 3)


def test_steps_from_the_start_to_the_end(run: Path) -> None:
    assert latent_store.complete_groups(run / "previews.zarr") == ["step-000000", "step-000002", "step-000004"]
    assert latent_store.is_store_complete(run / "previews.zarr")
    group = latent_store.describe_group(run / "previews.zarr", "step-000004")
    assert group.keys == ("000000000", "000000001", "000000002")
    assert group.prompts == ("prompt 0", "prompt 1", "prompt 2")
    assert not torch.equal(stored(run, "step-000002"), stored(run, "step-000004"))


def test_preview_is_the_averaged_student(run: Path, model: Path, shards: Path) -> None:
    """Equals a rollout from the same noise with the average of the checkpoint; step 0 shows the base model."""
    data = open_data_set(str(shards))
    records = [data.read_record(index) for index in range(3)]
    net = load_network(model, torch.float32).requires_grad_(False)

    def sample_rows() -> torch.Tensor:
        generators = [make_generator(0, 0, row, "preview") for row in range(3)]
        noise = draw_normal((48, 3, 4, 4), generators)
        sigmas = (1.0, 0.9375, 5 / 6, 0.625)
        return rollout(
            make_denoiser(net, torch.float32),
            noise,
            collate_records(records),
            sigmas=sigmas,
            generators=generators,
        )

    torch.testing.assert_close(stored(run, "step-000000"), sample_rows(), rtol=0, atol=1e-5)
    load_checkpoint(run / "step-000004", {f"ema.{name}": weight for name, weight in net.named_parameters()})
    torch.testing.assert_close(stored(run, "step-000004"), sample_rows(), rtol=0, atol=1e-5)


def test_previews_do_not_change_training(run: Path, model: Path, shards: Path, tmp_path: Path) -> None:
    plain = tensors(run_here(make_config(shards, model, tmp_path / "run", iterations=4)))
    for name, value in tensors(run / "step-000004").items():
        assert torch.equal(value, plain[name]), name


def test_several_ranks_write_the_same(run: Path, model: Path, shards: Path, tmp_path: Path) -> None:
    """Three rows on two ranks: one rank has a row of padding."""
    config = make_config(shards, model, tmp_path / "run", iterations=2, preview_every=2, preview_count=3)
    run_worker([config], 2, tmp_path)
    assert latent_store.complete_groups(tmp_path / "run" / "previews.zarr") == ["step-000000", "step-000002"]
    torch.testing.assert_close(stored(tmp_path / "run", "step-000000"), stored(run, "step-000000"), rtol=0, atol=1e-5)
    torch.testing.assert_close(stored(tmp_path / "run", "step-000002"), stored(run, "step-000002"), rtol=0, atol=1e-3)


def test_stopped_inside_a_preview_and_resumed(
    run: Path, model: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interrupted step is hidden and sampled again later; complete steps stay as they are."""
    options = {"iterations": 4, "checkpoint_every": 4, "preview_every": 2, "preview_count": 3}
    config = make_config(shards, model, tmp_path / "run", **options)  # resumes from the start: steps 0 and 2 come again
    write_latents, calls = latent_store.write_latents, []

    def interrupt(store: Path, step: str, rows: list[int], videos: torch.Tensor) -> None:
        calls.append(step)
        if len(calls) == 6:  # the second batch of step 4; iteration 3 is lost with it
            raise KeyboardInterrupt
        write_latents(store, step, rows, videos)

    monkeypatch.setattr(preview.latent_store, "write_latents", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_here(config)
    store = tmp_path / "run" / "previews.zarr"
    assert latent_store.complete_groups(store) == ["step-000000", "step-000002"]
    assert not latent_store.is_store_complete(store)
    before = (store / "step-000002" / "zarr.json").stat().st_mtime_ns
    monkeypatch.setattr(preview.latent_store, "write_latents", write_latents)
    run_here(config)
    assert latent_store.complete_groups(store) == ["step-000000", "step-000002", "step-000004"]
    assert (store / "step-000002" / "zarr.json").stat().st_mtime_ns == before
    assert torch.equal(stored(tmp_path / "run", "step-000004"), stored(run, "step-000004"))


def test_conditions_of_another_data_set(model: Path, shards: Path, tmp_path: Path) -> None:
    other = make_shards(tmp_path / "other", model, records=8, text_only=True)
    options = {"iterations": 1, "preview_every": 5, "preview_count": 2, "preview_data": str(other)}
    run_here(make_config(shards, model, tmp_path / "run", **options))
    assert latent_store.read_latent_rows(tmp_path / "run" / "previews.zarr", "step-000000", 0, 2).shape == (
        2,
        48,
        3,
        4,
        4,
    )
    with pytest.raises(ValueError, match="does not exist"):
        run_here(make_config(shards, model, tmp_path / "none", preview_every=5, preview_data=str(tmp_path / "no")))


def test_restart_with_other_options_samples_the_first_preview_again(
    model: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(shards, model, tmp_path / "run", iterations=1, preview_every=2, preview_count=3)
    monkeypatch.setattr(module, "load_micro_batches", Mock(side_effect=KeyboardInterrupt))
    previews = []
    for seed in (0, 1):
        with pytest.raises(KeyboardInterrupt):
            run_here(replace(config, seed=seed))
        previews.append(stored(tmp_path / "run", "step-000000"))
    assert not torch.equal(*previews)


def test_rank_with_only_padding_writes_nothing(run: Path, model: Path, shards: Path, tmp_path: Path) -> None:
    config = make_config(shards, model, tmp_path / "run", iterations=1, preview_every=2, preview_count=1)
    run_worker([config], 2, tmp_path)
    previews = latent_store.read_latent_rows(tmp_path / "run" / "previews.zarr", "step-000000", 0, 1)
    torch.testing.assert_close(previews, stored(run, "step-000000")[:1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("content", [b"", b'{"zarr_format": 3, "attr', b"null", b"\xff"])
def test_a_damaged_store_is_set_aside(
    content: bytes, run: Path, model: Path, shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Named with what is used instead; the run goes on and its later previews are written."""
    copied = shutil.copytree(run, tmp_path / "run")
    (copied / "previews.zarr" / "zarr.json").write_bytes(content)
    run_here(make_config(shards, model, copied, iterations=6, preview_every=2, preview_count=3))
    assert latent_store.complete_groups(copied / "previews.zarr") == ["step-000006"]
    assert (copied / "previews.zarr.damaged" / "step-000004").is_dir()
    (message,) = [message for message in caplog.messages if "previews.zarr.damaged" in message]
    assert message.startswith(f"{copied / 'previews.zarr' / 'zarr.json'}: ")
    assert "later previews go to a new store" in message
