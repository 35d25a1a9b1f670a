"""Wan's transformer as this project runs it: diffusers' modules and names, forward passes of our own.

A video has two times at most, 0 for a given first frame and one for the rest, so the modulation has two rows (6 D)
and every kernel picks between them; diffusers makes one row a token (B N 6 D). The numbers are the same.
Shapes: B batch, N tokens, G tokens of the given frame, K times (1 or 2), D width, L text rows, H heads, d head size.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import TypeAlias

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention import FeedForward
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformerBlock
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from common.video import TEXT_LENGTH
from stage2_distill.attention import ATTENTION_OPS, attend
from stage2_distill.lift import at_home
from stage2_distill.together import all_parts, attend_together, own_part
from stage2_distill.tokens import Rope, embed, finisher, modulate, per_time, rotate

if torch.cuda.is_available():  # triton comes with torch's CUDA builds only
    from stage2_distill.kernels import linear_gelu, norm_rotate

Run: TypeAlias = Callable[..., Tensor]
KEEP_NONE, KEEP_HOST, KEEP_RESULTS, KEEP_ALL = "none", "host", "results", "all"  # and attention


@dataclass(frozen=True)
class Plan:
    """How blocks are run; no field changes the numbers beyond rounding."""

    kernel: str = "auto"  # of attention
    keep: str = KEEP_ALL  # what a block keeps for its backward pass; the rest is computed again
    compiled: bool = False
    ranks: int = 1  # processes that share the tokens of a video; without gradient only


class Block(WanTransformerBlock):
    """A block whose modulation has one row a time."""

    plan = Plan()

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: Rope,
        given: int | None = None,
    ) -> Tensor:
        """Hidden states (B N D) after attention, text attention and feed-forward; temb: (B K 6 D), `given`: G.

        Without `given` it is diffusers' own forward, with one row of temb a token.
        """
        if given is None:
            return super().forward(hidden_states, encoder_hidden_states, temb, rotary_emb)
        return runner(self.plan)(self, hidden_states, encoder_hidden_states, temb, rotary_emb, given)


class Network(WanTransformer3DModel):
    """The transformer with times (B K); other time tensors take diffusers' own path."""

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, object] | None = None,
    ) -> tuple[Tensor] | object:
        """Velocity (B C T H W), in a tuple, from latents (B C T H W), times (B K) and text (B L D)."""
        if timestep.ndim != 2 or timestep.shape[1] > 2 or return_dict:
            rest = encoder_hidden_states_image, return_dict, attention_kwargs
            return super().forward(hidden_states, timestep, encoder_hidden_states, *rest)
        frames, height, width = (s // p for s, p in zip(hidden_states.shape[2:], self.config.patch_size, strict=True))
        given = height * width if timestep.shape[1] == 2 else 0
        rope = self.rope(hidden_states)
        rope = rope[0][..., 0::2].contiguous(), rope[1][..., 1::2].contiguous()
        x = embed(self.patch_embedding, hidden_states)
        temb, modulation, text, _ = self.condition_embedder(
            timestep.flatten(), encoder_hidden_states, timestep_seq_len=timestep.shape[1]
        )
        modulation = rearrange(modulation, "b k (m d) -> b k m d", m=6)
        ranks = self.blocks[0].plan.ranks
        if ranks > 1:
            own = own_part(x.shape[1], ranks)
            x, rope, given = x[:, own], (rope[0][:, own], rope[1][:, own]), max(0, given - own.start)
        for block in self.blocks:
            x = block(x, text, modulation, rope, given)
        rows = self.scale_shift_table[:, None] + temb[:, :, None]
        x = self.proj_out(finisher(self.blocks[0].plan.compiled)(self.norm_out, x, rows, given))
        if ranks > 1:
            x = all_parts(x, ranks)
        patch = dict(zip(("pt", "ph", "pw"), self.config.patch_size, strict=True))
        pattern = "b (t h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)"
        return (rearrange(x, pattern, t=frames, h=height, w=width, **patch),)


Network.__name__ = WanTransformer3DModel.__name__  # save_pretrained writes it, and diffusers must find its class


def adopt(net: WanTransformer3DModel, plan: Plan | None = None) -> Network:
    """Give a diffusers transformer these forward passes, in place: the same modules, parameters and names."""
    net.__class__ = Network
    for block in net.blocks:
        block.__class__ = Block
        block.plan = plan or Plan()
    return net


def placed(norm: nn.RMSNorm, x: Tensor, heads: int, rope: Rope | None) -> Tensor:
    """Queries or keys x (B N D), normalised over all heads and turned by their place: (B N H d)."""
    split = partial(rearrange, pattern="b n (h d) -> b n h d", h=heads)
    if rope is None:
        return split(norm(x))
    if x.is_cuda and not torch.is_grad_enabled():
        return split(norm_rotate(x, norm.weight, *rope, norm.eps))
    return rotate(split(norm(x)), rope)


def attention(module: WanAttention, x: Tensor, source: Tensor, rope: Rope | None, plan: Plan) -> Tensor:
    """Attention of x (B N D) over `source` (B M D).

    Without rope the source is text: of fewer than 512 rows the last one stands for all the zero rows left out.
    """
    query = placed(module.norm_q, module.to_q(x), module.heads, rope)
    key = placed(module.norm_k, module.to_k(source), module.heads, rope)
    value = rearrange(module.to_v(source), "b n (h d) -> b n h d", h=module.heads)
    if rope is not None and plan.ranks > 1:
        return module.to_out[0](attend_together(query, key, value, plan.kernel, plan.ranks))
    stands_for = 1 if rope is not None else TEXT_LENGTH - source.shape[1] + 1
    return module.to_out[0](attend(query, key, value, plan.kernel, stands_for=stands_for))


def feed_forward(ffn: FeedForward, x: Tensor) -> Tensor:
    """The feed-forward of a block on x (B N D)."""
    up, down = ffn.net[0].proj, ffn.net[2]
    if x.is_cuda and not torch.is_grad_enabled() and type(up) is nn.Linear:  # an adapter adds to a layer's result
        return down(linear_gelu(x, up.weight, up.bias))
    return ffn(x)


def rows_of(block: WanTransformerBlock, temb: Tensor) -> tuple[Tensor, ...]:
    """Shift, scale and gate of self-attention and of the feed-forward, six of (B K D) float32; temb: (B K 6 D)."""
    return (block.scale_shift_table[:, None] + temb.float()).unbind(2)


def attention_part(
    block: WanTransformerBlock, x: Tensor, text: Tensor, temb: Tensor, rope: Rope, given: int, plan: Plan
) -> Tensor:
    """A block's attention to the video and to the text: x (B N D), text (B L D) -> (B N D)."""
    shift, scale, gate, *_ = rows_of(block, temb)
    y = modulate(block.norm1(x.float()), shift, scale, given).type_as(x)
    y = attention(block.attn1, y, y, rope, plan)
    x = (x.float() + y * per_time(gate, x.shape[1], given)).type_as(x)
    y = block.norm2(x.float()).type_as(x)
    return x + attention(block.attn2, y, text, None, plan)


def feed_forward_part(block: WanTransformerBlock, x: Tensor, temb: Tensor, given: int | Tensor) -> Tensor:
    """A block's feed-forward: x (B N D) -> (B N D)."""
    *_, shift, scale, gate = rows_of(block, temb)
    y = feed_forward(block.ffn, modulate(block.norm3(x.float()), shift, scale, given).type_as(x))
    return (x.float() + y.float() * per_time(gate, x.shape[1], given)).type_as(x)


def block_forward(
    block: WanTransformerBlock, x: Tensor, text: Tensor, temb: Tensor, rope: Rope, given: int, plan: Plan
) -> Tensor:
    """One block: x (B N D), text (B L D), temb (B K 6 D) -> (B N D). Norms and modulation are float32."""
    x = attention_part(block, x, text, temb, rope, given, plan)
    return feed_forward_part(block, x, temb, given)


def policy(results: bool, _context: object, op: object, *args: Tensor, **_named: object) -> CheckpointPolicy:
    """Keep self-attention: half of a block's arithmetic, one tensor of its size. Attention to text is cheap.

    With `results` the feed-forward's too: its gate needs it, and it is a fifth of the rest for one more tensor.
    """
    kept = op in ATTENTION_OPS and args[0].shape[-2] == args[1].shape[-2]
    kept |= results and op is torch.ops.aten.addmm.default and args[1].shape[-1] > args[2].shape[-1]
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


@cache
def runner(plan: Plan) -> Run:
    """The function (block, *inputs) -> x of a plan; all blocks of all roles share it, and its compiled graphs."""
    compute = partial(block_forward, plan=plan)
    contexts = partial(create_selective_checkpoint_contexts, partial(policy, plan.keep == KEEP_RESULTS))

    def run(block: Block, x: Tensor, text: Tensor, temb: Tensor, rope: Rope, given: int) -> Tensor:
        inputs = (block, x, text, temb, rope, given)
        if plan.keep == KEEP_ALL or not torch.is_grad_enabled():
            return compute(*inputs)
        return checkpoint(compute, *inputs, use_reentrant=False, context_fn=contexts)

    whole = compiled(run, plan)
    return in_pieces(whole, plan) if plan.keep in (KEEP_NONE, KEEP_HOST) else whole


def in_pieces(whole: Run, plan: Plan) -> Run:
    """With gradient: pieces that are computed again one after the other, each from its own input.

    Together they would need two and a half times the memory, also as one compiled graph, which mixes them. With inputs
    in host memory the feed-forward takes half of the tokens at a time.
    """
    count = 2 if plan.keep == KEEP_HOST else 1
    attend_part = partial(attention_part, plan=plan)
    first = compiled(lambda *inputs: checkpoint(attend_part, *inputs, use_reentrant=False), plan)
    second = compiled(lambda *inputs: checkpoint(feed_forward_part, *inputs, use_reentrant=False), plan)

    def run(block: Block, x: Tensor, text: Tensor, temb: Tensor, rope: Rope, given: int) -> Tensor:
        if not torch.is_grad_enabled():
            return whole(block, x, text, temb, rope, given)
        with at_home(x) if plan.keep == KEEP_HOST else nullcontext():
            x = first(block, x, text, temb, rope, given)
            done = []
            for part in x.chunk(count, dim=1):
                here = torch.full((), given, device=x.device)  # a number would be a graph of its own
                done.append(second(block, part.contiguous(), temb, here))
                given -= part.shape[1]
        return torch.cat(done, dim=1)

    return run


def compiled(run: Run, plan: Plan) -> Run:
    """A function as it is or compiled."""
    return torch.compile(run, dynamic=False, fullgraph=True) if plan.compiled else run
