"""Option `precision` in whole commands: what it changes, what it leaves, what is refused."""

import logging
from pathlib import Path
from unittest import mock

import pytest
import torch

from shards.dataset import open_data_set
from stage2_distill.evaluation.compare import open_evaluation
from stage2_distill.evaluation.config import EvaluateConfig
from stage2_distill.low_precision.fp8_support import check_fp8_device
from stage2_distill.sampling.config import SampleConfig
from stage2_distill.sampling.student_sampler import open_student
from tests.stage2_distill.training_helpers import make_config, make_shards, run_here

OPTIONS = {"dtype": "bfloat16", "iterations": 2, "checkpoint_every": 1}


@pytest.fixture(scope="module")
def shards(fp8_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards") / "data", fp8_model)


@pytest.fixture(scope="module")
def run(fp8_model: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a run."""
    return run_here(make_config(shards, fp8_model, tmp_path_factory.mktemp("run") / "run", **OPTIONS))


def sample_config(run: Path, model: Path, **changes: object) -> SampleConfig:
    options = {"checkpoint": str(run), "model": str(model), "out": "o.mp4", "prompt": "p", "device": "cpu"}
    return SampleConfig(**options | {"max_text_tokens": 32} | changes)


def test_sampling_says_what_it_costs(
    fp8_model: Path, shards: Path, run: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stage2_distill.sampling.student_sampler.predict_seconds", lambda *_, **__: 5.0)  # as on a GPU
    records = [open_data_set(str(shards)).read_record(index) for index in range(3)]
    exact = open_student(sample_config(run, fp8_model))
    with caplog.at_level(logging.INFO):
        rounded = open_student(sample_config(run, fp8_model, precision="fp8"))
    assert len([line for line in caplog.messages if line.startswith("precision=fp8: ") and "L2" in line]) == 1
    assert (exact.denoising_seconds, rounded.denoising_seconds) == (5.0, None), "the speed of fp8 is not measured"
    latents = [student(records, [1, 2, 3]) for student in (exact, rounded)]
    assert torch.equal(latents[0][:, :, 0], latents[1][:, :, 0])  # the given frame
    error = (latents[0] - latents[1]).norm() / latents[0].norm()
    assert 1e-3 < error < 0.1
    together, alone = latents[1][1], rounded(records[1:2], [2])[0]
    assert (together - alone).norm() / alone.norm() < error / 2  # products of other sizes add in another order
    sizes = [sum(weight.nbytes for weight in student.net.blocks.parameters()) for student in (exact, rounded)]
    assert sizes[1] < 0.7 * sizes[0]


def test_float32_is_refused(run: Path, fp8_model: Path) -> None:
    assert sample_config(run, fp8_model, dtype="bfloat16", precision="fp8").precision == "fp8"
    with pytest.raises(ValueError, match=r"^precision=fp8: needs dtype=bfloat16, not float32"):
        sample_config(run, fp8_model, dtype="float32", precision="fp8")
    with pytest.raises(ValueError, match=r"^precision=fp8: needs dtype"):
        EvaluateConfig(("c",), "s", "m", "o", dtype="float32", precision="fp8")


def test_sizes_that_do_not_fit_are_refused(model: Path, tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "data", model)
    problem = r"=fp8: layer attn1.to_q of the model maps 24 to 24, and fp8 needs multiples of 16; give --"
    loading = "stage2_distill.sampling.student_sampler.load_student"
    with mock.patch(loading, side_effect=AssertionError), pytest.raises(ValueError, match="^precision" + problem):
        open_student(sample_config(model / "transformer", model, precision="fp8"))
    config = EvaluateConfig((str(model / "transformer"),), str(shards), str(model), str(tmp_path), precision="fp8")
    with pytest.raises(ValueError, match="^precision" + problem + "precision exact$"):
        open_evaluation(config)


def test_devices_without_8_bits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_fp8_device(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    problem = r"^precision=fp8: NVIDIA A100 has compute capability 8.0, and fp8 needs 8.9; give --precision exact$"
    with pytest.raises(ValueError, match=problem):
        check_fp8_device(torch.device("cuda"))
    monkeypatch.delattr(torch, "_scaled_mm")
    with pytest.raises(ValueError, match=r"^precision=fp8: torch .* on cpu \(.*_scaled_mm.*\); update torch"):
        check_fp8_device(torch.device("cpu"))
