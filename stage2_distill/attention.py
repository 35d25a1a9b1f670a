"""Which kernel computes attention. Shapes: B batch, N queries, M keys, H heads, d head size."""

import math

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

KERNELS = {
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


def attend(query: Tensor, key: Tensor, value: Tensor, kernel: str, *, stands_for: int = 1) -> Tensor:
    """Softmax attention of query (B N H d) over key and value (B M H d): (B N H*d), in the inputs' dtype.

    The last of the M counts as `stands_for` equal ones: log(count) on its logit, for which only torch has a kernel.
    `auto` is cuDNN where it can be used (bf16 on a GPU), and torch's own choice elsewhere.
    """
    half_on_gpu = query.is_cuda and query.element_size() == 2
    chosen = ("cudnn" if half_on_gpu else "torch") if kernel == "auto" else kernel
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if stands_for > 1:
        bias = query.new_zeros(key.shape[2])
        bias[-1:].fill_(math.log(stands_for))
        bias = bias.expand(query.shape[2], -1).contiguous()
        out = scaled_dot_product_attention(query, key, value, attn_mask=bias)
    elif chosen == "torch":
        out = scaled_dot_product_attention(query, key, value)
    else:
        with sdpa_kernel(KERNELS[chosen]):
            out = scaled_dot_product_attention(query, key, value)
    return out.transpose(1, 2).flatten(2)
