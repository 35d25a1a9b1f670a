"""Context parallelism: each GPU holds a part of one video's tokens, and in attention all tokens of a part of the heads.

Attention is local to a head and everything else to a token, so the ranks exchange data only before and after attention
(DeepSpeed Ulysses, arXiv 2309.14509). All ranks of the process group take part. Inference only: no gradient passes.
Shapes: B batch, N tokens, n = N / ranks, H heads, h = H / ranks, D width, d head size, W ranks.
"""

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

from stage2_distill.model.attention import dot_product_attention


@torch.library.custom_op("ti2v::exchange", mutates_args=())  # one opaque node for torch.compile
def all_to_all(x: Tensor) -> Tensor:
    """Send part w of x (W ...) to rank w; return the parts received from ranks 0..W-1 (W ...)."""
    x = x.contiguous()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x)
    return out


@all_to_all.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def ulysses_attention(query: Tensor, key: Tensor, value: Tensor, kernel: str, ranks: int) -> Tensor:
    """Attention of this rank's queries over the keys and values of all ranks: (B n H d) each -> (B n H*d)."""
    # Send each rank its heads of the local tokens; receive the own heads of all tokens, in one exchange for q, k and v.
    parts = rearrange(torch.stack([query, key, value]), "q b n (w h) d -> w q b n h d", w=ranks)
    query, key, value = rearrange(all_to_all(parts), "w q b n h d -> q b (w n) h d")
    out = dot_product_attention(query, key, value, kernel)
    parts = rearrange(out, "b (w n) hd -> w b n hd", w=ranks)  # and back: all heads of the local tokens
    return rearrange(all_to_all(parts), "w b n hd -> b n (w hd)")


def local_token_slice(tokens: int, ranks: int) -> slice:
    """Slice of the tokens that this rank holds."""
    assert not torch.is_grad_enabled() and dist.get_world_size() == ranks and tokens % ranks == 0, (tokens, ranks)
    size = tokens // ranks
    return slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)


def gather_tokens(x: Tensor, ranks: int) -> Tensor:
    """All tokens (B N D) from each rank's own x (B n D)."""
    out = x.new_empty((ranks * len(x), *x.shape[1:]))  # the collective concatenates along the first dimension
    dist.all_gather_into_tensor(out, x.contiguous())
    return rearrange(out, "(w b) n d -> b (w n) d", w=ranks)


def check_context_parallel(ranks: int, *, tokens: int, heads: int) -> None:
    """Raise ValueError if the tokens or the heads cannot be divided among the ranks."""
    if tokens % ranks or heads % ranks:
        divisors = [n for n in range(1, ranks + 1) if tokens % n == 0 and heads % n == 0]
        raise ValueError(
            f"{ranks} processes cannot share one video: its {tokens} tokens and the network's {heads} heads must "
            f"divide evenly; give torchrun {' or '.join(map(str, divisors[-2:]))}"
        )
