"""pyproject.toml, constraints.txt, the hooks and the workflows state the same versions."""

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LINES = (ROOT / "constraints.txt").read_text().splitlines()
CONSTRAINTS = dict(line.lower().split("==") for line in LINES if not line.startswith("#"))


def requirement_name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9_-]", requirement)[0].lower()


def test_constraints_cover_all_direct_dependencies() -> None:
    extras = PROJECT["optional-dependencies"]
    tested = ("dev", "lora", "parquet", "plot", "remote", "tensorboard")
    optional = [name for extra in tested for name in extras[extra]]
    names = {requirement_name(each) for each in PROJECT["dependencies"] + optional} - {PROJECT["name"]}
    assert sorted(names - CONSTRAINTS.keys()) == []


def test_hooks_use_the_versions_of_the_constraints() -> None:
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    pins = [pin.split("==") for hook in local["hooks"] for pin in hook["additional_dependencies"]]
    assert pins
    assert [(name, version) for name, version in pins if CONSTRAINTS[name] != version] == []


def test_workflow_runs_each_python_version_that_is_declared() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
    prefix = "Programming Language :: Python :: 3."
    declared = [item.removeprefix(prefix) for item in PROJECT["classifiers"] if item.startswith(prefix)]
    assert workflow["jobs"]["cpu"]["strategy"]["matrix"]["python"] == [f"3.{minor}" for minor in declared]
    assert PROJECT["requires-python"] == f">=3.{declared[0]}"


def test_each_package_is_marked_as_typed() -> None:
    packages = {path.parent for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests"}
    assert packages
    assert [path.name for path in packages if not (path / "py.typed").is_file()] == []
