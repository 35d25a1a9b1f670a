"""Every command and the Python lines of docs/use_elsewhere.md run as they stand there, on the nano model."""

from pathlib import Path

import numpy
import pytest

from common.flow import timestep_sigmas
from common.options import read_yaml
from tests.test_docs import code_blocks, documented_commands
from tests.test_getting_started import ROOT, newcomer, run_command

PAGE = ROOT / "docs" / "use_elsewhere.md"
__all__ = ["newcomer"]  # a fixture


def test_commands_and_lines_of_the_page(newcomer: Path) -> None:
    (lines,) = [block for block in code_blocks(PAGE) if block.startswith("import torch")]
    for words in documented_commands(PAGE):
        run_command(words)
    scope: dict[str, object] = {}
    exec(lines, scope)  # noqa: S102  # a page of this repository
    video = numpy.asarray(scope["video"])
    assert video.shape == (17, 64, 96, 3) and numpy.isfinite(video).all() and video.std() > 0.01
    for made in ("boats/README.md", "my-file/my-file.safetensors", "my-adapter/README.md", "elsewhere.mp4"):
        assert (newcomer / made).stat().st_size > 1000, made
    assert len(list((newcomer / "from-file").glob("step-*"))) == 1
    assert len(list((newcomer / "with-style").glob("step-*"))) == 1


def test_recipe_for_servers() -> None:
    options = read_yaml(str(ROOT / "recipes" / "wan22-ti2v-5b-3step.yaml"))
    sigmas = timestep_sigmas(options["timesteps"], s=options["shift"])
    assert [1000 * sigma for sigma in sigmas] == pytest.approx([1000, 757, 522], abs=1e-8)
