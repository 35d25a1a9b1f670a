"""Renders scenes: signed distances with anti-aliased edges. Shapes: B clips, S slots, T frames, H W pixels."""

from dataclasses import replace

import torch
from torch import Tensor

from examples.nano.world import RGB, SLOTS, Scenes, constant

AREA = (3.1416, 3.24, 2.694, 3.158)  # of a shape of radius 1, by the distances below
SQUARE, INNER, LONG, SHORT = 0.9, 0.72, 1.15, 0.42  # half side; the triangle's inner circle; the cross's half bars


def distance(x: Tensor, y: Tensor, radius: Tensor, shape: Tensor) -> Tensor:
    """Return the signed distance in pixels to the edge of a shape at the origin, negative inside; all broadcast."""
    ax, ay = x.abs(), y.abs()
    circle = (x * x + y * y).sqrt() - radius
    square = torch.maximum(ax, ay) - SQUARE * radius
    triangle = torch.maximum(y, 0.8660254 * ax - 0.5 * y) - INNER * radius
    bars = torch.minimum(
        torch.maximum(ax - LONG * radius, ay - SHORT * radius), torch.maximum(ax - SHORT * radius, ay - LONG * radius)
    )
    return torch.where(shape == 0, circle, torch.where(shape == 1, square, torch.where(shape == 2, triangle, bars)))


def pixel_grid(device: torch.device, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return pixel centres, y (H 1) and x (1 W), of a picture (height, width)."""
    y = torch.arange(size[0], device=device)[:, None] + 0.5
    x = torch.arange(size[1], device=device)[None, :] + 0.5
    return y, x


def coverage(scenes: Scenes, slot: int) -> Tensor:
    """Return the share of each pixel that the object in `slot` covers (B T H W), in [0, 1]."""
    y, x = pixel_grid(scenes.phase.device, scenes.size)
    centre = scenes.centre[:, slot, :, :, None, None]
    radius = scenes.radius[:, slot, :, None, None]
    inside = 0.5 - distance(x - centre[:, :, 0], y - centre[:, :, 1], radius, scenes.shape[:, slot, None, None, None])
    seen = torch.arange(centre.shape[1], device=x.device) >= scenes.entry[:, slot, None]
    return inside.clamp(0, 1) * seen[:, :, None, None]


def paint_background(scenes: Scenes) -> Tensor:
    """Return the still background (B H W 3) in 0..255: one tone, a vertical shade, four soft stripes, or two halves."""
    height, width = scenes.size
    y, x = pixel_grid(scenes.phase.device, scenes.size)
    phase = scenes.phase[:, None, None]
    kind = scenes.background[:, None, None]
    shaded = (y / height).expand(1, height, width)
    striped = (0.5 + 4.0 * torch.sin(2 * torch.pi * (x / 48 + phase))).clamp(0, 1).expand(-1, height, -1)
    split = (0.5 + x - width * (0.25 + 0.5 * phase)).clamp(0, 1).expand(-1, height, -1)
    mix = torch.where(kind == 1, shaded, torch.where(kind == 2, striped, torch.where(kind == 3, split, 0.0)))[..., None]
    tones = scenes.tones[:, :, None, None]
    return tones[:, 0] * (1 - mix) + tones[:, 1] * mix


def render(scenes: Scenes) -> Tensor:
    """Return clips (B T H W 3), uint8."""
    video = paint_background(scenes)[:, None].expand(-1, scenes.centre.shape[2], -1, -1, -1)
    palette = constant(RGB, scenes.phase.device)
    for slot in range(SLOTS):
        alpha = coverage(scenes, slot)[..., None]
        video = video * (1 - alpha) + palette[scenes.colour[:, slot], None, None, None] * alpha
    return (video + 0.5).clamp(0, 255).to(torch.uint8)


def first_frames(scenes: Scenes) -> Tensor:
    """Return first frames (B H W 3), uint8."""
    start = replace(scenes, centre=scenes.centre[:, :, :1], radius=scenes.radius[:, :, :1])
    return render(start)[:, 0]


def to_network(video: Tensor) -> Tensor:
    """Convert pixels (B T H W 3) in 0..255 to the VAE's (B 3 T H W) in [-1, 1]."""
    return video.movedim(-1, 1).float() / 127.5 - 1


def to_pixels(video: Tensor) -> Tensor:
    """Convert the VAE's (B 3 T H W) in [-1, 1] to uint8 pixels (B T H W 3)."""
    return ((video.float() + 1) * 127.5 + 0.5).clamp(0, 255).to(torch.uint8).movedim(1, -1)
