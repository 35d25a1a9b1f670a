"""The analyser reads true clips without a fault, and detects every kind of fault of a bad sampler."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from examples.nano.analyse import score
from examples.nano.captions import captions, parse
from examples.nano.render import render
from examples.nano.world import NEVER, draw_scenes

COUNT = 96


@pytest.fixture(scope="module")
def true_clips() -> tuple[Tensor, list]:
    """Clips (N T H W 3) of single-start scenes and what their prompts ask for."""
    scenes = draw_scenes(3, torch.arange(COUNT), held=True)
    return render(scenes), [parse(prompt) for prompt in captions(scenes)]


def test_true_clips_are_right(true_clips: tuple[Tensor, list]) -> None:
    shares = score(*true_clips)
    assert min(shares.values()) >= 0.99, shares


def blurred(clips: Tensor) -> Tensor:
    frames = clips.flatten(0, 1).movedim(-1, 1).float()
    return functional.avg_pool2d(frames, 9, stride=1, padding=4).movedim(1, -1).to(torch.uint8).view_as(clips)


def doubled(clips: Tensor) -> Tensor:
    return ((clips.float() + clips.roll(14, dims=3).float()) / 2).to(torch.uint8)


def vanished(clips: Tensor) -> Tensor:
    return torch.cat([clips[:, :9], clips[:, :1, :1, :1].expand(-1, 8, 64, 96, -1)], dim=1)


def jumping(clips: Tensor) -> Tensor:
    return torch.cat([clips[:, :8], clips[:, 8:].roll(8, dims=2)], dim=1)


@pytest.mark.parametrize("spoil", [blurred, doubled, vanished, jumping])
def test_spoilt_clips_are_not_valid(true_clips: tuple[Tensor, list], spoil: object) -> None:
    clips, asked = true_clips
    assert score(spoil(clips), asked)["valid"] <= 0.05


def test_each_answer_is_wrong_where_its_subject_is(true_clips: tuple[Tensor, list]) -> None:
    clips, asked = true_clips
    hues = clips[..., [1, 2, 0]]  # another colour everywhere
    assert score(hues, asked)["colour"] < 0.4
    backwards = score(clips.flip(1), asked)
    assert backwards["motion"] < 0.45, "only what stays or bounces is the same backwards"
    swapped = score(clips.roll(1, dims=0), asked)
    assert swapped["shape"] < 0.6 and swapped["motion"] < 0.5, swapped


def test_held_out_combinations_are_never_trained_on() -> None:
    train, held = (draw_scenes(5, torch.arange(512), held=flag) for flag in (False, True))
    visible = train.entry[:, :2] < NEVER
    seen = set(
        zip(
            train.shape[:, :2][visible].tolist(),
            train.colour[:, :2][visible].tolist(),
            train.motion[visible].tolist(),
            strict=True,
        )
    )
    kept = set(zip(held.shape[:, 0].tolist(), held.colour[:, 0].tolist(), held.motion[:, 0].tolist(), strict=True))
    assert kept and not seen & kept
