"""The nano world's exact answers for `evaluate --judge`. Shapes: B clips, T frames, H W pixels."""

from collections.abc import Sequence

import numpy
import torch
from torch import Tensor

from examples.nano.analyse import Verdict, judge_clips
from examples.nano.captions import parse

Answers = dict[str, bool | list[bool]]


def judge(video: numpy.ndarray, prompt: str) -> Answers:
    """Return whether a clip (T H W 3) uint8 shows what its prompt asks for."""
    return judge_all(torch.from_numpy(video)[None], [prompt])[0]


def judge_all(videos: Tensor, prompts: Sequence[str]) -> list[Answers]:
    """Do the same for clips (B T H W 3) on any device."""
    return [answers(verdict) for verdict in judge_clips(videos, [parse(prompt) for prompt in prompts])]


def answers(verdict: Verdict) -> Answers:
    """Return a verdict as answers, one per object; open questions are left out."""
    counts = {"colour": verdict.colour, "shape": verdict.shape, "motion": verdict.motion}
    answers = {key: [index < right for index in range(asked)] for key, (right, asked) in counts.items()}
    return {"valid": verdict.valid} | {key: values for key, values in answers.items() if values}
