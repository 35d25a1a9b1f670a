"""The curve of a run's checkpoints: its largest rise, and its drawing."""

import re

import pytest

from stage2_distill.evaluation.checkpoint_curve import draw_curve, largest_rise


def test_the_largest_rise_is_between_neighbours() -> None:
    assert largest_rise([8, 4, 5, 6, 3]) == pytest.approx(0.25)
    assert largest_rise([3, 2, 1]) == largest_rise([1]) == 0
    assert largest_rise([0, 0]) == 0


def test_a_curve_has_a_line_per_map_from_the_first_checkpoint_on() -> None:
    rows = [{"checkpoint": f"step-{i}", "errors": [4 / (i + 1), 2.0, 1.0 + i, 0.5]} for i in range(3)]
    picture = draw_curve(rows)
    lines = [
        [tuple(map(float, point.split(","))) for point in line.split()]
        for line in re.findall('points="([^"]*)"', picture)
    ]
    assert [len(line) for line in lines] == [3, 3, 3]
    assert lines[0][0] == lines[1][0] == lines[2][0], "each over its first"
    assert lines[2][2][1] == 28, "the largest share, 3, is at the top"
    assert lines[0][2][1] == pytest.approx(172 - 144 / 9, abs=0.05)
    assert "step-0</text>" in picture and "step-2</text>" in picture
    assert draw_curve(rows[:1]).count("<polyline") == 3
