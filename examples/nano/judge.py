"""The nano world's exact answers for `evaluate --analyser`. Shapes: T frames, H W pixels."""

import numpy
import torch

from examples.nano.analyse import judge as judge_read
from examples.nano.analyse import read
from examples.nano.captions import parse


def judge(video: numpy.ndarray, prompt: str) -> dict[str, bool | list[bool]]:
    """Whether a clip (T H W 3) uint8 shows what its prompt asks for, an answer an object; open questions are
    left out.
    """
    verdict = judge_read(read(torch.from_numpy(video)[None]), 0, parse(prompt))
    counts = {"colour": verdict.colour, "shape": verdict.shape, "motion": verdict.motion}
    answers = {key: [place < right for place in range(asked)] for key, (right, asked) in counts.items()}
    return {"valid": verdict.valid} | {key: found for key, found in answers.items() if found}
