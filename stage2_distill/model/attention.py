"""The choice of attention kernels. Shapes: B batch, N queries, M keys, H heads, d head size."""

import logging
import math
import os
import warnings
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

CUBLAS_WORKSPACE, DETERMINISTIC_WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
# cuBLAS reads the variable once, before the first product of a process, so it is set at import.
os.environ.setdefault(CUBLAS_WORKSPACE, DETERMINISTIC_WORKSPACES[0])
FLASH_3_MODULE = "flash_attn_interface"  # module of the package flash-attn-3
SDPA_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
ATTENTION_OPS = [
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_attention_math.default,
]


@torch.compiler.assume_constant_result
def uses_flash_3() -> bool:
    """Return `activate_flash_3()` as a constant for torch.compile, which cannot trace the cached function."""
    return activate_flash_3()


@cache
def activate_flash_3() -> bool:
    """Make FlashAttention-3 torch's flash kernel if the GPU is a Hopper and the package works; return whether it is."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    if not hopper or torch.__version__ < "2.11" or find_spec(FLASH_3_MODULE) is None:
        return False
    try:
        with warnings.catch_warnings():
            # torch warns that its own implementation is replaced, which is the purpose.
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            nn.attention.activate_flash_attention_impl("FA3")
    except (ImportError, OSError, RuntimeError) as error:
        logging.warning("%s is installed but cannot be used (%s); attention runs on cuDNN", FLASH_3_MODULE, error)
        return False
    return True


def choose_kernel(kernel: str, *, half_on_gpu: bool) -> str:
    """Resolve `auto` to a kernel name; `flash` is FlashAttention-3 if `uses_flash_3`."""
    if half_on_gpu and kernel in ("auto", "flash") and uses_flash_3():  # the call activates FlashAttention-3
        return "flash"
    if kernel == "auto":
        return "cudnn" if half_on_gpu else "torch"
    return kernel


def kernel_name(kernel: str) -> str:
    """Name of a chosen kernel in the table of speeds, which has a row of its own for FlashAttention-3."""
    return "flash-3" if kernel == "flash" and uses_flash_3() else kernel


def enable_determinism(kernel: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Enable deterministic kernels on a GPU, for exact resumes; return whether attention is deterministic too."""
    if device.type != "cuda":
        return True
    workspace, default = os.environ[CUBLAS_WORKSPACE], DETERMINISTIC_WORKSPACES[0]
    if workspace not in DETERMINISTIC_WORKSPACES:
        raise ValueError(f"{CUBLAS_WORKSPACE}={workspace}: makes cuBLAS non-deterministic; unset it or use {default}")
    # cuDNN has no deterministic backward pass (torch 2.11), so torch may warn but must not raise.
    deterministic = choose_kernel(kernel, half_on_gpu=dtype.itemsize == 2) != "cudnn"
    warnings.filterwarnings("ignore", "cuDNN Attention defaults to a non-deterministic algorithm")
    torch.use_deterministic_algorithms(True, warn_only=not deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs bandwidth
    return deterministic


def check_kernel(kernel: str, head_size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError if a kernel cannot run forward and backward passes with heads of `head_size` on a device."""
    x = torch.zeros(1, 128, 1, head_size, dtype=dtype, device=device, requires_grad=True)
    try:
        dot_product_attention(x, x, x, kernel).sum().backward()
    except RuntimeError as error:
        heads, cause = f"heads of {head_size} in {str(dtype).removeprefix('torch.')}", str(error).partition(".")[0]
        raise ValueError(f"attention={kernel}: no kernel for {heads} on {device.type} ({cause}); use torch") from error


def dot_product_attention(query: Tensor, key: Tensor, value: Tensor, kernel: str, *, last_key_count: int = 1) -> Tensor:
    """Softmax attention of query (B N H d) over key and value (B M H d): (B N H*d), in the inputs' dtype.

    The last key represents `last_key_count` identical keys: log(last_key_count) is added to its logit.
    `auto` in bf16 on a GPU is FlashAttention-3 if it is installed, else cuDNN; otherwise it is torch's own choice.
    """
    backend = choose_kernel(kernel, half_on_gpu=query.is_cuda and query.element_size() == 2)
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if last_key_count > 1:
        bias = query.new_zeros(key.shape[2])
        bias[-1:].fill_(math.log(last_key_count))
        bias = bias.expand(query.shape[2], -1).contiguous()
        # Flash kernels take no bias, so torch chooses one that does, whatever the plan's kernel.
        out = scaled_dot_product_attention(query, key, value, attn_mask=bias)
    elif backend == "torch":
        out = scaled_dot_product_attention(query, key, value)
    else:
        with sdpa_kernel(SDPA_BACKENDS[backend]):
            out = scaled_dot_product_attention(query, key, value)
    return out.transpose(1, 2).flatten(2)
