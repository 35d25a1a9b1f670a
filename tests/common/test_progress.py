"""Plain lines of progress: the last one says how far the work has come, whether it was completed or not."""

import pytest

from common.progress import ProgressBar, track_progress


@pytest.mark.parametrize(("count", "lines"), [(5, ["work: 5/5"]), (3, ["work: 3/5"]), (0, [])])
def test_the_last_line_shows_the_last_item(count: int, lines: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(5, label="work") as progress:
        for _ in range(count):
            progress.advance()
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == lines


def test_work_that_was_completed_before_is_no_work(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(5, label="work", initial=5):
        pass
    assert capsys.readouterr().err == ""


def test_a_failure_leaves_the_count_and_the_note(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), ProgressBar(5, label="work") as progress:
        progress.advance("loss 1", count=2)
        raise KeyError
    assert capsys.readouterr().err.startswith("work: 2/5, ") and progress.note == "loss 1"


def test_items_are_counted_when_the_next_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track_progress("abc", total=3, label="work")) == ["a", "b", "c"]
    assert capsys.readouterr().err.startswith("work: 3/3, ")


def test_rate_and_time_left_once_a_minute(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Slow work in seconds per item, fast work in items per second; 20 items were done by an earlier process."""
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with ProgressBar(1000, label="work", initial=20) as progress:
        for _ in range(8):
            now += 20
            progress.advance("loss 1")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "work: 23/1000, 20.00s/it, 5:25:40 left, loss 1"
    assert [line.split(",")[0] for line in lines] == ["work: 23/1000", "work: 26/1000", "work: 28/1000"]
    with ProgressBar(1000, label="work") as progress:
        now += 5
        progress.advance(count=20)
    assert capsys.readouterr().err == "work: 20/1000,  4.00it/s, 04:05 left\n"
