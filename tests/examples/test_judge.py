"""The nano world's judge: right on true clips, wrong on clips of another prompt or run backwards."""

import torch

from examples.nano.captions import captions
from examples.nano.judge import judge
from examples.nano.render import render
from examples.nano.world import draw_scenes


def share(answers: list[bool | list[bool]]) -> float:
    flat = [part for one in answers for part in (one if isinstance(one, list) else [one])]
    return sum(flat) / len(flat)


def test_judge_tells_right_from_wrong() -> None:
    scenes = draw_scenes(7, torch.arange(12), held=True)
    clips, prompts = render(scenes).to(torch.uint8).numpy(), captions(scenes)
    right = [judge(clip, prompt) for clip, prompt in zip(clips, prompts, strict=True)]
    wrong = [judge(clip, prompt) for clip, prompt in zip(clips[::-1], prompts, strict=True)]
    for key in ("colour", "shape", "valid"):
        assert share([one[key] for one in right if key in one]) >= 0.95, key
        assert share([one[key] for one in wrong if key in one]) < 0.7, key
    assert any("motion" not in one for one in right), "an open motion is no question"
