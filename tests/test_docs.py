"""The commands in README and docs exist, with their options; both languages say the same."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from cli import cli

ROOT = Path(__file__).parent.parent
PAGES = (*sorted(ROOT.glob("README*.md")), *sorted((ROOT / "docs").glob("*.md")))
TRANSLATIONS = [(path, path.with_suffix("").with_suffix(".md")) for path in sorted((ROOT / "docs").glob("*.zh.md"))]


def code_blocks(page: Path) -> list[str]:
    """The fenced blocks of a page, without their fences."""
    return re.findall(r"^```[a-z]*\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def documented_commands(page: Path) -> Iterator[list[str]]:
    """The words after `cli.py` of every command in a page's code."""
    for block in code_blocks(page):
        for line in block.replace("\\\n", " ").splitlines():
            before, found, words = line.partition("cli.py ")
            if found and re.match(r"\s*(python|torchrun) ", before):
                yield shlex.split(words.replace("<(...)", "PIPE"), comments=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_commands_have_these_options(page: Path) -> None:
    for command, *words in documented_commands(page):
        parameters = cli.commands[command].get_params(click.Context(cli.commands[command]))
        known = {option for parameter in parameters for option in (*parameter.opts, *parameter.secondary_opts)}
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert options <= known, f"{page.name}: {command}: {sorted(options - known)}"


def outline(page: Path) -> tuple[list[int], list[str], list[int]]:
    """Levels of the headings, code blocks, and numbers of columns of the tables of a page."""
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = [len(marks) for marks in re.findall(r"^(#+) ", prose, re.MULTILINE)]
    tables = [rule.count("|") for rule in re.findall(r"^(\|[-|: ]+\|)$", prose, re.MULTILINE)]
    return headings, code_blocks(page), tables


@pytest.mark.parametrize(
    ("translation", "original"),
    [("docs/getting_started.zh.md", "docs/getting_started.md"), ("README.zh-CN.md", "README.md")],
)
def test_both_languages_have_the_same_headings_code_and_tables(translation: str, original: str) -> None:
    assert outline(ROOT / translation) == outline(ROOT / original)


def test_readme_is_short_and_the_first_commands_come_early() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert 150 <= len(lines) <= 200
    assert any("make demo" in line for line in lines[:25])


def test_every_translation_has_its_page_and_only_its_commands() -> None:
    assert TRANSLATIONS
    for translation, original in TRANSLATIONS:
        assert set(code_blocks(translation)) <= set(code_blocks(original)), translation.name
