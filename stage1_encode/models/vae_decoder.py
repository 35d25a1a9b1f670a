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

from stage1_encode.models.vae_ops import NORM_EPS, ConvSpec, KernelBackend, fold_weight

DiffusersModule: TypeAlias = Any  # a module of diffusers', whose parts are named as there
CACHED_FRAMES = 2  # frames that a causal convolution remembers


class Workspace:
    """One piece of memory that every convolution lays its input on, one after the other."""

    def __init__(self) -> None:
        self.memory = torch.empty(0)

    def reserve_buffer(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """All of it that a tensor of this shape needs; what lay there is lost."""
        count = math.prod(shape)
        if len(self.memory) < count:
            self.memory = like.new_empty(count)
        return self.memory[:count].view(shape)


class FoldedConv(nn.Module):
    """A convolution with folded weights, and the last frames of its input."""

    def __init__(
        self, conv: nn.Conv3d | nn.Conv2d, backend: KernelBackend, workspace: Workspace, spec: ConvSpec
    ) -> None:
        super().__init__()
        weight = conv.weight if conv.weight.dim() == 5 else conv.weight.unsqueeze(2)
        assert conv.bias is not None
        padding_columns = spec.outputs * spec.time - len(weight)  # columns that only fill up a tile
        weight = functional.pad(weight, (0, 0) * 4 + (0, padding_columns))
        self.weight = nn.Parameter(fold_weight(weight.detach(), spec), requires_grad=False)
        self.bias = nn.Parameter(functional.pad(conv.bias.detach(), (0, padding_columns)), requires_grad=False)
        self.backend, self.spec, self.spec_without_residual = backend, spec, replace(spec, repeats=0)
        self.workspace = workspace
        self.cached_frames: Tensor | None = None  # (2 X Y C); None = the video begins
        self.input: Tensor | None = None  # on the desk

    def reset_cache(self) -> None:
        """Begin a new video."""
        self.cached_frames = None

    def input_buffer(self, x: Tensor) -> Tensor:
        """Where as many new frames as x (F X Y .) has are to be written, (F X Y C), before anything else is."""
        self.input = self.workspace.reserve_buffer((CACHED_FRAMES + len(x), *x.shape[1:3], self.spec.channels), x)
        if self.cached_frames is None:
            self.input[:CACHED_FRAMES].zero_()
        else:
            self.input[:CACHED_FRAMES].copy_(self.cached_frames)
        return self.input[CACHED_FRAMES:]

    def convolve(self, x: Tensor, residual: Tensor | None, skip: int = 0) -> Tensor:
        """Convolve x, and add a residual whose first `skip` output frames are left out."""
        spec = self.spec_without_residual if residual is None else self.spec
        return self.backend.convolve(x, self.weight, self.bias, spec, residual=residual, skip=skip)

    def forward(self, residual: Tensor | None = None) -> Tensor:
        """Convolve the new frames that were written, (F X Y N), and remember the last ones."""
        assert self.input is not None
        out, self.cached_frames, self.input = (
            self.convolve(self.input, residual),
            self.input[-CACHED_FRAMES:].clone(),
            None,
        )
        return out


def make_conv_spec(conv: nn.Conv3d, *, residual: bool = False) -> ConvSpec:
    """The plan of a 3x3x3 convolution."""
    outputs = conv.out_channels
    return ConvSpec(conv.in_channels, outputs, columns=min(256, outputs), repeats=int(residual))


class ResidualBlock(nn.Module):
    """A residual block."""

    def __init__(self, block: DiffusersModule, backend: KernelBackend, workspace: Workspace) -> None:
        super().__init__()
        self.backend = backend
        self.first_scale, self.second_scale = norm_scale(block.norm1), norm_scale(block.norm2)
        self.first = FoldedConv(block.conv1, backend, workspace, make_conv_spec(block.conv1))
        self.second = FoldedConv(block.conv2, backend, workspace, make_conv_spec(block.conv2, residual=True))
        self.shortcut = (
            pointwise_linear(block.conv_shortcut) if isinstance(block.conv_shortcut, nn.Conv3d) else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """(F X Y C) -> (F X Y N)."""
        self.backend.norm_silu(x, self.first_scale, self.first.input_buffer(x))
        hidden = self.first()
        self.backend.norm_silu(hidden, self.second_scale, self.second.input_buffer(hidden))
        return self.second(self.shortcut(x))


class FrameAttention(nn.Module):
    """Self-attention with one head within each frame."""

    def __init__(self, block: DiffusersModule) -> None:
        super().__init__()
        self.scale, self.inner, self.outer = (
            norm_scale(block.norm),
            pointwise_linear(block.to_qkv),
            pointwise_linear(block.proj),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(F X Y C) -> the same."""
        normal = functional.rms_norm(x, self.scale.shape, self.scale, NORM_EPS)
        query, key, value = rearrange(self.inner(normal), "f x y (k c) -> k f (x y) c", k=3)
        mixed = functional.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])
        return x + self.outer(mixed.reshape(x.shape))


class UpsampleBlock(nn.Module):
    """A level: residual blocks, then twice the size, and in some levels twice the frames, around a shortcut."""

    def __init__(self, block: DiffusersModule, backend: KernelBackend, workspace: Workspace) -> None:
        super().__init__()
        self.backend = backend
        self.blocks = nn.Sequential(*(ResidualBlock(resnet, backend, workspace) for resnet in block.resnets))
        self.time: FoldedConv | None = None
        self.space: FoldedConv | None = None
        if block.upsampler is None:
            return
        conv, doubles_time = block.upsampler.resample[1], block.upsampler.mode == "upsample3d"
        channels, outputs = conv.in_channels, conv.out_channels
        columns = min(256, outputs)
        if doubles_time:
            spec = ConvSpec(channels, channels, side=1, columns=min(256, channels), time=2)
            self.time = FoldedConv(block.upsampler.time_conv, backend, workspace, spec)
        self.space = FoldedConv(conv, backend, workspace, ConvSpec(
            channels, outputs, depth=1, side=2, columns=columns, space=2,
            repeats=block.avg_shortcut.repeats, halves=2 if doubles_time else 1,
        ))  # fmt: skip

    def forward(self, x: Tensor, *, first: bool) -> Tensor:
        """(F X Y C) -> (F' X' Y' N); the first frame of a video is not doubled."""
        y = self.blocks(x)
        if self.space is None:
            return y
        if self.time is not None and not first:
            self.time.input_buffer(y).copy_(y)
            y = self.time()
        return self.space.convolve(y, x, int(first and self.time is not None))


def norm_scale(norm: DiffusersModule) -> nn.Parameter:
    """Gamma (C) of a normalisation."""
    return nn.Parameter(norm.gamma.detach().flatten(), requires_grad=False)


def pointwise_linear(conv: nn.Conv3d | nn.Conv2d) -> nn.Linear:
    """A convolution that sees one place only, as a linear layer over C."""
    assert conv.bias is not None
    layer = nn.Linear(conv.in_channels, conv.out_channels, device="meta")
    layer.weight = nn.Parameter(conv.weight.detach().flatten(1), requires_grad=False)
    layer.bias = nn.Parameter(conv.bias.detach(), requires_grad=False)
    return layer


class VideoDecoder(nn.Module):
    """Latent frames in, pixel frames out; it remembers the frames before them."""

    def __init__(self, model: DiffusersModule, backend: KernelBackend) -> None:
        super().__init__()
        decoder = model.decoder
        self.backend, self.patch, self.workspace = backend, model.config.patch_size or 1, Workspace()
        self.colours = decoder.conv_out.out_channels
        self.enter = pointwise_linear(model.post_quant_conv)
        self.conv_in = FoldedConv(decoder.conv_in, backend, self.workspace, make_conv_spec(decoder.conv_in))
        mid_block = decoder.mid_block
        self.middle = nn.Sequential(
            ResidualBlock(mid_block.resnets[0], backend, self.workspace),
            FrameAttention(mid_block.attentions[0]),
            ResidualBlock(mid_block.resnets[1], backend, self.workspace),
        )
        self.ups = nn.ModuleList(UpsampleBlock(block, backend, self.workspace) for block in decoder.up_blocks)
        self.scale = norm_scale(decoder.norm_out)
        outputs = -(-self.colours // 16) * 16
        spec = ConvSpec(decoder.conv_out.in_channels, outputs, columns=outputs)
        self.conv_out = FoldedConv(decoder.conv_out, backend, self.workspace, spec)

    def reset_cache(self) -> None:
        """Begin a new video."""
        for module in self.modules():
            if isinstance(module, FoldedConv):
                module.reset_cache()

    def free_memory(self) -> None:
        """Give all memory back, until the next video."""
        self.reset_cache()
        self.workspace.memory = torch.empty(0)

    def forward(self, z: Tensor, *, first: bool) -> Tensor:
        """Frames (F X Y 3), not clamped, of latent frames (T H W C) that follow those given before."""
        self.conv_in.input_buffer(z).copy_(self.enter(z))
        x = self.middle(self.conv_in())
        for up in self.ups:
            x = up(x, first=first)
        self.backend.norm_silu(x, self.scale, self.conv_out.input_buffer(x))
        cells = self.conv_out()[..., : self.colours]
        return rearrange(cells, "f x y (c q p) -> f (x p) (y q) c", p=self.patch, q=self.patch)


def split_latent_frames(frames: int, max_frames: int) -> list[range]:
    """The latent frames of a video step by step: the first alone, then as many at once as divide the rest evenly.

    The last of them come singly again: what is shown last is all that a film's encoder still has to do then.
    """
    remaining = frames - 1
    size = next((size for size in range(max_frames, 0, -1) if remaining % size == 0), 1)
    first_single = max(1, frames - size)
    chunks = [range(start, start + size) for start in range(1, first_single, size)]
    return [range(1), *chunks, *(range(index, index + 1) for index in range(first_single, frames))]


@torch.inference_mode()
def stream_frames(decoder: VideoDecoder, z: Tensor, *, max_frames: int) -> Iterator[Tensor]:
    """Pixels (F X Y 3) uint8 of raw latents (C T H W), as they are made, `most` latent frames at once."""
    decoder.reset_cache()
    cells = rearrange(z, "c t h w -> t h w c")
    for chunk in split_latent_frames(len(cells), max_frames):
        frames = decoder(cells[chunk.start : chunk.stop].contiguous(), first=chunk.start == 0)
        yield ((frames.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
