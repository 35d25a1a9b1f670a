"""Which kernel computes attention. Shapes: B batch, N queries, M keys, H heads, d head size."""

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
os.environ.setdefault(
    CUBLAS_WORKSPACE, DETERMINISTIC_WORKSPACES[0]
)  # products in one order; read once, before a process's first one
FLASH_3_MODULE = "flash_attn_interface"  # the module of the package flash-attn-3
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
    """`activate_flash_3`; torch.compile takes its word, where it would trace into a cached function."""
    return activate_flash_3()


@cache
def activate_flash_3() -> bool:
    """Whether torch's flash kernel is FlashAttention-3 from here on: on a Hopper GPU, its package being installed."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    if not hopper or torch.__version__ < "2.11" or find_spec(FLASH_3_MODULE) is None:
        return False
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")  # torch's own gives way
            nn.attention.activate_flash_attention_impl("FA3")
    except (ImportError, OSError, RuntimeError) as error:
        logging.warning("%s is installed but cannot be used (%s); attention runs on cuDNN", FLASH_3_MODULE, error)
        return False
    return True


def choose_kernel(kernel: str, *, half_on_gpu: bool) -> str:
    """The kernel that a name stands for; FlashAttention-3 is flash once `uses_flash_3`."""
    if half_on_gpu and kernel in ("auto", "flash") and uses_flash_3():
        return "flash"
    if kernel == "auto":
        return "cudnn" if half_on_gpu else "torch"
    return kernel


def enable_determinism(kernel: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Make a GPU's sums have one order, so that a resumed run has the bits of an unbroken one; whether they have.

    On cuDNN attention's have none (torch 2.11, also where it is asked), so torch may not insist. ValueError where the
    environment rules an order out.
    """
    if device.type != "cuda":
        return True
    if os.environ[CUBLAS_WORKSPACE] not in DETERMINISTIC_WORKSPACES:
        raise ValueError(
            f"{CUBLAS_WORKSPACE}={os.environ[CUBLAS_WORKSPACE]}: products have no order so; unset it, or {DETERMINISTIC_WORKSPACES[0]}"
        )
    deterministic = choose_kernel(kernel, half_on_gpu=dtype.itemsize == 2) != "cudnn"
    warnings.filterwarnings("ignore", "cuDNN Attention defaults to a non-deterministic algorithm")  # it has no other
    torch.use_deterministic_algorithms(True, warn_only=not deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return deterministic


def check_kernel(kernel: str, head_size: int, dtype: torch.dtype, device: torch.device) -> None:
    """ValueError where a kernel cannot attend, backward pass included, with heads of `size` on a device."""
    x = torch.zeros(1, 128, 1, head_size, dtype=dtype, device=device, requires_grad=True)
    try:
        dot_product_attention(x, x, x, kernel).sum().backward()
    except RuntimeError as error:
        heads, cause = f"heads of {head_size} in {str(dtype).removeprefix('torch.')}", str(error).partition(".")[0]
        raise ValueError(f"attention={kernel}: no kernel for {heads} on {device.type} ({cause}); use torch") from error


def dot_product_attention(query: Tensor, key: Tensor, value: Tensor, kernel: str, *, last_key_count: int = 1) -> Tensor:
    """Softmax attention of query (B N H d) over key and value (B M H d): (B N H*d), in the inputs' dtype.

    The last of the M counts as `last_key_count` equal ones: log(count) on its logit, for which only torch has a kernel.
    `auto` is, in bf16 on a GPU, FlashAttention-3 where it is installed, else cuDNN; elsewhere torch's own choice.
    """
    backend = choose_kernel(kernel, half_on_gpu=query.is_cuda and query.element_size() == 2)
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if last_key_count > 1:
        bias = query.new_zeros(key.shape[2])
        bias[-1:].fill_(math.log(last_key_count))
        bias = bias.expand(query.shape[2], -1).contiguous()
        out = scaled_dot_product_attention(query, key, value, attn_mask=bias)
    elif backend == "torch":
        out = scaled_dot_product_attention(query, key, value)
    else:
        with sdpa_kernel(SDPA_BACKENDS[backend]):
            out = scaled_dot_product_attention(query, key, value)
    return out.transpose(1, 2).flatten(2)
