"""A judge that the user brings: a Python file with `judge(video, prompt)`, or `judge_all(videos, prompts)` for speed.

Shapes: B videos, F frames, X Y pixels.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

JudgeAnswers = Mapping[
    str, "bool | Sequence[bool]"
]  # a question, or several of one kind, and whether the video is right
Judge = Callable[[Tensor, Sequence[str]], Sequence[JudgeAnswers]]  # (videos (B F X Y 3) uint8 on any device, B prompts)


def load_judge(path: str) -> Judge:
    """The judge of a Python file; ValueError where there is none.

    Its `judge` takes one video (F X Y 3) as a numpy array, `judge_all` takes and gives what `Judge` says.
    """
    spec = importlib.util.spec_from_file_location("analyser", path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise ValueError(f"analyser={path}: is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError, AttributeError) as error:
        raise ValueError(f"analyser={path}: {error}") from error
    namespace = vars(module)
    if "judge_all" in namespace:
        judge_all: Judge = namespace["judge_all"]
        return judge_all
    if "judge" not in namespace:
        raise ValueError(f"analyser={path}: must define judge(video, prompt) or judge_all(videos, prompts)")

    def one_by_one(videos: Tensor, prompts: Sequence[str]) -> list[JudgeAnswers]:
        return [namespace["judge"](video, prompt) for video, prompt in zip(videos.cpu().numpy(), prompts, strict=True)]

    return one_by_one


def to_booleans(value: object) -> list[bool]:
    """The truth values of an answer, whatever type they have; what cannot be iterated is one."""
    try:
        return [bool(part) for part in value]  # type: ignore[attr-defined]
    except TypeError:
        return [bool(value)]


def true_shares(answers: Sequence[JudgeAnswers]) -> dict[str, float]:
    """Share of True per key over all videos; a key that a video leaves out is not counted there."""
    counts: dict[str, list[bool]] = {}
    for answer in answers:
        for key, value in answer.items():
            counts.setdefault(key, []).extend(to_booleans(value))
    return {key: sum(values) / len(values) for key, values in counts.items() if values}
