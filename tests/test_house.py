"""The house rules: floors, doors and the three locks between the stages, each shown to bite."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    "common": {"common"},
    "shards": {"common", "shards"},
    "stage1_encode": {"common", "shards", "stage1_encode"},
    "stage2_distill": {"common", "shards", "stage2_distill"},
    "cli": {"common", "shards", "stage1_encode", "stage2_distill", "cli"},
}
DOORS = {  # library -> the only files that may import it
    "diffusers": {
        "stage1_encode/vae.py",
        "stage2_distill/wan.py",
        "stage2_distill/network.py",
        "stage2_distill/export.py",
    },
    "transformers": {"stage1_encode/text.py", "stage1_encode/clip.py"},
    "decord": {"stage1_encode/frames.py"},
    "av": {"stage1_encode/frames.py", "stage1_encode/mp4.py"},
    "zarr": {"shards/latents.py"},
    "webdataset": {"shards/"},
    "click": {"cli.py", "common/options.py"},
    "peft": {"stage2_distill/lora.py"},
    "matplotlib": {"stage2_distill/plot.py"},
    "wandb": {"stage2_distill/boards.py"},
    "pickle": set(),
}
FORBIDDEN_IN_STAGE_TWO = (
    "stage1_encode",
    "decord",
    "AutoencoderKLWan",
    "UMT5EncoderModel",
    "autoencoders",
)
FORBIDDEN_LIBRARY = "transformers"  # its own modules; diffusers.models.transformers is where the denoiser lives


def sources() -> dict[str, str]:
    """Every product file, {path from the root: text}."""
    folders = [name for name in FLOORS if name != "cli"]
    files = [path for name in folders for path in (ROOT / name).rglob("*.py")]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in [*files, ROOT / "cli.py"]}


def imports(text: str) -> list[tuple[str, int]]:
    """Every module imported anywhere in a file, lazily and under TYPE_CHECKING too, with its depth of `from` dots."""
    found: list[tuple[str, int]] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [(alias.name, 0) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(f"{node.module or ''}.{alias.name}", node.level) for alias in node.names]
    return found


def violations(files: dict[str, str]) -> list[str]:
    """What breaks the floor table or the door table."""
    found = []
    for path, text in files.items():
        floor = path.split("/")[0].removesuffix(".py")
        for module, level in imports(text):
            top = module.split(".")[0]
            if level:
                found.append(f"{path}: relative import")
            if top in FLOORS and top not in FLOORS[floor]:
                found.append(f"{path}: {floor} may not import {top}")
            if top in DOORS and not any(path.startswith(door) for door in DOORS[top]):
                found.append(f"{path}: {top} comes in by {sorted(DOORS[top])} only")
            if top == "torch" and path.endswith("config.py"):
                found.append(f"{path}: torch in a configuration")
        if path.endswith("__init__.py") and text.strip():
            found.append(f"{path}: code in __init__.py")
    return found


def lock_violations(files: dict[str, str]) -> list[str]:
    """Lock 1: what stage two names of stage one, a VAE or a text encoder; and the reverse."""
    found = []
    for path, text in files.items():
        names = {module for module, _ in imports(text)}
        if path.startswith("stage2_distill/"):
            found += [f"{path}: {n}" for n in names for bad in FORBIDDEN_IN_STAGE_TWO if bad in n]
            found += [f"{path}: {n}" for n in names if n.split(".")[0] == FORBIDDEN_LIBRARY]
        if path.startswith("stage1_encode/"):
            found += [f"{path}: {n}" for n in names if n.startswith("stage2_distill")]
    return found


def test_floors_and_doors() -> None:
    assert violations(sources()) == []


@pytest.mark.parametrize(
    ("path", "line", "broken"),
    [
        ("common/flow.py", "import shards.record", "may not import shards"),
        ("shards/read.py", "from stage1_encode import rows", "may not import stage1_encode"),
        ("stage1_encode/rows.py", "from stage2_distill.wan import load", "may not import stage2_distill"),
        ("stage2_distill/train.py", "from diffusers import WanTransformer3DModel", "comes in by"),
        ("stage1_encode/rows.py", "import decord", "comes in by"),
        ("stage2_distill/config.py", "import torch", "torch in a configuration"),
        ("shards/__init__.py", "import torch", "code in __init__"),
        ("shards/read.py", "from . import record", "relative import"),
        ("shards/read.py", "import pickle", "comes in by"),
    ],
)
def test_floors_and_doors_bite(path: str, line: str, broken: str) -> None:
    assert any(broken in found for found in violations({path: line}))


def test_lock_1_no_stage_names_the_other() -> None:
    assert lock_violations(sources()) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("stage2_distill/train.py", "def f():\n    from stage1_encode.vae import decode"),
        ("stage2_distill/train.py", "if TYPE_CHECKING:\n    import stage1_encode.text"),
        ("stage2_distill/wan.py", "from diffusers import AutoencoderKLWan"),
        ("stage2_distill/sample.py", "import decord"),
        ("stage2_distill/network.py", "from transformers import T5EncoderModel"),
        ("stage1_encode/encode.py", "def f():\n    import stage2_distill.wan"),
    ],
)
def test_lock_1_bites(path: str, text: str) -> None:
    assert lock_violations({path: text})


CLEAN = """
import sys
import stage2_distill.run, stage2_distill.sample
{extra}
names = ("stage1_encode", "decord", "diffusers.models.autoencoders.autoencoder_kl_wan", "transformers.models.umt5")
bad = [m for m in sys.modules if m.startswith(names)]
sys.exit(f"loaded: {{bad}}" if bad else 0)
"""


@pytest.mark.parametrize(("extra", "code"), [("", 0), ("import stage1_encode.config", 1)])
def test_lock_2_importing_the_trainer_loads_nothing_of_stage_one(extra: str, code: int) -> None:
    done = subprocess.run([sys.executable, "-c", CLEAN.format(extra=extra)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr


def test_help_is_quick_and_loads_no_torch() -> None:
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "cli.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert time.perf_counter() - began < 5  # the figure itself, under 0.3 s, is printed by `time python cli.py --help`
    assert "distill" in done.stdout
    probe = "import sys, cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], cwd=ROOT).returncode == 0
