"""The README's tables say what the code says."""

import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from common.options import option_spec
from stage1_encode.config import DecodeConfig, EncodeConfig, VerifyConfig
from stage2_distill.config import DistillConfig
from stage2_distill.evaluation.config import EvaluateConfig
from stage2_distill.sampling.config import SampleConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDERS = ("common", "shards", "stage1_encode", "stage2_distill")
CONFIGS = [EncodeConfig, VerifyConfig, DistillConfig, SampleConfig, DecodeConfig, EvaluateConfig]


def shown(default: object) -> str:
    """A default as the README writes it."""
    if default is MISSING:
        return "needed"
    if isinstance(default, tuple):
        return "`" + ",".join(f"{x:g}" for x in default) + "`"
    if default is None or default == "":
        return ""
    if isinstance(default, bool):
        return "on" if default else "off"
    return "the official one" if len(str(default)) > 60 else f"`{default}`"


def row(item: object) -> str:
    """One line of an option table."""
    return f"| `--{item.name.replace('_', '-')}` | {shown(item.default)} | {option_spec(item).help} |"


def table(config: type) -> str:
    """A whole table, to be pasted into the README."""
    return "\n".join(["| option | default | meaning |", "|---|---|---|", *(row(item) for item in fields(config))])


@pytest.mark.parametrize("config", CONFIGS)
def test_every_option_with_its_default(config: type) -> None:
    assert table(config) in README, f"paste into README.md:\n{table(config)}"


def folders() -> dict[str, set[str]]:
    """Every source folder with the names of its files."""
    files = [path for top in FOLDERS for path in (ROOT / top).rglob("*.py") if path.name != "__init__.py"]
    parents = {path.parent for path in files}
    return {f"{one.relative_to(ROOT)}/": {path.stem for path in files if path.parent == one} for one in parents}


def test_one_line_for_every_folder_that_names_its_files() -> None:
    lines = [line.split(" | ", 1) for line in README.splitlines() if line.startswith("| `") and "/` | " in line]
    named = {folder[3:-1]: set(re.findall(r"`([a-z0-9_]+)`", text)) for folder, text in lines}
    assert named == folders()
