"""Where a run begins: another run's adapters with the same effect, and one line for a source that does not fit."""

import logging
from pathlib import Path

import pytest
import torch

from stage2_distill.model.layers import ExecutionPlan
from stage2_distill.sampling.student_sampler import load_student
from tests.stage2_distill.training_helpers import make_config, make_shards, run_here, tensors

LORA = {
    "lora_rank": 3,
    "lora_alpha": 6.0,
    "student_lr": 1e-2,
    "critic_lr": 1e-2,
    "iterations": 2,
    "checkpoint_every": 2,
}
STILL = {"iterations": 1, "student_lr": 0.0, "critic_lr": 0.0, "weight_decay": 0.0}


@pytest.fixture(scope="module")
def shards(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards") / "data", model)


@pytest.fixture(scope="module")
def lora_run(model: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of adapters of rank 3 and alpha 6."""
    return run_here(make_config(shards, model, tmp_path_factory.mktemp("lora") / "run", **LORA))


@pytest.fixture(scope="module")
def full_run(model: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("full") / "run"
    return run_here(make_config(shards, model, out, iterations=1, checkpoint_every=1))


def merged(checkpoint: Path, model: Path, weights: str) -> dict[str, torch.Tensor]:
    options = {"weights": weights, "dtype": torch.float32, "device": torch.device("cpu")}
    net = load_student(checkpoint, ExecutionPlan(), model=str(model), **options)
    return {name: value.detach() for name, value in net.named_parameters()}


@pytest.fixture(scope="module")
def source_weights(lora_run: Path, model: Path) -> dict[str, torch.Tensor]:
    return merged(lora_run, model, "student")


@pytest.mark.parametrize("alpha", [6.0, 3.0, None, 24.0, 5.0, 0.7])
def test_adapters_have_the_same_effect_with_another_alpha(
    alpha: float | None,
    lora_run: Path,
    source_weights: dict[str, torch.Tensor],
    model: Path,
    shards: Path,
    tmp_path: Path,
) -> None:
    """To the bit if the quotient of the alphas is a power of two, else to the rounding of float32."""
    options = LORA | STILL | {"lora_alpha": alpha, "init_from": str(lora_run.parent)}
    begun = run_here(make_config(shards, model, tmp_path / "run", **options))
    before, after = tensors(lora_run), tensors(begun)
    for role in ("student", "critic", "ema"):
        for name in [name for name in before if name.startswith(f"{role}.") and ".lora_B." in name]:
            scales = 6.0 / 3, (alpha or 3.0) / 3  # alpha / rank
            source = "student" if role == "ema" else role  # a new run's average starts from its student
            expected = before[name.replace(role, source, 1)] * scales[0]
            torch.testing.assert_close(after[name] * scales[1], expected, rtol=1e-6, atol=0)
            first = name.replace(".lora_B.", ".lora_A.")
            assert torch.equal(after[first], before[first.replace(role, source, 1)])
    exact = alpha in (6.0, 3.0, None, 24.0)
    for name, value in merged(begun, model, "student").items():
        expected = source_weights[name]
        assert torch.equal(value, expected) if exact else torch.allclose(value, expected, rtol=1e-6, atol=1e-7), name


@pytest.mark.parametrize(
    ("source", "changes", "words"),
    [
        ("lora", {}, r"is a LoRA run \(lora_rank=3\), and this one has lora_rank=0; give --lora-rank 3"),
        ("lora", {"lora_rank": 2}, r"is a LoRA run \(lora_rank=3\), and this one has lora_rank=2; give --lora-rank 3"),
        (
            "full",
            {"lora_rank": 2},
            r"is a run of all weights \(lora_rank=0\), and this one has lora_rank=2; give --lora-rank 0",
        ),
        ("model", {"lora_rank": 2}, "must be a LoRA run, as lora_rank is set; use --model for another base"),
        ("file", {}, "cannot be read as a file of torch.save"),
        ("file", {"lora_rank": 2}, "must be a LoRA run, as lora_rank is set; use --model for another base"),
        ("none", {}, "no such folder, and not a hub name"),
        ("empty", {}, "holds no diffusion_pytorch_model.safetensors"),
        ("config", {}, "holds no diffusion_pytorch_model.safetensors"),
        ("vae", {}, "is a VAE; this project needs Wan2.2-TI2V-5B"),
    ],
)
def test_a_source_that_does_not_fit_is_one_line_about_init_from(
    source: str, changes: dict, words: str, lora_run: Path, full_run: Path, model: Path, shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "model.pt").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text("{}")
    places = {"lora": lora_run.parent, "full": full_run, "model": model, "file": tmp_path / "model.pt"}
    path = places.get(source, model / "vae" if source == "vae" else tmp_path / source)
    with pytest.raises(ValueError, match=rf"^init_from={path}(/step-0*[12])?: .*{words}") as error:
        run_here(make_config(shards, model, tmp_path / "run", **STILL | {"init_from": str(path)} | changes))
    assert "model=" not in str(error.value) and "\n" not in str(error.value)


def test_a_start_says_what_it_starts_from(
    lora_run: Path, full_run: Path, model: Path, shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    out = tmp_path / "run"
    run_here(make_config(shards, model, out, iterations=1))
    assert f"starting {out} from {model}, on {shards}: 0 of 1 iterations" in caplog.text
    run_here(make_config(shards, model, out, iterations=2))
    assert f"resuming {out} from step-000001, on {shards}: 1 of 2 iterations" in caplog.text
    run_here(make_config(shards, model, tmp_path / "other", **STILL | {"init_from": str(full_run)}))
    assert f"starting {tmp_path / 'other'} from {full_run}, on" in caplog.text
