"""The VAE's decoder for speed, from diffusers' own weights: latents in, frames out as they are made.

Activations lie as (F X Y C), channels last. The normalisation before a causal convolution writes behind the two frames
that this one remembers, into one piece of memory that all share: nothing is concatenated or padded. A video goes
through in steps of a few latent frames; its first one is a step of its own, as in training.
Shapes: F frames, X Y height and width, C channels, N channels out.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from stage1_encode.models.vae_ops import TINY, Plan, Ways, fold

Part: TypeAlias = Any  # a module of diffusers', whose parts are named as there
PAST = 2  # frames that a causal convolution remembers


class Desk:
    """One piece of memory that every convolution lays its input on, one after the other."""

    def __init__(self) -> None:
        self.memory = torch.empty(0)

    def take(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """All of it that a tensor of this shape needs; what lay there is lost."""
        count = math.prod(shape)
        if len(self.memory) < count:
            self.memory = like.new_empty(count)
        return self.memory[:count].view(shape)


class Conv(nn.Module):
    """A convolution with folded weights, and the last frames of its input."""

    def __init__(self, conv: nn.Conv3d | nn.Conv2d, ways: Ways, desk: Desk, plan: Plan) -> None:
        super().__init__()
        weight = conv.weight if conv.weight.dim() == 5 else conv.weight.unsqueeze(2)
        assert conv.bias is not None
        extra = plan.outputs * plan.time - len(weight)  # columns that only fill up a tile
        weight = functional.pad(weight, (0, 0) * 4 + (0, extra))
        self.weight = nn.Parameter(fold(weight.detach(), plan), requires_grad=False)
        self.bias = nn.Parameter(functional.pad(conv.bias.detach(), (0, extra)), requires_grad=False)
        self.ways, self.plan, self.bare = ways, plan, replace(plan, repeats=0)
        self.desk = desk
        self.past: Tensor | None = None  # (2 X Y C); None = the video begins
        self.input: Tensor | None = None  # on the desk

    def forget(self) -> None:
        """Begin a new video."""
        self.past = None

    def room(self, x: Tensor) -> Tensor:
        """Where as many new frames as x (F X Y .) has are to be written, (F X Y C), before anything else is."""
        self.input = self.desk.take((PAST + len(x), *x.shape[1:3], self.plan.channels), x)
        if self.past is None:
            self.input[:PAST].zero_()
        else:
            self.input[:PAST].copy_(self.past)
        return self.input[PAST:]

    def convolve(self, x: Tensor, residual: Tensor | None, skip: int = 0) -> Tensor:
        """Convolve x, and add a residual whose first `skip` output frames are left out."""
        plan = self.bare if residual is None else self.plan
        return self.ways.convolve(x, self.weight, self.bias, plan, residual=residual, skip=skip)

    def forward(self, residual: Tensor | None = None) -> Tensor:
        """Convolve the new frames that were written, (F X Y N), and remember the last ones."""
        assert self.input is not None
        out, self.past, self.input = self.convolve(self.input, residual), self.input[-PAST:].clone(), None
        return out


def conv_plan(conv: nn.Conv3d, *, residual: bool = False) -> Plan:
    """The plan of a 3x3x3 convolution."""
    outputs = conv.out_channels
    return Plan(conv.in_channels, outputs, columns=min(256, outputs), repeats=int(residual))


class Block(nn.Module):
    """A residual block."""

    def __init__(self, block: Part, ways: Ways, desk: Desk) -> None:
        super().__init__()
        self.ways = ways
        self.first_scale, self.second_scale = scale(block.norm1), scale(block.norm2)
        self.first = Conv(block.conv1, ways, desk, conv_plan(block.conv1))
        self.second = Conv(block.conv2, ways, desk, conv_plan(block.conv2, residual=True))
        self.shortcut = point(block.conv_shortcut) if isinstance(block.conv_shortcut, nn.Conv3d) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(F X Y C) -> (F X Y N)."""
        self.ways.norm(x, self.first_scale, self.first.room(x))
        hidden = self.first()
        self.ways.norm(hidden, self.second_scale, self.second.room(hidden))
        return self.second(self.shortcut(x))


class Attention(nn.Module):
    """Self-attention with one head within each frame."""

    def __init__(self, block: Part) -> None:
        super().__init__()
        self.scale, self.inner, self.outer = scale(block.norm), point(block.to_qkv), point(block.proj)

    def forward(self, x: Tensor) -> Tensor:
        """(F X Y C) -> the same."""
        normal = functional.rms_norm(x, self.scale.shape, self.scale, TINY)
        query, key, value = rearrange(self.inner(normal), "f x y (k c) -> k f (x y) c", k=3)
        mixed = functional.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])
        return x + self.outer(mixed.reshape(x.shape))


