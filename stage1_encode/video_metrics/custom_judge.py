"""A judge that the user brings: a Python file with `judge(video, prompt)` or, faster, `judge_all(videos, prompts)`.

Shapes: B videos, F frames, X Y pixels.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

JudgeAnswers = Mapping[str, "bool | Sequence[bool]"]  # question -> right or wrong, or several answers of one kind
Judge = Callable[[Tensor, Sequence[str]], Sequence[JudgeAnswers]]  # videos (B F X Y 3) uint8, any device; B prompts


def load_judge(path: str) -> Judge:
    """Load the judge of a Python file; ValueError if it defines none.

    Its `judge` gets one video (F X Y 3) as a numpy array and its prompt; its `judge_all` is a `Judge`.
    """
    spec = importlib.util.spec_from_file_location("judge", path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise ValueError(f"judge={path}: is not a Python file; name one that defines judge(video, prompt)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError, AttributeError) as error:
        raise ValueError(f"judge={path}: {error}") from error
    namespace = vars(module)
    if "judge_all" in namespace:
        judge_all: Judge = namespace["judge_all"]
        return judge_all
    if "judge" not in namespace:
        raise ValueError(f"judge={path}: defines neither judge(video, prompt) nor judge_all(videos, prompts); add one")

    def one_by_one(videos: Tensor, prompts: Sequence[str]) -> list[JudgeAnswers]:
        return [namespace["judge"](video, prompt) for video, prompt in zip(videos.cpu().numpy(), prompts, strict=True)]

    return one_by_one


def to_booleans(value: object) -> list[bool]:
    """Return an answer as a list of truth values; a value that is not iterable gives one."""
    try:
        return [bool(part) for part in value]  # type: ignore[attr-defined]
    except TypeError:  # also a tensor or array without dimensions
        return [bool(value)]


def true_shares(answers: Sequence[JudgeAnswers]) -> dict[str, float]:
    """Return the share of true answers per question; a video that leaves a question out is not counted for it."""
    values: dict[str, list[bool]] = {}
    for answer in answers:
        for question, value in answer.items():
            values.setdefault(question, []).extend(to_booleans(value))
    return {question: sum(truths) / len(truths) for question, truths in values.items() if truths}
