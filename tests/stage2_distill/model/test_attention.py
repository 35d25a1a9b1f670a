"""The choice of attention kernels and deterministic mode; test_fused_kernels.py tests what kernels compute."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from stage2_distill import train
from stage2_distill.model.attention import (
    FLASH_3_MODULE,
    activate_flash_3,
    check_kernel,
    choose_kernel,
    dot_product_attention,
    enable_determinism,
)
from tests.stage2_distill.training_helpers import make_config, make_shards, run_here

NAMES = ("auto", "torch", "cudnn", "flash", "efficient", "math")
PACKAGE = """
import torch
ops = torch.library.Library("flash_attn_3", "DEF")
ops.define("fwd(Tensor q) -> Tensor")
ops.define("bwd(Tensor q) -> Tensor")
"""


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A folder of importable modules on a machine that claims to have an H100."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.syspath_prepend(tmp_path)
    activate_flash_3.cache_clear()
    yield tmp_path
    activate_flash_3.cache_clear()
    sys.modules.pop(FLASH_3_MODULE, None)
    if nn.attention.current_flash_attention_impl() is not None:
        nn.attention.restore_flash_attention_impl()


def test_auto_without_the_package(hopper: Path) -> None:
    assert [choose_kernel(name, half_on_gpu=True) for name in NAMES] == ["cudnn", *NAMES[1:]]
    assert [choose_kernel(name, half_on_gpu=False) for name in NAMES] == ["torch", *NAMES[1:]]
    assert nn.attention.current_flash_attention_impl() is None


def test_auto_with_flash_attention_3(hopper: Path) -> None:
    (hopper / f"{FLASH_3_MODULE}.py").write_text(PACKAGE)
    assert choose_kernel("auto", half_on_gpu=False) == "torch"
    assert choose_kernel("cudnn", half_on_gpu=True) == "cudnn" and nn.attention.current_flash_attention_impl() is None
    assert choose_kernel("auto", half_on_gpu=True) == "flash" == choose_kernel("flash", half_on_gpu=True)
    assert nn.attention.current_flash_attention_impl() == "FA3"


@pytest.mark.parametrize("capability", [(8, 0), (9, 4), (10, 0)])
def test_flash_attention_3_needs_hopper(
    hopper: Path, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    (hopper / f"{FLASH_3_MODULE}.py").write_text(PACKAGE)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert choose_kernel("auto", half_on_gpu=True) == "cudnn"


@pytest.mark.parametrize("text", ["raise ImportError('libcudart.so.12: cannot open shared object file')", ""])
def test_unusable_package_is_logged(hopper: Path, caplog: pytest.LogCaptureFixture, text: str) -> None:
    (hopper / f"{FLASH_3_MODULE}.py").write_text(text)
    assert choose_kernel("auto", half_on_gpu=True) == "cudnn"
    (line,) = caplog.messages
    assert line.startswith(f"{FLASH_3_MODULE} is installed but cannot be used (") and "cuDNN" in line


def test_attention_compiles() -> None:
    query = torch.randn(1, 8, 2, 16)
    compiled = torch.compile(lambda x: dot_product_attention(x, x, x, "auto"), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(query), dot_product_attention(query, query, query, "math"))


@pytest.mark.parametrize("kernel", NAMES)
def test_unusable_kernel_fails_before_data_is_read(kernel: str, model: Path, tmp_path: Path) -> None:
    if kernel not in ("cudnn", "efficient"):  # these are for GPUs
        check_kernel(kernel, 12, torch.float32, torch.device("cpu"))
        return
    config = make_config(make_shards(tmp_path / "data", model), model, tmp_path / "run", attention=kernel)
    with pytest.raises(
        ValueError, match=rf"^attention={kernel}: no kernel for heads of 12 in float32 on cpu .*; use torch$"
    ):
        run_here(config)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["distill.yaml"]
    run_here(replace(config, attention="auto", iterations=1))


@pytest.mark.parametrize(
    ("kernel", "deterministic"), [("auto", False), ("cudnn", False), ("flash", True), ("torch", True)]
)
def test_determinism_depends_on_the_kernel(
    kernel: str, deterministic: bool, hopper: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    assert enable_determinism(kernel, torch.bfloat16, torch.device("cpu"))
    assert not torch.are_deterministic_algorithms_enabled()
    try:
        assert enable_determinism(kernel, torch.bfloat16, torch.device("cuda")) is deterministic
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled() is not deterministic
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)


def test_nondeterministic_cublas_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(ValueError, match=r"^CUBLAS_WORKSPACE_CONFIG=:0:0: .* unset it or use :4096:8$"):
        enable_determinism("flash", torch.bfloat16, torch.device("cuda"))


def test_flash_attention_3_is_deterministic(hopper: Path) -> None:
    (hopper / f"{FLASH_3_MODULE}.py").write_text(PACKAGE)
    try:
        assert enable_determinism("auto", torch.bfloat16, torch.device("cuda"))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("deterministic", [True, False])
def test_training_enables_determinism(
    deterministic: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    enable = Mock(return_value=deterministic)
    monkeypatch.setattr(train, "enable_determinism", enable)
    config = make_config(make_shards(tmp_path / "data", model), model, tmp_path / "run", iterations=1)
    run_here(config)
    enable.assert_called_once_with("auto", torch.float32, torch.device("cpu"))
    assert sum("in its last bits" in line for line in caplog.messages) == (not deterministic)
