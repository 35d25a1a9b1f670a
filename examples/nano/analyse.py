"""Reads objects, shapes, colours, motions and faults back from the pixels of nano clips.

Shapes: B clips, K 6 colours, O 3 largest colours, T frames, H W pixels. The objects of a clip differ in colour, so a
colour is an object; a second blob of the same colour, a ghost or a blur shows as a bad fit to every shape template.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from examples.nano.captions import Asked
from examples.nano.render import AREA, distance, pixel_grid
from examples.nano.world import BOUNCE, COLOURS, FREE, GROW, RGB, SHAPES, SHRINK, SLOTS, STAY

GREY = 38.0  # saturation (0..255) that a background may have
PRESENT, SPECK = 55.0, 14.0  # pixels: an object is at least so large, and anything between the two is a fault
FIT_MEAN, FIT_LOW = 0.78, 0.55  # overlap with the best shape template: mean over the frames, and in every frame
STEP, GROWTH = 4.5, 1.7  # largest move (pixels) and change of area (ratio) from one frame to the next
SMUDGE = 24.0  # pixels of colour outside all objects that a frame may have
CLIPS_PER_BATCH = {"cpu": 4, "cuda": 64}  # on a CPU, larger batches are limited by memory bandwidth
BACKGROUND_STEP, BACKGROUND_SHARE = 26.0, 0.01  # a background pixel counts as changed; share of them allowed


@dataclass(frozen=True)
class Reading:
    """Measurements of each clip; verdicts need them on the CPU."""

    area: Tensor  # (B K T) pixels of each colour
    centre: Tensor  # (B K T 2) x and y; meaningless if the area is 0
    shape: Tensor  # (B K) best shape, -1 beyond the three largest colours
    fit: Tensor  # (B K T) overlap with that shape, in [0, 1]
    motion: Tensor  # (B K) into MOTIONS, FREE if it is none of the named
    smudge: Tensor  # (B T) pixels of colour outside all objects
    changed: Tensor  # (B) share of the background's pixels that change


@dataclass(frozen=True)
class Verdict:
    """Answers for one prompt and one clip: (right, asked) per question, and whether the clip is valid."""

    colour: tuple[int, int]
    shape: tuple[int, int]
    motion: tuple[int, int]
    valid: bool


def unmix(video: Tensor) -> tuple[Tensor, Tensor]:
    """Return the coverage by colour (B K T H W) in [0, 1] and saturation (B T H W) of clips (B T H W 3), 0..255."""
    palette = torch.tensor(RGB, device=video.device, dtype=torch.float32)
    full = palette.amax(dim=1) - palette.amin(dim=1)
    hue = (palette - palette.amin(dim=1, keepdim=True)) / full[:, None]
    low = video.amin(dim=-1)
    saturation = video.amax(dim=-1) - low
    seen = (video - low[..., None]) / saturation.clamp(min=1)[..., None]
    nearest = (2 * seen @ hue.T - hue.square().sum(dim=1)).argmax(dim=-1)
    alpha = ((saturation - GREY) / (full[nearest] - GREY)).clamp(0, 1)
    kinds = torch.arange(len(COLOURS), device=video.device)
    return rearrange([alpha * (nearest == k) for k in kinds], "k b t h w -> b k t h w"), saturation


def moments(cover: Tensor) -> tuple[Tensor, Tensor]:
    """Return area (...) in pixels and centre (... 2) of coverages (... H W)."""
    y, x = pixel_grid(cover.device, cover.shape[-2:])
    area = cover.sum(dim=(-2, -1))
    total = area.clamp(min=1e-3)
    return area, torch.stack([(cover * x).sum(dim=(-2, -1)) / total, (cover * y).sum(dim=(-2, -1)) / total], dim=-1)


def fits(cover: Tensor, area: Tensor, centre: Tensor) -> Tensor:
    """Return the overlap (intersection over union) of coverages (... H W) with each shape of that area: (... 4)."""
    y, x = pixel_grid(cover.device, cover.shape[-2:])
    dx, dy = x - centre[..., 0, None, None], y - centre[..., 1, None, None]
    scores = []
    for shape, unit in enumerate(AREA):
        radius = (area / unit).sqrt()[..., None, None]
        template = (0.5 - distance(dx, dy, radius, torch.tensor(shape, device=x.device))).clamp(0, 1)
        both = torch.minimum(cover, template).sum(dim=(-2, -1))
        scores.append(both / torch.maximum(cover, template).sum(dim=(-2, -1)).clamp(min=1e-3))
    return torch.stack(scores, dim=-1)


def read_motion(centre: Tensor, area: Tensor) -> Tensor:
    """Return the named motion (...) of paths (... T 2) of areas (... T); FREE if it is none of them."""
    moved = centre[..., -1, :] - centre[..., 0, :]
    net = moved.norm(dim=-1)
    far = (centre - centre[..., :1, :]).norm(dim=-1).amax(dim=-1)
    ratio = (area[..., -2:].mean(dim=-1) / area[..., :2].mean(dim=-1).clamp(min=1)).sqrt()
    chord = moved / net.clamp(min=1e-3)[..., None]
    offset = centre - centre[..., :1, :]
    bend = (offset[..., 0] * chord[..., None, 1] - offset[..., 1] * chord[..., None, 0]).abs().amax(dim=-1)
    first, last = centre[..., 4, :] - centre[..., 0, :], centre[..., -1, :] - centre[..., -5, :]
    back = functional.cosine_similarity(first, last, dim=-1) < -0.8
    same = (ratio > 0.8) & (ratio < 1.25)
    angle = torch.atan2(moved[..., 1], moved[..., 0])
    motion = torch.full_like(net, FREE, dtype=torch.long)
    straight = (net > 10) & (bend < 0.15 * net) & (far < 1.2 * net) & same
    motion = motion.where(~straight, (angle / (torch.pi / 4)).round().long() % 8)
    motion = motion.where(~((far > 4) & back & same & (first.norm(dim=-1) > 2) & (last.norm(dim=-1) > 2)), BOUNCE)
    motion = motion.where(~((far < 4) & (ratio > 1.3)), GROW).where(~((far < 4) & (ratio < 0.77)), SHRINK)
    return motion.where(~((far < 3) & same), STAY)


def read_background(video: Tensor, cover: Tensor, saturation: Tensor) -> tuple[Tensor, Tensor]:
    """Return smudge (B T) and changed share (B) of clips (B T H W 3) with the objects' coverage (B T H W)."""
    near = functional.max_pool2d((cover > 0.3).float(), 7, stride=1, padding=3) > 0
    smudge = ((saturation > 1.3 * GREY) & ~near).sum(dim=(-2, -1)).float()
    bare = (~near).float()[..., None]
    mean = (video * bare).sum(dim=1, keepdim=True) / bare.sum(dim=1, keepdim=True).clamp(min=1)
    wrong = ((video - mean).abs().amax(dim=-1) > BACKGROUND_STEP) & ~near
    return smudge, wrong.sum(dim=(1, 2, 3)) / bare.sum(dim=(1, 2, 3, 4)).clamp(min=1)


