"""The pixel half of the two-sample test: which sets are compared, what is kept, what is cut."""

import torch
from torch import Tensor

from shards.comparison import Candidate, Comparison
from stage1_encode.video_metrics.evaluate_videos import sets_to_measure
from stage1_encode.video_metrics.pixel_test import cut_window, open_pixel_test

TEACHER, STUDENT = Candidate("teacher", "teacher", 100, "teacher"), Candidate("student", "student", 4, "run")


def means(one: Tensor, other: Tensor, seed: int) -> tuple[float, float, float]:
    """Stands for the test."""
    return float(one.float().mean()), float(other.float().mean()), seed


def test_every_set_is_compared_with_the_teachers_of_another_seed() -> None:
    comparison = Comparison((TEACHER, STUDENT), (0, 4), (4, 5), 2, 1.0)
    names = sets_to_measure(comparison, references=True)
    assert names[:2] == ["teacher-seed-4", "teacher-seed-5"], "what others are compared with comes first"
    test, kept = open_pixel_test(comparison, means), []
    for value, name in enumerate(names):
        test.add(name, [torch.full((1, 3, 2, 4, 4), value, dtype=torch.uint8)] * 2)
        kept.append(len(test.windows))
    number = {name: float(value) for value, name in enumerate(names)}
    assert test.answers == {
        "teacher-seed-0": (number["teacher-seed-0"], number["teacher-seed-4"], 0),
        "teacher-seed-4": (number["teacher-seed-4"], number["teacher-seed-5"], 4),
        "run-seed-0": (number["run-seed-0"], number["teacher-seed-4"], 0),
        "run-seed-4": (number["run-seed-4"], number["teacher-seed-5"], 4),
    }
    assert kept == [1, 2, 2, 1, 0], "only the references stay in memory, while somebody needs them"


def test_a_window_is_the_centre_of_the_first_frames() -> None:
    videos = torch.arange(2 * 21 * 70 * 98 * 3).reshape(2, 21, 70, 98, 3)
    window = cut_window(videos)
    assert window.shape == (2, 3, 17, 64, 96)
    assert torch.equal(window[1, 2, 16], videos[1, 16, 3:67, 1:97, 2])
    assert cut_window(videos[:, :5, :8, :8]).shape == (2, 3, 5, 8, 8)
