"""The nano world: clips of coloured shapes on a still background, each a pure function of (seed, index).

Every object stays in its own half of the picture, cut across its longer side, so that objects do not constrain each
other. A scene has any of `SIZES`. The world is discrete where a tiny network must choose: centres start on a lattice,
objects turn and enter where a latent frame begins, and move one stride a latent frame. What the caption leaves open is
drawn at random.

Shapes: B clips, S object slots (0 is there from the start, 1 from the start or never, 2 enters later or never; 1 and 2
share a half and are never in one clip), T frames, H W pixels.
Every draw is a hash of (seed, index, slot), so the CPU and the GPU make the same clips in any order and batch size.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from einops import rearrange
from torch import Tensor

FRAMES, HEIGHT, WIDTH, FPS = 17, 64, 96, 12
SIZES = ((HEIGHT, WIDTH), (96, 64), (96, 96))  # landscape, portrait, square: in each half there is room for all motions
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = ("red", "yellow", "green", "cyan", "blue", "magenta")
RGB = ((225, 40, 40), (235, 215, 40), (40, 195, 60), (40, 210, 225), (50, 70, 235), (225, 50, 215))
BACKGROUNDS = ("plain", "shaded", "striped", "split")
DIRECTIONS = ("right", "down right", "down", "down left", "left", "up left", "up", "up right")  # y grows downwards
MOTIONS = (*DIRECTIONS, "grow", "shrink", "bounce", "stay", "free")  # "free" is left open by the caption
GROW, SHRINK, BOUNCE, STAY, FREE = range(8, 13)
SLOTS = 3
NEVER = FRAMES  # entry frame of an object that is not in the clip
CHUNK = 4  # pixel frames per latent frame, after the first; objects turn and enter at frames 1 + 4k
LATTICE, STRIDE = 2.0, 6.0  # pixels: spacing of start positions; movement per chunk
SIZE, SMALL, LARGE = 7.0, 7.0, 10.0  # radius of most objects; a growing one goes from SMALL to LARGE
REACH = 1.25  # a shape stays within this many radii of its centre
VAGUE = 0.6  # share of captions that leave an object's motion open
PATH_DRAWS, SCENE_DRAWS = 6, 28  # uniform draws per path, and per scene without its paths


@dataclass(frozen=True)
class Scenes:
    """A batch of clips before rendering; pixel units."""

    shape: Tensor  # (B S) int64, into SHAPES
    colour: Tensor  # (B S) int64, into COLOURS; the three differ
    motion: Tensor  # (B 2) int64, into MOTIONS
    entry: Tensor  # (B S) int64, first frame in which the object is seen; NEVER if it is not in the clip
    named: Tensor  # (B) bool: the caption names the entering object
    centre: Tensor  # (B S T 2) float32, x and y
    radius: Tensor  # (B S T) float32
    background: Tensor  # (B) int64, into BACKGROUNDS
    tones: Tensor  # (B 2 3) float32, the background's two colours in 0..255
    phase: Tensor  # (B) float32 in [0, 1), where stripes or the split lie
    wording: Tensor  # (B 8) float32 in [0, 1), choices of words
    size: tuple[int, int] = (HEIGHT, WIDTH)  # height and width of the picture, one of SIZES


def uniforms(seed: int, index: Tensor, count: int) -> Tensor:
    """Return uniform draws (B count) in [0, 1), a splitmix64 hash (Steele et al. 2014) of seed, index (B), column."""
    x = index[:, None] * 4096 + torch.arange(count, device=index.device) + seed * 0x1000003D
    x = x * -7046029254386353131
    for right, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
        x = (x ^ ((x >> right) & ((1 << (64 - right)) - 1))) * factor
    return ((x >> 40) & 0xFFFFFF).float() / (1 << 24)


def held_out(shape: Tensor, colour: Tensor, motion: Tensor) -> Tensor:
    """Return which combinations are never trained on: a sixth of the named motions, a quarter of the free ones."""
    return torch.where(motion == FREE, (shape + colour) % 4 == 3, (shape + colour + motion) % 6 == 0)


@cache
def constant(values: tuple, device: torch.device) -> Tensor:
    """Return a float32 tensor, cached per device because a CUDA graph cannot capture a copy from the host."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def choose(u: Tensor, count: int) -> Tensor:
    """Return an integer in [0, count) from a uniform draw of any shape."""
    return (u * count).long().clamp(max=count - 1)


