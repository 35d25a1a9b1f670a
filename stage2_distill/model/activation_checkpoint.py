"""Activation checkpointing: what a block keeps for its backward pass, and how it is compiled.

Shapes: B batch, N tokens, K times (1 or 2), D width, L text rows.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from stage2_distill.model.attention import ATTENTION_OPS
from stage2_distill.model.layers import (
    KEEP_ALL,
    KEEP_HOST,
    KEEP_NONE,
    KEEP_RESULTS,
    ExecutionPlan,
    RotaryEmbedding,
    attention_part,
    block_forward,
    feed_forward_part,
)
from stage2_distill.offload.activations import ActivationOffloader

BlockFunction: TypeAlias = Callable[..., Tensor]


def checkpoint_policy(
    save_feed_forward: bool, _context: object, op: object, *args: Tensor, **_named: object
) -> CheckpointPolicy:
    """Keep self-attention: half of a block's arithmetic, one tensor of its size. Attention to text is cheap.

    With `results` the feed-forward's too: its gate needs it, and it is a fifth of the rest for one more tensor.
    """
    save = op in ATTENTION_OPS and args[0].shape[-2] == args[1].shape[-2]
    save |= save_feed_forward and op is torch.ops.aten.addmm.default and args[1].shape[-1] > args[2].shape[-1]
    return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE


@cache
def block_runner(plan: ExecutionPlan) -> BlockFunction:
    """The function (block, *inputs) -> x of a plan; all blocks of all roles share it, and its compiled graphs."""
    compute = partial(block_forward, plan=plan)
    contexts = partial(
        create_selective_checkpoint_contexts, partial(checkpoint_policy, plan.checkpointing == KEEP_RESULTS)
    )

    def run_block(block: nn.Module, x: Tensor, text: Tensor, temb: Tensor, rope: RotaryEmbedding, given: int) -> Tensor:
        inputs = (block, x, text, temb, rope, given)
        if plan.checkpointing == KEEP_ALL or not torch.is_grad_enabled():
            return compute(*inputs)
        return checkpoint(compute, *inputs, use_reentrant=False, context_fn=contexts)

    one_piece = maybe_compile(run_block, plan)
    return checkpoint_in_pieces(one_piece, plan) if plan.checkpointing in (KEEP_NONE, KEEP_HOST) else one_piece


def checkpoint_in_pieces(one_piece: BlockFunction, plan: ExecutionPlan) -> BlockFunction:
    """With gradient: pieces that are computed again one after the other, each from its own input.

    Together they would need two and a half times the memory, also as one compiled graph, which mixes them. With inputs
    in host memory the feed-forward takes half of the tokens at a time.
    """
    count = 2 if plan.checkpointing == KEEP_HOST else 1
    offloader = ActivationOffloader()
    attend_part = partial(attention_part, plan=plan)
    attention_piece = maybe_compile(lambda *inputs: checkpoint(attend_part, *inputs, use_reentrant=False), plan)
    feed_forward_piece = maybe_compile(
        lambda *inputs: checkpoint(feed_forward_part, *inputs, use_reentrant=False), plan
    )

    def run_block(block: nn.Module, x: Tensor, text: Tensor, temb: Tensor, rope: RotaryEmbedding, given: int) -> Tensor:
        if not torch.is_grad_enabled():
            return one_piece(block, x, text, temb, rope, given)
        with offloader.saved_tensors(x) if plan.checkpointing == KEEP_HOST else nullcontext():
            x = attention_piece(block, x, text, temb, rope, given)
            done = []
            for part in x.chunk(count, dim=1):
                here = torch.full((), given, device=x.device)  # a number would be a graph of its own
                done.append(feed_forward_piece(block, part.contiguous(), temb, here))
                given -= part.shape[1]
        return torch.cat(done, dim=1)

    return run_block


def maybe_compile(run: BlockFunction, plan: ExecutionPlan) -> BlockFunction:
    """A function as it is or compiled."""
    return torch.compile(run, dynamic=False, fullgraph=True) if plan.compiled else run