def read(video: Tensor) -> Reading:
    """Read uint8 clips (B T H W 3)."""
    video = video.float()
    cover, saturation = unmix(video)
    area, centre = moments(cover)
    top = area.sum(dim=-1).topk(SLOTS, dim=1).indices  # (B O)
    rows = torch.arange(len(video), device=video.device)[:, None]
    scores = fits(cover[rows, top], area[rows, top], centre[rows, top])  # (B O T 4)
    present = (area[rows, top] > PRESENT).float()
    best = (scores * present[..., None]).sum(dim=2).argmax(dim=-1)
    shape = torch.full(area.shape[:2], -1, device=video.device)
    shape[rows, top] = best
    fit = torch.zeros_like(area)
    fit[rows, top] = scores.gather(-1, best[:, :, None, None].expand(-1, -1, scores.shape[2], 1))[..., 0]
    objects = (cover * (area > PRESENT)[..., None, None]).amax(dim=1)
    smudge, changed = read_background(video, objects, saturation)
    return Reading(area, centre, shape, fit, read_motion(centre, area), smudge, changed)


def steady(reading: Reading, clip: int, colour: int, start: int) -> bool:
    """Return whether an object keeps one shape, a smooth path and a smooth size from frame `start` on."""
    area, centre, fit = (part[clip, colour, start:].numpy() for part in (reading.area, reading.centre, reading.fit))
    if not (area > PRESENT).all() or fit.mean() < FIT_MEAN or fit.min() < FIT_LOW:
        return False
    if len(area) < 2:
        return True
    ratio = area[1:] / area[:-1]
    smooth = numpy.linalg.norm(centre[1:] - centre[:-1], axis=-1).max() < STEP
    return bool(smooth and ratio.max() < GROWTH and ratio.min() > 1 / GROWTH)


