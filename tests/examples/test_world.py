"""Scenes of the nano world in every size."""

import csv
import hashlib
from pathlib import Path

import pytest
import torch
from PIL import Image

from common.video import FrameSize
from examples.nano.analyse import score
from examples.nano.captions import captions, parse
from examples.nano.clips import write_conditions
from examples.nano.dit import Pool, train_dit
from examples.nano.render import coverage, render
from examples.nano.text import WIDTH
from examples.nano.world import SIZES, SLOTS, draw_scenes


@pytest.mark.parametrize("size", SIZES)
def test_objects_stay_inside_and_apart(size: tuple[int, int]) -> None:
    scenes = draw_scenes(77, torch.arange(60), held=None, size=size)
    covers = torch.stack([coverage(scenes, slot) for slot in range(SLOTS)], dim=1)
    assert covers.shape[-2:] == size and covers.amax() == 1
    assert covers.sum(dim=1).amax() <= 1
    for border in (covers[..., 0, :], covers[..., -1, :], covers[..., 0], covers[..., -1]):
        assert border.amax() < 1  # an object may touch the border, and is not cut by it


@pytest.mark.parametrize("size", SIZES)
def test_the_analyser_reads_every_size(size: tuple[int, int]) -> None:
    scenes = draw_scenes(5, torch.arange(6), held=True, size=size)
    shares = score(render(scenes), [parse(prompt) for prompt in captions(scenes)])
    assert all(share > 0.95 for share in shares.values()), shares


def test_landscape_scenes_are_those_of_always() -> None:
    clips = render(draw_scenes(77, torch.arange(8), held=False))
    assert hashlib.sha256(clips.numpy().tobytes()).hexdigest()[:16] == "304c5102e1df908b"


def test_pictures_of_all_sizes_are_written(tmp_path: Path) -> None:
    sizes = tuple(FrameSize(*size) for size in SIZES)
    write_conditions(tmp_path, "held.csv", seed=78, count=6, held=True, sizes=sizes)
    with (tmp_path / "held.csv").open() as file:
        names = [row["image"] for row in csv.DictReader(file)]
    shapes = [Image.open(tmp_path / name).size[::-1] for name in names]
    assert shapes == [size for size in SIZES for _ in range(2)]


def test_a_teacher_is_trained_on_several_shapes(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = [(2, 48, 5, 4, 6), (2, 48, 5, 6, 4)]
    text = torch.randn((2, 4, WIDTH), generator=draw)
    pools = [Pool(torch.randn(shape, generator=draw), text, text[0]) for shape in shapes]
    pools.append(pools[0].shortened(3))
    assert pools[2].latents.shape == (2, 48, 3, 4, 6)
    done = train_dit(tmp_path, pools, seed=0, seconds=60, limit=3, batch=2, report=lambda line: None)
    assert done == 3 and (tmp_path / "transformer" / "config.json").is_file()