def third_colour(pick: Tensor, taken: Tensor) -> Tensor:
    """Return number `pick` in 0..3 of the five other colours 0..4 without `taken`."""
    return pick + (pick >= taken)


def attributes(u: Tensor, colour: Tensor, split: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return shape and motion (B) for a colour (B) from draws u (B 3); a share VAGUE of the motions is FREE.

    split (B) asks for held-out combinations or none, None for any: it walks from a random start through all pairs of
    shape and motion to the first allowed one.
    """
    named = len(MOTIONS) - 1
    free = u[:, 0] < VAGUE
    steps = torch.arange(len(SHAPES) * named, device=u.device)
    pair = (choose(u[:, 1], len(SHAPES) * named)[:, None] + steps * 7) % (len(SHAPES) * named)  # 7 and 48 are coprime
    shape = torch.where(free[:, None], pair % len(SHAPES), pair // named)
    motion = torch.where(free[:, None], FREE, pair % named)
    if split is None:
        return shape[:, 0], motion[:, 0]
    allowed = held_out(shape, colour[:, None], motion) == split[:, None]
    first = allowed.float().argmax(dim=1, keepdim=True)
    return shape.gather(1, first)[:, 0], motion.gather(1, first)[:, 0]


def headings(u: Tensor, motion: Tensor) -> Tensor:
    """Return the heading (... T-1) in radians of each step, from draws u (... 6) and motion (...).

    A free motion is straight, turned by a right angle or bounced at the start of a chunk, or curved by half a right
    angle per chunk; a bounce is a turn by pi.
    """
    chunk = torch.arange(FRAMES - 1, device=u.device) // CHUNK
    kind = choose(u[..., 0], 4)
    free = motion == FREE
    start = torch.where(motion < 8, motion, choose(u[..., 1], 8)) * (math.pi / 4)
    sign = torch.where(u[..., 2] < 0.5, -1.0, 1.0)
    bounces = (motion == BOUNCE) | (free & (kind == 3))
    turn = torch.where(free & (kind == 1), sign * (math.pi / 2), torch.where(bounces, math.pi, 0.0))
    curve = torch.where(free & (kind == 2), sign * (math.pi / 4), 0.0)
    when = 1 + choose(u[..., 3], (FRAMES - 1) // CHUNK - 1)
    return start[..., None] + curve[..., None] * chunk + turn[..., None] * (chunk >= when[..., None])


def on_lattice(u: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return a lattice position in [low, high] from draws u of the same shape, or the first one after low."""
    first = (low / LATTICE).ceil()
    count = ((high / LATTICE).floor() - first + 1).clamp(min=1)
    return LATTICE * (first + (u * count).floor().minimum(count - 1))


def half_extent(size: tuple[int, int]) -> tuple[float, float]:
    """Return the extent (x, y) of the left half of a picture (height, width), or of the upper one if it is upright."""
    height, width = size
    return (width / 2, height) if width >= height else (width, height / 2)


def half_step(size: tuple[int, int]) -> tuple[float, float]:
    """Return the way (x, y) from the first half of a picture (height, width) to the other."""
    height, width = size
    return (width / 2, 0.0) if width >= height else (0.0, height / 2)


def room(margin: Tensor, extent: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Return the lowest and highest centre (... 2) in the first half of an object with a margin (...) in pixels."""
    low = torch.stack([margin, margin], dim=-1)
    return low, constant(extent, margin.device) - low


def paths(u: Tensor, motion: Tensor, extent: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Return centres (... T 2) inside the first half and radii (... T), from draws u (... 6) and motion (...)."""
    heading = headings(u, motion)
    still = (motion == GROW) | (motion == SHRINK) | (motion == STAY)
    speed = torch.where(still, 0.0, STRIDE / CHUNK)
    steps = torch.stack([heading.cos(), heading.sin()], dim=-1).round() * speed[..., None, None]
    offset = torch.cat([torch.zeros_like(steps[..., :1, :]), steps.cumsum(dim=-2)], dim=-2)
    start = torch.where(motion == GROW, SMALL, torch.where(motion == SHRINK, LARGE, SIZE))
    end = torch.where(motion == GROW, LARGE, torch.where(motion == SHRINK, SMALL, SIZE))
    clock = torch.linspace(0, 1, FRAMES, device=u.device)
    radius = start[..., None] + (end - start)[..., None] * clock
    low, high = room(REACH * radius.amax(dim=-1) + 1, extent)
    return on_lattice(u[..., 4:6], low - offset.amin(dim=-2), high - offset.amax(dim=-2))[..., None, :] + offset, radius


def draw_background(u: Tensor) -> tuple[Tensor, Tensor]:
    """Return the background kind (B) and two muted tones (B 2 3) in 0..255 from draws u (B 9)."""
    grey = 25 + 120 * u[:, 1]
    other = torch.where(u[:, 2] < 0.5, 25 + 0.6 * (grey - 25), grey + 0.4 * (150 - grey))
    tint = 24 * (torch.stack([u[:, 3:6], u[:, 6:9]], dim=1) - 0.5)
    return choose(u[:, 0], len(BACKGROUNDS)), torch.stack([grey, other], dim=1)[..., None] + tint


def draw_scenes(seed: int, index: Tensor, *, held: bool | None, size: tuple[int, int] = (HEIGHT, WIDTH)) -> Scenes:
    """Return scenes of indices (B); `held`: False for training, True for held-out combinations, None for any."""
    u, v = uniforms(seed, index, SCENE_DRAWS + 2 * PATH_DRAWS).split([SCENE_DRAWS, 2 * PATH_DRAWS], dim=1)
    split = None if held is None else torch.full_like(index, held, dtype=torch.bool)
    a = choose(u[:, 0], 6)
    b = (a + 1 + choose(u[:, 1], 5)) % 6
    c = (a + 1 + third_colour(choose(u[:, 2], 4), (b - a - 1) % 6)) % 6
    shape_a, motion_a = attributes(u[:, 3:6], a, split)
    shape_b, motion_b = attributes(u[:, 6:9], b, None if held else split)
    motion = torch.stack([motion_a, motion_b], dim=1)
    centre, radius = paths(rearrange(v, "b (s d) -> b s d", s=2), motion, half_extent(size))
    still = torch.full_like(radius[:, :1], SIZE)
    entering = room(REACH * still[:, 0, 0] + 1, half_extent(size))
    centre = torch.cat([centre, on_lattice(u[:, 10:12], *entering)[:, None, None].expand_as(centre[:, :1])], dim=1)
    other = (u[:, 25] < 0.5)[:, None] == constant((1, 0, 0), u.device).bool()  # (B S): the first in one half, or other
    centre = centre + other[..., None, None] * constant(half_step(size), u.device)
    second = torch.where(u[:, 9] < 0.5, 0, NEVER)
    entry = 1 + CHUNK * (1 + choose(u[:, 26], (FRAMES - 1) // CHUNK - 1))
    entry = torch.where((second == NEVER) & (u[:, 12] < 0.9), entry, NEVER)
    background, tones = draw_background(u[:, 13:22])
    return Scenes(
        shape=torch.stack([shape_a, shape_b, choose(u[:, 22], 4)], dim=1),
        colour=torch.stack([a, b, c], dim=1),
        motion=motion,
        entry=torch.stack([torch.zeros_like(second), second, entry], dim=1),
        named=u[:, 23] < 0.2,
        centre=centre,
        radius=torch.cat([radius, still], dim=1),
        background=background,
        tones=tones,
        phase=u[:, 24],
        wording=uniforms(seed + 1, index, 8),
        size=size,
    )
