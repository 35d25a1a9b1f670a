"""docs/architecture.md and docs/options.md say what the code says."""

import re
from pathlib import Path

from tests import recipe_plans
from tests.option_tables import PAGE, options_page

ROOT = Path(__file__).parent.parent
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
FOLDERS = ("common", "shards", "stage1_encode", "stage2_distill", "commands")


def test_option_tables_are_those_of_the_configurations() -> None:
    assert PAGE.read_text(encoding="utf-8") == options_page(), "run `python -m tests.option_tables`"


def test_plans_of_the_recipes_are_those_of_the_command() -> None:
    page = recipe_plans.PAGE.read_text(encoding="utf-8")
    assert page.endswith(recipe_plans.recipe_plans()), "run `python -m tests.recipe_plans`"


def folders() -> dict[str, set[str]]:
    """Every source folder with the names of its files."""
    files = [path for top in FOLDERS for path in (ROOT / top).rglob("*.py") if path.name != "__init__.py"]
    parents = {path.parent for path in files}
    return {f"{one.relative_to(ROOT)}/": {path.stem for path in files if path.parent == one} for one in parents}


def test_one_line_for_every_folder_that_names_its_files() -> None:
    lines = [line.split(" | ", 1) for line in ARCHITECTURE.splitlines() if line.startswith("| `") and "/` | " in line]
    named = {folder[3:-1]: set(re.findall(r"`([a-z0-9_]+)`", text)) for folder, text in lines}
    assert named == folders()
