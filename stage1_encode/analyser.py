"""A judge that the user brings: a Python file with `judge(video, prompt)`. Shapes: F frames, X Y pixels."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy

Answers = Mapping[str, "bool | Sequence[bool]"]  # a question, or several of one kind, and whether the video is right
Judge = Callable[[numpy.ndarray, str], Answers]  # (video (F X Y 3) uint8, prompt)


def load(path: str) -> Judge:
    """The function `judge` of a Python file; ValueError where there is none."""
    spec = importlib.util.spec_from_file_location("analyser", path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise ValueError(f"analyser={path}: is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        judge: Judge = module.judge
    except (SyntaxError, ImportError, AttributeError) as error:
        raise ValueError(f"analyser={path}: {error}; it must define judge(video, prompt)") from error
    return judge


def shares(answers: Sequence[Answers]) -> dict[str, float]:
    """Share of True per key over all videos; a key that a video leaves out is not counted there."""
    counts: dict[str, list[bool]] = {}
    for one in answers:
        for key, value in one.items():
            counts.setdefault(key, []).extend([value] if isinstance(value, bool) else [bool(part) for part in value])
    return {key: sum(values) / len(values) for key, values in counts.items() if values}
