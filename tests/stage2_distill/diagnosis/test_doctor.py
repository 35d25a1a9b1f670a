"""The command `doctor`: sound and broken models, data sets, disks, clocks and devices; ranks under torchrun."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stage2_distill.diagnosis import machine_checks
from stage2_distill.diagnosis.data_checks import check_clock
from stage2_distill.diagnosis.doctor import diagnose
from stage2_distill.model.attention import dot_product_attention
from stage2_distill.planning.config import DoctorConfig
from tests.forked import run_python
from tests.stage2_distill.training_helpers import make_shards
from tests.tiny_models import make_model

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def shards(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards") / "data", model)


def states(**options: object) -> dict[str, tuple[str, str]]:
    """State and text of each check."""
    return {found.check: (found.state, str(found)) for found in diagnose(DoctorConfig(**options))}


def test_a_sound_machine(model: Path, shards: Path, tmp_path: Path) -> None:
    found = states(model=str(model), shards=(f"{shards}:0.3",), out=str(tmp_path / "new" / "run"), device="cpu")
    assert {state for state, _ in found.values()} == {"ok"}, found
    assert list(found) == ["torch", "gpu", "attention", "model", "shards", "disk", "clock"]
    assert "auto takes torch" in found["attention"][1] and "complete" in found["model"][1]
    assert not (tmp_path / "new").exists() and list(tmp_path.iterdir()) == []
    if not torch.cuda.is_available():
        assert "none: everything runs on the CPU" in found["gpu"][1]


def test_what_was_not_named_is_said() -> None:
    state, text = states(device="cpu")["others"]
    assert state == "skip" and text.endswith("named: the model (--model), data sets (--shards), the disk (--out)")


def test_broken_models(model: Path, tmp_path: Path) -> None:
    assert states(model=str(tmp_path / "none"))["model"][0] == "fail"
    assert states(model="Wan-AI/Wan2.2-TI2V-5B-Diffusers")["model"][0] == "warn"
    half = Path(shutil.copytree(model, tmp_path / "half"))
    shutil.rmtree(half / "vae")
    state, text = states(model=str(half))["model"]
    assert state == "warn" and "missing or incomplete: vae" in text and "encode and sample do" in text
    weights = next((half / "transformer").glob("*.safetensors"))
    tensors = load_file(weights)
    del tensors["proj_out.bias"]
    save_file(tensors, weights)
    state, text = states(model=str(half))["model"]
    assert state == "fail" and "lacks 1 of" in text and "proj_out.bias" in text
    weights.write_bytes(weights.read_bytes()[:1000])
    assert states(model=str(half))["model"][0] == "fail"


def test_broken_data_sets(model: Path, shards: Path, tmp_path: Path) -> None:
    assert states(shards=(str(tmp_path / "none"),))["shards"][0] == "fail"
    state, text = states(model=str(make_model(tmp_path / "other", seed=1)), shards=(str(shards),))["shards"]
    assert state == "fail" and "vae" in text and "give the model that encoded them" in text
    broken = Path(shutil.copytree(shards, tmp_path / "broken"))
    tar = sorted(broken.glob("*.tar"))[-1]
    data = bytearray(tar.read_bytes())
    data[1200] ^= 1
    tar.write_bytes(data)
    state, text = states(shards=(str(broken),))["shards"]
    assert state == "fail" and tar.name in text


def test_a_small_disk_and_a_wrong_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 10**9})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    state, text = states(out=str(tmp_path), device="cpu")["disk"]
    assert state == "fail" and "1.0 GB free, a run needs 400.0 GB" in text
    assert [found.state for found in check_clock(-60)] == ["warn"]
    monkeypatch.setattr("time.time", lambda: 0.0)
    assert [found.state for found in check_clock(0)] == ["fail"]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder in which nobody may write")
def test_a_folder_that_cannot_be_written_is_named() -> None:
    state, text = states(out="/proc/run", device="cpu")["disk"]
    assert state == "fail" and "out=/proc: " in text and "a run cannot write there" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_one_failure() -> None:
    found = states(device="cuda")
    assert [check for check, (state, _) in found.items() if state == "fail"] == ["gpu"]
    assert "give --device cpu" in found["gpu"][1]


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.124.06  Wed Feb 26 02:01:56 UTC 2025", "570.124.06"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  575.57.08  Release Build", "575.57.08"),
        ("nothing of the kind", "unknown"),
    ],
)
def test_version_of_the_driver(line: str, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_checks, "DRIVER_FILE", tmp_path / "version")
    assert machine_checks.driver_version() == "unknown"
    (tmp_path / "version").write_text(line)
    assert machine_checks.driver_version() == version


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu(model: Path, shards: Path, tmp_path: Path) -> None:
    """Run it alone on the GPU: other programs on it are a warning."""
    found = states(model=str(model), shards=(str(shards),), out=str(tmp_path))
    assert list(found) == ["torch", "gpu", "attention", "model", "memory", "shards", "disk", "clock"]
    failed = {check: text for check, (state, text) in found.items() if state == "fail"}
    assert not failed.keys() - {"disk"}, failed  # the test's disk may be small
    assert torch.cuda.get_device_name() in found["gpu"][1] and re.search(r"driver \d+\.\d+", found["gpu"][1])
    assert "training fits with --optimizer-form standard" in found["memory"][1]  # of the tiny model
    kernel = re.search(r"auto takes (cudnn|flash)", found["attention"][1])[1]
    assert kernel in found["attention"][1].partition("available: ")[2]
    if ": a resumed run has the same bits" in found["attention"][1]:
        gradients = [attention_gradient(kernel) for _ in range(3)]
        assert all(torch.equal(gradients[0], one) for one in gradients[1:])


def attention_gradient(kernel: str) -> torch.Tensor:
    """Gradient of attention over 8192 tokens, which are many sums per key."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(1, 8192, 4, 128, generator=generator, device="cuda", dtype=torch.bfloat16).requires_grad_()
    dot_product_attention(x, x, x, kernel).square().sum().backward()
    return x.grad


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "cli.py"]
    done = subprocess.run([*command, "doctor", "--json"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    found = {item["check"]: item for item in json.loads(done.stdout)}
    assert found["ranks"]["text"].startswith("2 ranks over NCCL, ") and found["ranks"]["state"] != "fail"


def test_the_command_under_torchrun(tmp_path: Path) -> None:
    """Two ranks over gloo: the first one alone prints, and a failure is exit code 1."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "cli.py"]
    options = ["doctor", "--device", "cpu", "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    found = {item["check"]: item for item in json.loads(done.stdout)}
    assert done.returncode == 0 and found["ranks"]["text"].startswith("2 ranks over gloo, ")
    done = run_python("cli.py", "doctor", "--device", "cpu", "--shards", tmp_path)
    assert done.returncode == 1 and "\nfail shards     " in done.stdout