class Up(nn.Module):
    """A level: residual blocks, then twice the size, and in some levels twice the frames, around a shortcut."""

    def __init__(self, block: Part, ways: Ways, desk: Desk) -> None:
        super().__init__()
        self.ways = ways
        self.blocks = nn.Sequential(*(Block(resnet, ways, desk) for resnet in block.resnets))
        self.time: Conv | None = None
        self.space: Conv | None = None
        if block.upsampler is None:
            return
        conv, doubled = block.upsampler.resample[1], block.upsampler.mode == "upsample3d"
        channels, outputs = conv.in_channels, conv.out_channels
        columns = min(256, outputs)
        if doubled:
            plan = Plan(channels, channels, side=1, columns=min(256, channels), time=2)
            self.time = Conv(block.upsampler.time_conv, ways, desk, plan)
        self.space = Conv(conv, ways, desk, Plan(
            channels, outputs, depth=1, side=2, columns=columns, space=2,
            repeats=block.avg_shortcut.repeats, halves=2 if doubled else 1,
        ))  # fmt: skip

    def forward(self, x: Tensor, *, first: bool) -> Tensor:
        """(F X Y C) -> (F' X' Y' N); the first frame of a video is not doubled."""
        y = self.blocks(x)
        if self.space is None:
            return y
        if self.time is not None and not first:
            self.time.room(y).copy_(y)
            y = self.time()
        return self.space.convolve(y, x, int(first and self.time is not None))


def scale(norm: Part) -> nn.Parameter:
    """Gamma (C) of a normalisation."""
    return nn.Parameter(norm.gamma.detach().flatten(), requires_grad=False)


def point(conv: nn.Conv3d | nn.Conv2d) -> nn.Linear:
    """A convolution that sees one place only, as a linear layer over C."""
    assert conv.bias is not None
    layer = nn.Linear(conv.in_channels, conv.out_channels, device="meta")
    layer.weight = nn.Parameter(conv.weight.detach().flatten(1), requires_grad=False)
    layer.bias = nn.Parameter(conv.bias.detach(), requires_grad=False)
    return layer


class Decoder(nn.Module):
    """Latent frames in, pixel frames out; it remembers the frames before them."""

    def __init__(self, model: Part, ways: Ways) -> None:
        super().__init__()
        decoder = model.decoder
        self.ways, self.patch, self.desk = ways, model.config.patch_size or 1, Desk()
        self.colours = decoder.conv_out.out_channels
        self.enter = point(model.post_quant_conv)
        self.conv_in = Conv(decoder.conv_in, ways, self.desk, conv_plan(decoder.conv_in))
        middle = decoder.mid_block
        self.middle = nn.Sequential(
            Block(middle.resnets[0], ways, self.desk),
            Attention(middle.attentions[0]),
            Block(middle.resnets[1], ways, self.desk),
        )
        self.ups = nn.ModuleList(Up(block, ways, self.desk) for block in decoder.up_blocks)
        self.scale = scale(decoder.norm_out)
        outputs = -(-self.colours // 16) * 16
        plan = Plan(decoder.conv_out.in_channels, outputs, columns=outputs)
        self.conv_out = Conv(decoder.conv_out, ways, self.desk, plan)

    def forget(self) -> None:
        """Begin a new video."""
        for module in self.modules():
            if isinstance(module, Conv):
                module.forget()

    def release(self) -> None:
        """Give all memory back, until the next video."""
        self.forget()
        self.desk.memory = torch.empty(0)

    def forward(self, z: Tensor, *, first: bool) -> Tensor:
        """Frames (F X Y 3), not clamped, of latent frames (T H W C) that follow those given before."""
        self.conv_in.room(z).copy_(self.enter(z))
        x = self.middle(self.conv_in())
        for up in self.ups:
            x = up(x, first=first)
        self.ways.norm(x, self.scale, self.conv_out.room(x))
        cells = self.conv_out()[..., : self.colours]
        return rearrange(cells, "f x y (c q p) -> f (x p) (y q) c", p=self.patch, q=self.patch)


def steps(frames: int, most: int) -> list[range]:
    """The latent frames of a video step by step: the first alone, then as many at once as divide the rest evenly.

    The last of them come singly again: what is shown last is all that a film's encoder still has to do then.
    """
    rest = frames - 1
    size = next((size for size in range(most, 0, -1) if rest % size == 0), 1)
    singly = max(1, frames - size)
    whole = [range(start, start + size) for start in range(1, singly, size)]
    return [range(1), *whole, *(range(place, place + 1) for place in range(singly, frames))]


@torch.inference_mode()
def stream(decoder: Decoder, z: Tensor, *, most: int) -> Iterator[Tensor]:
    """Pixels (F X Y 3) uint8 of raw latents (C T H W), as they are made, `most` latent frames at once."""
    decoder.forget()
    cells = rearrange(z, "c t h w -> t h w c")
    for part in steps(len(cells), most):
        frames = decoder(cells[part.start : part.stop].contiguous(), first=part.start == 0)
        yield ((frames.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
