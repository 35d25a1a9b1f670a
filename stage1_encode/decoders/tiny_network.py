"""The network of the TAEHV family for this VAE: frames alone, but for blocks that also see the frame before.

Written from the layout of the published weights `taew2_2` and `taew2_2_super` (madebyollin/taehv, taehv.py at
1f14a568f24bf8811e0a0ac601613e04fc1581e8; LightX2V's `lighttaew2_2` has the same layout). Its layers have the numbers by
which those files name them. Pixels are in [0, 1]. The first latent frame gives four frames, of which only the last one
belongs to the video: 4 T - 3 frames in all.
Shapes: B videos, T latent frames, F frames, N = B x F, C channels, X Y height and width.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional

GROWTH = (1, 2, 2)  # frames out per frame in, of the three levels
SURPLUS_FRAMES = 3  # of the first latent frame
ALIGNED_CHANNELS = 8  # tensor cores need a multiple of this
LATENT_BOUND = 3.0  # latents are squeezed softly into +-this


@dataclass(frozen=True)
class TinyLayout:
    """The sizes of a tiny decoder, as its tensors show them."""

    latent_channels: int
    outputs: int  # channels of the last layer: 3 colours x patch x patch
    widths: tuple[int, ...]  # of the three levels and of the last layers
    is_wide: bool  # the larger "super" variant

    @property
    def patch(self) -> int:
        """Pixels of an output cell, in height and in width."""
        return round((self.outputs / 3) ** 0.5)


class SoftClamp(nn.Module):
    """Bounds latents smoothly."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return torch.tanh(x / LATENT_BOUND) * LATENT_BOUND


