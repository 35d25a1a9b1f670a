"""Activation checkpointing: what a transformer block keeps for its backward pass, and how it is compiled.

An `ExecutionPlan` chooses one of three strategies: keep everything, keep selected results, or recompute in pieces.
Shapes: B batch, N tokens, K times (1 or 2), D width, L text rows.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from stage2_distill.model import layers
from stage2_distill.model.attention import ATTENTION_OPS
from stage2_distill.offload.activations import ActivationOffloader

FULL, OFFLOAD, SELECTIVE_MLP, OFF = "full", "offload", "selective-mlp", "off"  # the fifth choice is "selective"
BlockFunction: TypeAlias = Callable[..., Tensor]  # (block, x, text, temb, rope, first_frame_tokens) -> x (B N D)


@cache  # all blocks of all roles share the function and therefore its compiled graphs
def block_runner(plan: layers.ExecutionPlan) -> BlockFunction:
    """Return the function that runs a block under a plan."""
    if plan.checkpointing == OFF:
        return keep_everything(plan)
    return recompute_in_pieces(plan) if plan.checkpointing in (FULL, OFFLOAD) else keep_selected(plan)


def keep_everything(plan: layers.ExecutionPlan) -> BlockFunction:
    """Strategy `off`: autograd keeps every activation of the block."""
    compute: BlockFunction = partial(layers.block_forward, plan=plan)
    return layers.maybe_compile(lambda *inputs: compute(*inputs), plan)


def keep_selected(plan: layers.ExecutionPlan) -> BlockFunction:
    """Strategies `selective` and `selective-mlp`: keep what `checkpoint_policy` selects, recompute the rest."""
    compute: BlockFunction = partial(layers.block_forward, plan=plan)
    policy = partial(checkpoint_policy, plan.checkpointing == SELECTIVE_MLP)
    contexts = partial(create_selective_checkpoint_contexts, policy)

    def run_block(*inputs: object) -> Tensor:
        if not torch.is_grad_enabled():
            return compute(*inputs)
        return checkpoint(compute, *inputs, use_reentrant=False, context_fn=contexts)

    return layers.maybe_compile(run_block, plan)


def checkpoint_policy(
    save_feed_forward: bool, _context: object, op: object, *args: Tensor, **_named: object
) -> CheckpointPolicy:
    """Save the result of self-attention, and with `save_feed_forward` that of the feed-forward's second product."""
    # Self-attention is half of a block's arithmetic for one tensor of its size. Attention to text (keys and queries
    # differ in number) is cheap. The feed-forward's result is a fifth of the rest; its gate needs it.
    save = op in ATTENTION_OPS and args[0].shape[-2] == args[1].shape[-2]
    save |= save_feed_forward and op is torch.ops.aten.addmm.default and args[1].shape[-1] > args[2].shape[-1]
    return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE


def recompute_in_pieces(plan: layers.ExecutionPlan) -> BlockFunction:
    """Strategies `full` and `offload`: recompute attention and feed-forward one after the other, each from its input.

    Recomputing both together, also as one compiled graph, would take two and a half times the memory. `offload` keeps
    the inputs in host memory and runs the feed-forward on half of the tokens at a time.
    """
    offloader = ActivationOffloader() if plan.checkpointing == OFFLOAD else None
    attend = partial(layers.attention_part, plan=plan)
    without_gradient = keep_everything(plan)
    attention_piece = layers.maybe_compile(lambda *inputs: checkpoint(attend, *inputs, use_reentrant=False), plan)
    feed_forward_piece = layers.maybe_compile(
        lambda *inputs: checkpoint(layers.feed_forward_part, *inputs, use_reentrant=False), plan
    )

    def run_block(
        block: nn.Module, x: Tensor, text: Tensor, temb: Tensor, rope: layers.RotaryEmbedding, first_frame_tokens: int
    ) -> Tensor:
        if not torch.is_grad_enabled():
            return without_gradient(block, x, text, temb, rope, first_frame_tokens)
        with offloader.saved_tensors(x) if offloader else nullcontext():
            x = attention_piece(block, x, text, temb, rope, first_frame_tokens)
            chunks, outputs = x.chunk(2 if offloader else 1, dim=1), []
            for index, chunk in enumerate(chunks):
                # A tensor, because torch.compile would make one graph per value of a Python number.
                remaining = torch.full((), first_frame_tokens - index * chunks[0].shape[1], device=x.device)
                outputs.append(feed_forward_piece(block, chunk.contiguous(), temb, remaining))
        return torch.cat(outputs, dim=1)

    return run_block
