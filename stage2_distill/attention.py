"""Which kernel computes attention. Shapes: B batch, N queries, M keys, H heads, d head size."""

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def attend(query: Tensor, key: Tensor, value: Tensor, kernel: str) -> Tensor:
    """Softmax attention of query (B N H d) over key and value (B M H d): (B N H*d), in the inputs' dtype.

    `auto` is cuDNN where it can be used (bf16 on a GPU), and torch's own choice elsewhere.
    """
    half_on_gpu = query.is_cuda and query.element_size() == 2
    chosen = ("cudnn" if half_on_gpu else "torch") if kernel == "auto" else kernel
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if chosen == "torch":
        out = scaled_dot_product_attention(query, key, value)
    else:
        with sdpa_kernel(KERNELS[chosen]):
            out = scaled_dot_product_attention(query, key, value)
    return out.transpose(1, 2).flatten(2)
