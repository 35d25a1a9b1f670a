"""The layers of Wan's transformer: tokens, rotary positions, modulation, attention and feed-forward of a block.

Modulation has one row per time, not per token: K is 2 if the first frame is given (time 0, then the video's), else 1.
Shapes: B batch, N tokens, K times (1 or 2), D width, L text rows, M keys, H heads, d head size, C channels,
T H W latent size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import TypeAlias

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformerBlock
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import linear

from common.video import TEXT_LENGTH
from stage2_distill.low_precision.fp8_linear import computes_in_fp8, fp8_feed_forward, prepare_input
from stage2_distill.model.attention import dot_product_attention
from stage2_distill.model.context_parallel import ulysses_attention

if torch.cuda.is_available():  # triton comes with torch's CUDA builds only
    from stage2_distill.model.fused_kernels import linear_gelu, rms_norm_rope

MAX_GRAPHS = 128  # of one function

RotaryEmbedding: TypeAlias = tuple[Tensor, Tensor]  # cos and sin (1 N 1 d/2) float32


@dataclass(frozen=True)
class ExecutionPlan:
    """How blocks are run; no field changes the numbers beyond rounding."""

    kernel: str = "auto"  # of attention
    checkpointing: str = "off"  # which activations are recomputed in the backward pass: see activation_checkpoint.py
    compiled: bool = False
    ranks: int = 1  # processes that share the tokens of a video; only without gradient


def modulation_per_token(rows: Tensor, tokens: int, first_frame_tokens: int | Tensor) -> Tensor:
    """The row of each token, (B N D) or (B 1 D), from rows (B K D): the first for the first frame, then the last."""
    if rows.shape[1] == 1:
        return rows
    first = torch.arange(tokens, device=rows.device)[:, None] < first_frame_tokens
    return torch.where(first, rows[:, :1], rows[:, 1:])


def modulate(x: Tensor, shift: Tensor, scale: Tensor, first_frame_tokens: int | Tensor) -> Tensor:
    """x (B N D) * (1 + scale) + shift, with rows (B K D)."""
    factor = 1 + modulation_per_token(scale, x.shape[1], first_frame_tokens)
    return x * factor + modulation_per_token(shift, x.shape[1], first_frame_tokens)


def apply_rotary_emb(x: Tensor, rope: RotaryEmbedding) -> Tensor:
    """Rotate the pairs of x (B N H d) by the angles of their positions, in float32 (RoFormer, arXiv 2104.09864)."""
    cos, sin = rope
    first, second = rearrange(x, "b n h (p two) -> two b n h p", two=2)
    return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2).type_as(x)


def embed_patches(patches: nn.Conv3d, latents: Tensor) -> Tensor:
    """Tokens (B N D) of latents (B C T H W)."""
    pt, ph, pw = patches.kernel_size
    # Patches do not overlap, so one matrix product does it; a convolution would copy its result to another layout.
    rows = rearrange(latents, "b c (t pt) (h ph) (w pw) -> b (t h w) (c pt ph pw)", pt=pt, ph=ph, pw=pw)
    return linear(rows, patches.weight.flatten(1), patches.bias)


def final_norm(norm: nn.Module, x: Tensor, rows: Tensor, first_frame_tokens: int) -> Tensor:
    """x (B N D) normalised and modulated in float32 by rows (B K 2 D): shift and scale."""
    shift, scale = rows.unbind(2)
    return modulate(norm(x.float()), shift, scale, first_frame_tokens).type_as(x)


@cache  # a function keeps its compiled form, and with it the graphs
def maybe_compile(function: Callable[..., Tensor], plan: ExecutionPlan) -> Callable[..., Tensor]:
    """Return the function, compiled if the plan says so: one graph per shape, each made at its first use."""
    if not plan.compiled:
        return function
    # A shape has about four graphs: with and without gradient, and of the teacher's two branches. torch refuses more
    # than 8 of a function, so that inputs that never repeat are noticed; shapes do repeat.
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, MAX_GRAPHS)
    return torch.compile(function, dynamic=False, fullgraph=True)


def norm_and_rope(norm: nn.RMSNorm, x: Tensor, heads: int, rope: RotaryEmbedding | None) -> Tensor:
    """Queries or keys x (B N D), normalised over all heads and rotated by position: (B N H d)."""
    split_heads = partial(rearrange, pattern="b n (h d) -> b n h d", h=heads)
    if rope is None:
        return split_heads(norm(x))
    if x.is_cuda and not torch.is_grad_enabled():  # the fused kernel has no backward pass
        return split_heads(rms_norm_rope(x, norm.weight, *rope, norm.eps))
    return apply_rotary_emb(split_heads(norm(x)), rope)


def attention_layer(
    module: WanAttention, x: Tensor, source: Tensor, rope: RotaryEmbedding | None, plan: ExecutionPlan
) -> Tensor:
    """Attention of x (B N D) over `source` (B M D); without rope the source is text."""
    own = prepare_input(module.to_q, x)  # x itself, unless the layers compute in 8 bits
    other = own if source is x else prepare_input(module.to_k, source)
    query = norm_and_rope(module.norm_q, module.to_q(own), module.heads, rope)
    key = norm_and_rope(module.norm_k, module.to_k(other), module.heads, rope)
    value = rearrange(module.to_v(other), "b n (h d) -> b n h d", h=module.heads)
    if rope is not None and plan.ranks > 1:
        return module.to_out[0](ulysses_attention(query, key, value, plan.kernel, plan.ranks))
    # Wan pads text to 512 rows. All zero rows have one key and value, so the last of fewer rows stands for the rest.
    last_key_count = 1 if rope is not None else TEXT_LENGTH - source.shape[1] + 1
    return module.to_out[0](dot_product_attention(query, key, value, plan.kernel, last_key_count=last_key_count))


def feed_forward(ffn: FeedForward, x: Tensor) -> Tensor:
    """The feed-forward of a block on x (B N D)."""
    up, down = ffn.net[0].proj, ffn.net[2]
    if computes_in_fp8(up):
        return fp8_feed_forward(up, down, x)
    if x.is_cuda and not torch.is_grad_enabled() and type(up) is nn.Linear:  # a LoRA layer adds to the product
        return down(linear_gelu(x, up.weight, up.bias))
    return ffn(x)


def block_modulation(block: WanTransformerBlock, temb: Tensor) -> tuple[Tensor, ...]:
    """Shift, scale and gate of self-attention and of the feed-forward, six of (B K D) float32; temb: (B K 6 D)."""
    return (block.scale_shift_table[:, None] + temb.float()).unbind(2)


def attention_part(
    block: WanTransformerBlock,
    x: Tensor,
    text: Tensor,
    temb: Tensor,
    rope: RotaryEmbedding,
    first_frame_tokens: int,
    plan: ExecutionPlan,
) -> Tensor:
    """A block's attention to the video and to the text: x (B N D), text (B L D) -> (B N D)."""
    shift, scale, gate, *_ = block_modulation(block, temb)
    y = modulate(block.norm1(x.float()), shift, scale, first_frame_tokens).type_as(x)
    y = attention_layer(block.attn1, y, y, rope, plan)
    x = (x.float() + y * modulation_per_token(gate, x.shape[1], first_frame_tokens)).type_as(x)
    y = block.norm2(x.float()).type_as(x)
    return x + attention_layer(block.attn2, y, text, None, plan)


def feed_forward_part(block: WanTransformerBlock, x: Tensor, temb: Tensor, first_frame_tokens: int | Tensor) -> Tensor:
    """A block's feed-forward: x (B N D) -> (B N D)."""
    *_, shift, scale, gate = block_modulation(block, temb)
    y = feed_forward(block.ffn, modulate(block.norm3(x.float()), shift, scale, first_frame_tokens).type_as(x))
    return (x.float() + y.float() * modulation_per_token(gate, x.shape[1], first_frame_tokens)).type_as(x)


def block_forward(
    block: WanTransformerBlock,
    x: Tensor,
    text: Tensor,
    temb: Tensor,
    rope: RotaryEmbedding,
    first_frame_tokens: int,
    plan: ExecutionPlan,
) -> Tensor:
    """One block: x (B N D), text (B L D), temb (B K 6 D) -> (B N D). Norms and modulation are float32."""
    x = attention_part(block, x, text, temb, rope, first_frame_tokens, plan)
    return feed_forward_part(block, x, temb, first_frame_tokens)