def entrants(reading: Reading, clip: int, known: Sequence[int]) -> list[tuple[int, int]]:
    """Return colour and first frame of every object beyond the `known` colours; a speck counts as one."""
    area = reading.area[clip].numpy()
    others = [k for k in range(len(area)) if k not in known and (area[k] > SPECK).any()]
    return [(k, int((area[k] > PRESENT).argmax())) for k in others]


def is_valid(reading: Reading, clip: int, asked: Sequence[Asked]) -> bool:
    """Return whether every frame has the right number of complete, steady objects on an intact background."""
    known = [a.colour for a in asked if not a.enters and a.colour is not None]
    late = [a for a in asked if a.enters]
    entered = entrants(reading, clip, known)
    if len(entered) != len(late) or not all(steady(reading, clip, colour, 0) for colour in known):
        return False
    for colour, start in entered:
        early = reading.area[clip, colour, : max(start - 1, 0)].numpy()
        if start == 0 or (early > SPECK).any() or not steady(reading, clip, colour, min(start + 1, 16)):
            return False
    return bool(reading.smudge[clip].max() < SMUDGE and reading.changed[clip] < BACKGROUND_SHARE)


def judge(reading: Reading, clip: int, asked: Sequence[Asked]) -> Verdict:
    """Compare clip number `clip` with what its prompt asks for; open questions are not counted."""
    colour, shape, motion = [], [], []
    for a in asked:
        if a.colour is None:
            continue
        present = reading.area[clip, a.colour].numpy() > PRESENT
        colour.append(bool(present[-1]) if a.enters else bool(present.mean() > 0.9))
        shape.append(bool(reading.shape[clip, a.colour] == a.shape))
        if a.motion is not None:
            motion.append(bool(reading.motion[clip, a.colour] == a.motion))
    counts = [(sum(right), len(right)) for right in (colour, shape, motion)]
    return Verdict(counts[0], counts[1], counts[2], is_valid(reading, clip, asked))


def judge_clips(video: Tensor, asked: Sequence[Sequence[Asked]]) -> list[Verdict]:
    """Read uint8 clips (B T H W 3) on their device in small batches, and compare each with what its prompt asks for."""
    verdicts, count = list[Verdict](), CLIPS_PER_BATCH[video.device.type]
    for start in range(0, len(video), count):
        reading = Reading(**{name: value.cpu() for name, value in vars(read(video[start : start + count])).items()})
        verdicts += [judge(reading, clip, one) for clip, one in enumerate(asked[start : start + count])]
    return verdicts


def score(video: Tensor, asked: Sequence[Sequence[Asked]]) -> dict[str, float]:
    """Return the shares of right colours, shapes, named motions and valid clips, of uint8 clips (N T H W 3)."""
    verdicts = judge_clips(video, asked)
    totals = {
        "colour": [verdict.colour for verdict in verdicts],
        "shape": [verdict.shape for verdict in verdicts],
        "motion": [verdict.motion for verdict in verdicts],
    }
    shares = {name: sum(r for r, _ in pairs) / max(1, sum(n for _, n in pairs)) for name, pairs in totals.items()}
    return shares | {"valid": sum(v.valid for v in verdicts) / len(verdicts)}


assert len(AREA) == len(SHAPES)
