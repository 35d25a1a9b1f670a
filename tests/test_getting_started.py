"""Every command of getting started, README, planning and sampling runs as it stands there, on the nano model."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from cli import cli
from tests.test_docs import documented_commands

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "getting_started.md"
SMALL = {
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": "examples/nano/model",
    "MODEL": "examples/nano/model",
    "recipes/wan22-ti2v-5b.yaml": "examples/nano/demo.yaml",
}
FAST_OPTIONS = {
    "encode": "--device cpu --config examples/nano/encode.yaml",
    "distill": "--device cpu --iterations 2 --batch-size 2 --global-batch 2 --checkpoint-every 2 --critic-warmup 0 "
    "--max-text-tokens 128",
    "sample": "--device cpu --dtype float32 --max-text-tokens 128",
}
CALIBRATION = "device=cpu compile=false dtype=float32 num_frames=9 height=64 width=64 max_text_tokens=16"


def run_command(words: list[str]) -> str:
    """Run a documented command on the nano model; returns its output."""
    fast = FAST_OPTIONS.get(words[0], "").split()
    if "--calibrate" in words:
        fast = [word for value in CALIBRATION.split() for word in ("--set", value)]
    small = {"MODEL": SMALL["MODEL"]} if words[0] == "plan" else SMALL  # a plan needs no GPU
    words = [small.get(word, word) for word in words]
    result = CliRunner().invoke(cli, [*words, *fast], catch_exceptions=False)
    assert not result.exit_code, (words, result.output)
    return result.output


@pytest.fixture
def newcomer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone as a newcomer has it, with two clips, a picture and a short run in place of the demo's."""
    monkeypatch.chdir(tmp_path)
    for name in ("examples", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "holiday").mkdir()
    nano = ROOT / "examples" / "nano"
    for name, source in (("holiday/boat.mp4", "clips/000000.mp4"), ("holiday/dog.mov", "clips/000001.mp4")):
        (tmp_path / name).write_bytes((nano / source).read_bytes())
    (tmp_path / "first.png").write_bytes((nano / "images/00.png").read_bytes())
    (table,) = [block for block in PAGE.read_text().split("```\n") if block.startswith("video,prompt")]
    (tmp_path / "clips.csv").write_text(table)
    model = ["--model", "examples/nano/model"]
    run_command(["encode", "--data", "clips.csv", *model, "--out", "demo/data"])
    run_command(
        ["distill", "--config", "examples/nano/demo.yaml", "--shards", "demo/data", *model, "--out", "demo/run"]
    )
    return tmp_path


def test_commands_of_the_first_hour(newcomer: Path) -> None:
    for words in documented_commands(PAGE):
        run_command(words)
    assert (newcomer / "mine.mp4").stat().st_size > 1000
    assert (newcomer / "frames.png").is_file()
    assert (newcomer / "boat.mp4").stat().st_size > 1000
    assert (newcomer / "my-model" / "model_index.json").is_file()
    run_other_pages(newcomer, list(documented_commands(PAGE)))


def run_other_pages(newcomer: Path, done: list[list[str]]) -> None:
    """The commands of pages that use DATA and RUN, which getting started makes; each once."""
    (newcomer / "prompts.csv").write_text("prompt,image\nA boat turns into the wind.,first.png\n")
    for page in (ROOT / "README.md", PAGE.parent / "planning.md", PAGE.parent / "sampling.md"):
        for words in documented_commands(page):
            if words not in done and words[0] not in ("encode", "distill", "ui"):  # the last serves until it is stopped
                run_command(words)
                done.append(words)
    for made in ("my-student/README.md", "my-file/my-file.safetensors", "my-adapter/README.md", "videos/latents.zarr"):
        assert (newcomer / made).exists(), made