class MemoryBlock(nn.Module):
    """Convolutions of each frame together with the one before it, around a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = self.make_layers(channels)
        self.last_frame: Tensor | None = None  # (B 1 C X Y) of the previous chunk; None at the start of a video

    def make_layers(self, channels: int) -> nn.Sequential:
        """Return the convolutions from 2 C to C channels."""
        first, second = conv3(2 * channels, channels), conv3(channels, channels)
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), conv3(channels, channels))

    def forward(self, x: Tensor, videos: int) -> Tensor:
        """(N C X Y) of B `videos` -> the same."""
        return functional.relu(self.conv(self.join_previous(x, videos)) + x)

    def join_previous(self, x: Tensor, videos: int) -> Tensor:
        """Append to each frame of x (N C X Y) the one before it, zero before the first: (N 2C X Y)."""
        channels, shape = x.shape[1], (len(x), 2 * x.shape[1], *x.shape[2:])
        # written into one buffer, as a concatenation would copy twice and forget the memory format
        pair = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        frames, joined = (rearrange(one, "(b f) c x y -> b f c x y", b=videos) for one in (x, pair))
        joined[:, :, :channels] = frames
        joined[:, 1:, channels:] = frames[:, :-1]
        joined[:, :1, channels:] = 0 if self.last_frame is None else self.last_frame
        self.last_frame = frames[:, -1:].detach().clone()
        return pair


class WideMemoryBlock(MemoryBlock):
    """The block of the larger variant: a 7x7 convolution of each channel, then two layers across channels."""

    def make_layers(self, channels: int) -> nn.Sequential:
        """Return the convolutions from 2 C to C channels."""
        spatial = nn.Conv2d(2 * channels, 2 * channels, 7, padding=3, groups=2 * channels, bias=False)
        wide, narrow = nn.Conv2d(2 * channels, 4 * channels, 1), nn.Conv2d(4 * channels, channels, 1, bias=False)
        return nn.Sequential(spatial, wide, nn.ReLU(), narrow)

    def forward(self, x: Tensor, videos: int) -> Tensor:
        """(N C X Y) of B `videos` -> the same."""
        return self.conv(self.join_previous(x, videos)) + x


class GrowFrames(nn.Module):
    """Makes one or two frames of each, and repeats pixels; the learned part sees one pixel, so it comes first."""

    def __init__(self, channels: int, growth: int, *, scale: int) -> None:
        super().__init__()
        self.conv, self.growth, self.scale = nn.Conv2d(channels, growth * channels, 1, bias=False), growth, scale

    def forward(self, x: Tensor) -> Tensor:
        """(N C X Y) -> (growth N C scale X scale Y)."""
        cells = self.conv(x).permute(0, 2, 3, 1)
        grown = repeat(
            cells, "n x y (t c) -> (n t) (x p) (y q) c", t=self.growth, p=self.scale, q=self.scale
        )  # one copy, which stays channels-last
        return grown.permute(0, 3, 1, 2)


class TinyNetwork(nn.Module):
    """A tiny decoder; its blocks remember the last frame of the chunk before."""

    def __init__(self, layout: TinyLayout) -> None:
        super().__init__()
        self.layout = layout
        self.decoder = nn.Sequential(*(wide_layers if layout.is_wide else narrow_layers)(layout))

    def prepare_inference(self) -> None:
        """Bring weights into the form in which convolutions are fast; pixels do not change."""
        last = self.decoder[-1]
        assert isinstance(last, nn.Conv2d) and last.bias is not None
        surplus = -len(last.bias) % ALIGNED_CHANNELS  # outputs of zeros, which are cut off again
        last.weight = nn.Parameter(functional.pad(last.weight.detach(), (0, 0) * 3 + (0, surplus)))
        last.bias = nn.Parameter(functional.pad(last.bias.detach(), (0, surplus)))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as documented; the stub lacks it
        self.eval().requires_grad_(False)

    def reset_cache(self) -> None:
        """Forget the previous frames, at the start of a video."""
        for module in self.modules():
            if isinstance(module, MemoryBlock):
                module.last_frame = None

    def forward(self, z: Tensor) -> Tensor:
        """Decode latents (B T C H W) that follow those of the previous call; returns (B 4T X Y 3), not clamped."""
        videos, patch = len(z), self.layout.patch
        x = rearrange(z, "b t c h w -> (b t) c h w").contiguous(memory_format=torch.channels_last)
        for layer in self.decoder:
            x = layer(x, videos) if isinstance(layer, MemoryBlock) else layer(x)
        x = x[:, : self.layout.outputs]
        return rearrange(x, "(b f) (c p q) x y -> b f (x p) (y q) c", b=videos, p=patch, q=patch)


def conv3(channels: int, outputs: int, *, bias: bool = True) -> nn.Conv2d:
    """Return a 3x3 convolution that keeps the size."""
    return nn.Conv2d(channels, outputs, 3, padding=1, bias=bias)


def narrow_layers(layout: TinyLayout) -> list[nn.Module]:
    """Layers 0 to 22 of the usual variant."""
    widths = layout.widths
    layers: list[nn.Module] = [SoftClamp(), conv3(layout.latent_channels, widths[0]), nn.ReLU()]
    for width, after, growth in zip(widths, widths[1:], GROWTH, strict=False):
        layers += [MemoryBlock(width), MemoryBlock(width), MemoryBlock(width)]
        # the published order is upsampling (here a placeholder), growth, which give the same in either order
        layers += [nn.Identity(), GrowFrames(width, growth, scale=2), conv3(width, after, bias=False)]
    return [*layers, nn.ReLU(), conv3(widths[-1], layout.outputs)]


def wide_layers(layout: TinyLayout) -> list[nn.Module]:
    """Layers 0 to 22 of the larger variant."""
    widths = layout.widths
    layers: list[nn.Module] = [nn.Conv2d(layout.latent_channels, widths[0], 1, bias=False)]
    for width, after, growth in zip(widths, widths[1:], GROWTH, strict=False):
        layers += [WideMemoryBlock(width), WideMemoryBlock(width), WideMemoryBlock(width)]
        layers += [conv3(width, 4 * after), nn.ReLU(), nn.PixelShuffle(2), GrowFrames(after, growth, scale=1)]
    return [*layers, conv3(widths[-1], layout.outputs)]


def read_layout(tensors: Mapping[str, Tensor]) -> TinyLayout | None:
    """The layout of a file's tensors, None if they are no decoder of this family."""

    def size(number: int, axis: int, part: str = "weight") -> int:
        return tensors[f"decoder.{number}.{part}"].shape[axis]

    try:
        if "decoder.0.weight" in tensors:
            widths = (size(0, 0), *(size(number, 1, "conv.weight") for number in (7, 14, 21)))
            layout = TinyLayout(size(0, 1), size(22, 0), widths, is_wide=True)
        else:
            widths = tuple(size(number, 0) for number in (1, 8, 14, 20))
            layout = TinyLayout(size(1, 1), size(22, 0), widths, is_wide=False)
    except (KeyError, IndexError):
        return None
    return layout if min(widths) else None  # torch has no groups of convolutions of no channels


def keep_last_frames(tensors: Mapping[str, Tensor], layout: TinyLayout) -> dict[str, Tensor]:
    """The decoder's tensors; of a layer that makes more frames than this VAE needs, the part of the last ones."""
    kept = {name: tensor for name, tensor in tensors.items() if name.startswith("decoder.")}
    numbers = (7, 14, 21) if layout.is_wide else (7, 13, 19)
    for number, growth in zip(numbers, GROWTH, strict=True):
        name = f"decoder.{number}.conv.weight"
        if name in kept and kept[name].dim() == 4:
            kept[name] = kept[name][-growth * kept[name].shape[1] :]
    return kept
