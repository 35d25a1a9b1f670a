"""A streaming decoder of the Wan VAE, built from the weights of diffusers' decoder: latents in, frames out.

Activations are channels-last, (F X Y C). The normalization before a causal convolution writes directly behind the two
cached frames of that convolution, in one buffer that all convolutions share: nothing is concatenated or padded. A video
is decoded a few latent frames at a time; its first latent frame is a chunk of its own, as in training.
Shapes: F frames, X Y height and width, C channels, N channels out.
"""

import math
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from stage1_encode.models.column_decoder import ColumnDecoder, Reach
from stage1_encode.models.vae_ops import NORM_EPS, ConvSpec, convolve, fold_weight, norm_silu

DiffusersModule: TypeAlias = Any  # diffusers annotates none of the parts that are read here
CACHED_FRAMES = 2  # frames that a causal convolution of three taps remembers


class Workspace:
    """Scratch buffer shared by the inputs of all convolutions."""

    def __init__(self) -> None:
        self.memory = torch.empty(0)  # its dtype and device are those of the first request

    def reserve_buffer(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Return a tensor of this shape in the buffer, which grows if necessary; its previous content is lost."""
        count = math.prod(shape)
        if len(self.memory) < count:
            self.memory = like.new_empty(count)
        return self.memory[:count].view(shape)


class FoldedConv(nn.Module):
    """A convolution with a folded weight, and the last frames of its input.

    Usage: write the normalized input into `input_buffer(x)`, then call the module.
    """

    def __init__(self, conv: nn.Conv3d | nn.Conv2d, workspace: Workspace, spec: ConvSpec | None = None) -> None:
        super().__init__()
        spec = spec or ConvSpec(conv.in_channels, conv.out_channels)
        weight = conv.weight if conv.weight.dim() == 5 else conv.weight.unsqueeze(2)
        assert conv.bias is not None
        extra_outputs = spec.outputs * spec.time - len(weight)
        weight = functional.pad(weight, (0, 0) * 4 + (0, extra_outputs))
        self.weight = nn.Parameter(fold_weight(weight.detach(), spec), requires_grad=False)
        self.bias = nn.Parameter(functional.pad(conv.bias.detach(), (0, extra_outputs)), requires_grad=False)
        self.spec, self.workspace = spec, workspace
        self.cached_frames: Tensor | None = None  # (2 X Y C); None at the start of a video
        self.input: Tensor | None = None  # (2 + F X Y C), in the workspace

    def input_buffer(self, x: Tensor) -> Tensor:
        """Return where to write the input (F X Y C) for as many frames as x (F X Y .) has.

        Call the module before any other convolution asks for its buffer: they share the memory.
        """
        self.input = self.workspace.reserve_buffer((CACHED_FRAMES + len(x), *x.shape[1:3], self.spec.channels), x)
        if self.cached_frames is None:
            self.input[:CACHED_FRAMES].zero_()
        else:
            self.input[:CACHED_FRAMES].copy_(self.cached_frames)
        return self.input[CACHED_FRAMES:]

    def convolve(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Convolve x, without the cache, and add a residual."""
        return convolve(x, self.weight, self.bias, self.spec, residual=residual)

    def forward(self, residual: Tensor | None = None) -> Tensor:
        """Convolve the frames in the input buffer, add a residual, and cache the last frames; returns (F X Y N)."""
        assert self.input is not None
        out = self.convolve(self.input, residual)
        # a copy, because the next convolution overwrites the workspace
        self.cached_frames, self.input = self.input[-CACHED_FRAMES:].clone(), None
        return out


class ResidualBlock(nn.Module):
    """Two causal 3x3x3 convolutions around a shortcut."""

    def __init__(self, block: DiffusersModule, workspace: Workspace) -> None:
        super().__init__()
        self.first_scale, self.second_scale = norm_scale(block.norm1), norm_scale(block.norm2)
        self.first, self.second = FoldedConv(block.conv1, workspace), FoldedConv(block.conv2, workspace)
        shortcut = block.conv_shortcut
        self.shortcut = pointwise_linear(shortcut) if isinstance(shortcut, nn.Conv3d) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(F X Y C) -> (F X Y N)."""
        norm_silu(x, self.first_scale, self.first.input_buffer(x))
        hidden = self.first()
        norm_silu(hidden, self.second_scale, self.second.input_buffer(hidden))
        return self.second(self.shortcut(x))


class FrameAttention(nn.Module):
    """Single-head self-attention within each frame."""

    def __init__(self, block: DiffusersModule) -> None:
        super().__init__()
        self.scale = norm_scale(block.norm)
        self.qkv, self.projection = pointwise_linear(block.to_qkv), pointwise_linear(block.proj)

    def forward(self, x: Tensor) -> Tensor:
        """(F X Y C) -> the same."""
        normal = functional.rms_norm(x, self.scale.shape, self.scale, NORM_EPS)
        query, key, value = rearrange(self.qkv(normal), "f x y (k c) -> k f 1 (x y) c", k=3)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return x + self.projection(mixed.reshape(x.shape))


class UpsampleBlock(nn.Module):
    """Residual blocks, then twice the size and in some levels twice the frames, around a shortcut."""

    def __init__(self, block: DiffusersModule, workspace: Workspace) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(ResidualBlock(resnet, workspace) for resnet in block.resnets))
        self.time: FoldedConv | None = None
        self.space: FoldedConv | None = None
        self.reach = Reach(before=2 * len(self.blocks))
        if block.upsampler is None:
            return
        self.reach = Reach(before=2 * len(self.blocks), scale=2, after=1)
        conv, doubles_time = block.upsampler.resample[1], block.upsampler.mode == "upsample3d"
        channels = conv.in_channels
        if doubles_time:
            self.time = FoldedConv(block.upsampler.time_conv, workspace, ConvSpec(channels, channels, side=1, time=2))
        self.space = FoldedConv(conv, workspace, ConvSpec(
            channels, conv.out_channels, depth=1, side=2, space=2,
            repeats=block.avg_shortcut.repeats, halves=2 if doubles_time else 1,
        ))  # fmt: skip

    def forward(self, x: Tensor, *, first: bool) -> Tensor:
        """(F X Y C) -> (F' X' Y' N); the `first` frame of a video is not doubled."""
        y = self.blocks(x)
        if self.space is None:
            return y
        if self.time is not None and not first:
            self.time.input_buffer(y).copy_(y)  # no normalization here, so a plain copy
            y = self.time()
        return self.space.convolve(y, x)


class PixelHead(nn.Module):
    """The last convolution, and the pixels of its cells."""

    def __init__(self, model: DiffusersModule, workspace: Workspace) -> None:
        super().__init__()
        conv = model.decoder.conv_out
        self.patch, self.out_channels = model.config.patch_size or 1, conv.out_channels
        self.reach = Reach(before=1, scale=self.patch)
        self.norm_scale = norm_scale(model.decoder.norm_out)
        # tensor cores need a multiple of 8 channels; the surplus ones are cut off again
        outputs = math.ceil(self.out_channels / 16) * 16
        self.conv = FoldedConv(conv, workspace, ConvSpec(conv.in_channels, outputs))

    def forward(self, x: Tensor, *, first: bool) -> Tensor:  # all stages are called alike
        """(F X Y C) -> pixels (F X*p Y*p 3)."""
        norm_silu(x, self.norm_scale, self.conv.input_buffer(x))
        cells = self.conv()[..., : self.out_channels]  # a cell holds the patch x patch pixels of one place
        return rearrange(cells, "f x y (c q p) -> f (x p) (y q) c", p=self.patch, q=self.patch)


def norm_scale(norm: DiffusersModule) -> nn.Parameter:
    """Return gamma (C) of a normalization."""
    return nn.Parameter(norm.gamma.detach().flatten(), requires_grad=False)


def pointwise_linear(conv: nn.Conv3d | nn.Conv2d) -> nn.Linear:
    """Return a 1x1 convolution as a linear layer over C."""
    assert conv.bias is not None
    layer = nn.Linear(conv.in_channels, conv.out_channels, device="meta")  # no memory for weights that are replaced
    layer.weight = nn.Parameter(conv.weight.detach().flatten(1), requires_grad=False)
    layer.bias = nn.Parameter(conv.bias.detach(), requires_grad=False)
    return layer


class VideoDecoder(nn.Module):
    """The decoder half of the VAE; it remembers the frames that came before."""

    def __init__(self, model: DiffusersModule) -> None:
        super().__init__()
        decoder, middle, self.workspace = model.decoder, model.decoder.mid_block, Workspace()
        self.enter = pointwise_linear(model.post_quant_conv)
        self.conv_in = FoldedConv(decoder.conv_in, self.workspace)
        self.middle = nn.Sequential(
            ResidualBlock(middle.resnets[0], self.workspace),
            FrameAttention(middle.attentions[0]),
            ResidualBlock(middle.resnets[1], self.workspace),
        )
        ups = (UpsampleBlock(block, self.workspace) for block in decoder.up_blocks)
        stages: list[UpsampleBlock | PixelHead] = [*ups, PixelHead(model, self.workspace)]
        self.stages, self.reaches = nn.ModuleList(stages), [stage.reach for stage in stages]

    def reset_cache(self) -> None:
        """Forget the previous frames, at the start of a video."""
        for module in self.modules():
            if isinstance(module, FoldedConv):
                module.cached_frames = None

    def free_memory(self) -> None:
        """Release cache and workspace until the next video."""
        self.reset_cache()
        self.workspace.memory = torch.empty(0)

    def begin(self, z: Tensor) -> Tensor:
        """(T H W C) -> (T H W N): what needs complete frames, for attention is over a frame."""
        self.conv_in.input_buffer(z).copy_(self.enter(z))
        return self.middle(self.conv_in())

    def forward(self, z: Tensor, *, first: bool) -> Tensor:
        """Decode latent frames (T H W C) that follow those of the previous call; returns (F X Y 3), not clamped."""
        x = self.begin(z)
        for stage in self.stages:
            x = stage(x, first=first)
        return x


def split_latent_frames(frames: int, max_frames: int) -> list[range]:
    """Return the chunks of latent frames to decode at once: the first frame alone, then equal chunks, then single ones.

    The frames of the last chunk come one by one, so that the video encoder has little left to do when decoding ends.
    """
    remaining = frames - 1
    # one chunk size per video: cuDNN tunes itself anew for every shape
    size = next((size for size in range(max_frames, 0, -1) if remaining % size == 0), 1)
    first_single = max(1, frames - size)
    chunks = [range(start, start + size) for start in range(1, first_single, size)]
    return [range(1), *chunks, *(range(index, index + 1) for index in range(first_single, frames))]


@torch.inference_mode()
def stream_frames(decoder: VideoDecoder | ColumnDecoder, z: Tensor, *, max_frames: int) -> Iterator[Tensor]:
    """Yield pixels (F X Y 3) uint8 of denormalized latents (C T H W), `max_frames` latent frames at a time."""
    decoder.reset_cache()
    cells = rearrange(z, "c t h w -> t h w c")
    for chunk in split_latent_frames(len(cells), max_frames):
        frames = decoder(cells[chunk.start : chunk.stop].contiguous(), first=chunk.start == 0)
        yield ((frames.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
