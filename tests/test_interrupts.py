"""Ctrl-C, also as a real signal to a process of its own: no traceback, what to do next, and nothing lost."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

import cli
from tests.test_cli import ROOT, SIZE, call, works
from tests.tiny_models import write_csv


def test_ctrl_c_during_the_first_imports() -> None:
    """Ended by the signal without a word, and not by a traceback of click or yaml; `nohup` still ignores it."""
    code = "import sys, runpy, signal, os; sys.meta_path.insert(0, type('F', (), {'find_spec': staticmethod(lambda n, *_: n == 'click' and os.kill(os.getpid(), signal.SIGINT) or None)}))"  # noqa: E501
    run = "; sys.argv = ['cli.py', '--version']; runpy.run_path('cli.py', run_name='__main__')"
    for before, expected in (("", -signal.SIGINT), ("; signal.signal(signal.SIGINT, signal.SIG_IGN)", 0)):
        done = subprocess.run([sys.executable, "-c", code + before + run], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (expected, "")


def test_ctrl_c_during_the_imports_of_a_command(tmp_path: Path) -> None:
    """Neither swallowed by a library nor turned into another error."""
    code = "import sys, signal, os; sys.argv = ['cli.py', 'sample', '--checkpoint', 'a', '--model', 'b', '--prompt', 'c', '--out', 'd.mp4']\nclass Finder:\n    def find_spec(name, *_):\n        if name == 'diffusers':\n            try: os.kill(os.getpid(), signal.SIGINT)\n            except BaseException: pass\nsys.meta_path.insert(0, Finder)\nimport cli\ncli.main()"  # noqa: E501
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    expected = "stopped; nothing is damaged; the same command starts again\n"
    assert (done.returncode, done.stdout, done.stderr) == (130, "", expected)


def test_ctrl_c_ends_encode_in_a_process_of_its_own(model: Path, clips: Path, tmp_path: Path) -> None:
    """A real signal while clips are read: no traceback, and the same command completes the data set."""
    table = write_csv(tmp_path / "c.csv", [(clips / f"clip-{i % 6}.mp4", f"prompt {i}") for i in range(400)])
    options = ["--data", table, "--model", model, "--out", tmp_path / "out", *SIZE, "--shard-size", 16, "--workers", 1]
    command = [sys.executable, str(ROOT / "cli.py"), "encode", *map(str, options)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not list((tmp_path / "out").glob("shard-*.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors.splitlines()[-1] == "stopped; the same command resumes", errors
    assert "Traceback" not in errors and not (tmp_path / "out" / "manifest.json").exists()
    assert "400 records" in works("encode", *options)


@pytest.mark.parametrize(
    ("command", "remedy"),
    [
        ("encode", "the same command resumes"),
        ("distill", "the same command resumes"),
        ("evaluate", "the same command resumes"),
        ("demo", "the same command resumes"),
        ("sample", "the same command starts again"),
        ("decode", "the same command starts again"),
        ("verify", "the same command starts again"),
    ],
)
def test_ctrl_c_says_how_to_go_on(command: str, remedy: str) -> None:
    with mock.patch.object(cli.cli.commands[command], "invoke", side_effect=KeyboardInterrupt):
        required = {"verify": ["x"], "demo": []}.get(command, ["--out", "x"])
        done = call(command, *required)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.strip().startswith("stopped; ") and done.stderr.strip().endswith(remedy)
