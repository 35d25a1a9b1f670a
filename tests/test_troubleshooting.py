"""docs/troubleshooting.md has a row for every message of the program, and none for a message that no longer exists.

A message is compared by its fixed words: what is filled in, and every CAPITAL word, is a placeholder.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.test_house import sources

PAGE = Path(__file__).parent.parent / "docs" / "troubleshooting.md"
INTERNAL_ERRORS = {"AssertionError", "IndexError", "KeyError", "EOFError", "SystemExit", "NotImplementedError"}
REPORTERS = {"warning", "warn", "DataProblem", "add_problem", "MetricBounds", "Finding"}  # what they get is shown
# A reason is returned by such a function, kept under such a name, added to such a list or written in such a table.
REASON_FUNCTIONS = re.compile(
    r"\w*(problems?|reason|damage|message|warning|emptiness|differences|outliers)"
    r"|_?(describe_(changes|owner)|explain_missing_file|unknown_names|restart_process)"
)
REASON_NAMES = re.compile(r"problem|reason|error|state|cause|failure|warning|location|hint")
REASON_LISTS = {"problems", "reasons", "refused", "warnings", "outliers"}
REASON_TABLES = {
    *("SPECIAL_PATHS", "MAGIC_BYTES", "ALLOWED_VALUES", "LOGIN_HINTS"),
    *("UNTAGGED_AS_601", "UNTAGGED_AS_709", "UNUSABLE"),
}
NOT_SHOWN = {  # alone: parts of other texts, or caught where they are raised
    *(" so far", "the whole file", "the last checkpoint was not finished", "heads of {} in {}"),
    *("the header is longer than the file", "{} lies outside the file", "a profile of {} in a picture of {}"),
}
GAP = "…"
FORMAT = re.compile(r"%[-+.0-9]*[sdfgr]")
MIN_WORDS = 2  # fewer fixed words only carry another message
HEADER = "| message | cause | cure |"


def normalize(text: str) -> str:
    """A message with one mark for each run of placeholders."""
    text = FORMAT.sub(GAP, text.replace("{}", GAP).replace("...", GAP)).replace("%%", "%")
    text = re.sub(rf"\w*{GAP}\w*", GAP, re.sub(r"\b[A-Z][A-Z0-9]*(?=\b|_)", GAP, text))
    text = re.sub(rf"['\"(]*{GAP}['\")]*", GAP, re.sub(rf"{GAP}(\W*{GAP})+", GAP, text))
    return " ".join(text.replace("`", "").split()).strip(",;: ")


def is_message(text: str) -> bool:
    """Whether a normalized text says something by itself, and is no name, pattern or page."""
    words = re.findall(r"(?<!\S)\W?[A-Za-z][a-z'-]+[,;:.)\"]*(?!\S)", text)
    return len(words) >= MIN_WORDS and "|" not in text


def read_text(node: ast.AST, constants: Mapping[str, str]) -> str | None:
    """The text of a literal, an f-string or a constant, with {} for what is filled in; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.Name):
        return constants.get(node.id)
    if isinstance(node, ast.FormattedValue):
        return read_text(node.value, constants) or "{}" if isinstance(node.value, ast.Name) else "{}"
    if isinstance(node, ast.JoinedStr):
        return "".join(read_text(part, constants) or "" for part in node.values)
    return None


def texts_below(node: ast.AST, constants: Mapping[str, str]) -> Iterator[str]:
    """The outermost texts within a node; those that an f-string or a comparison merely contains are not messages."""
    text = read_text(node, constants)
    if text is not None:
        yield text
    elif not isinstance(node, ast.Compare | ast.FormattedValue | ast.Subscript):
        for child in ast.iter_child_nodes(node):
            yield from texts_below(child, constants)


def called_name(node: ast.AST) -> str:
    """The last part of the name of what a call calls."""
    function = node.func if isinstance(node, ast.Call) else None
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def is_reason_target(node: ast.AST) -> bool:
    """Whether an assignment keeps a reason: in a variable, an attribute or an entry."""
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    parts = [part for target in targets if target for part in getattr(target, "elts", [target])]
    names = {re.sub(r".*?(\w+)('\])?$", r"\1", ast.unparse(part)) for part in parts}
    return bool(names & REASON_TABLES) or any(REASON_NAMES.fullmatch(name) for name in names)


def message_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a file whose texts are shown to a user."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and called_name(node.exc or node) not in INTERNAL_ERRORS:
            yield from getattr(node.exc, "args", [])
        elif isinstance(node, ast.Call):
            holder = getattr(node.func, "value", None)
            is_added = called_name(node) == "append" and ast.unparse(holder or node).split(".")[-1] in REASON_LISTS
            is_report = called_name(node) in REPORTERS and not any(ast.unparse(part) == "OK" for part in node.args)
            if is_added or is_report:
                yield from node.args
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None and is_reason_target(node):
            yield node.value
        elif isinstance(node, ast.FunctionDef) and REASON_FUNCTIONS.fullmatch(node.name):
            returns = (part for part in ast.walk(node) if isinstance(part, ast.Return | ast.Yield))
            yield from (part.value for part in returns if part.value is not None)


def string_constants(files: Mapping[str, str]) -> dict[str, str]:
    """Upper-case names of module-level strings that mean the same everywhere, and their texts."""
    found: dict[str, set[str]] = {}
    for text in files.values():
        for node in ast.parse(text).body:
            pairs = [(node.targets[0], node.value)] if isinstance(node, ast.Assign) else []
            if pairs and isinstance(pairs[0][0], ast.Tuple) and isinstance(pairs[0][1], ast.Tuple):
                pairs = list(zip(pairs[0][0].elts, pairs[0][1].elts, strict=False))
            for target, value in pairs:
                if isinstance(target, ast.Name) and (content := read_text(value, {})):
                    found.setdefault(target.id, set()).add(content)
    return {name: values.pop() for name, values in found.items() if len(values) == 1}


def collect_messages(files: Mapping[str, str]) -> dict[str, str]:
    """Every message of the program: its text by its normalized form."""
    constants, messages = string_constants(files), dict[str, str]()
    for text in files.values():
        for node in message_nodes(ast.parse(text)):
            messages |= {normalize(one): one for one in texts_below(node, constants) if one not in NOT_SHOWN}
    return messages


def table_rows(page: str) -> Iterator[list[str]]:
    """The cells of each row of the tables of messages."""
    is_inside = False
    for line in page.splitlines():
        is_inside = line == HEADER or (is_inside and line.startswith("|"))
        if is_inside and line.startswith("| `"):
            yield [cell.strip() for cell in line.strip("|").split(" | ")]


def documented_messages(page: str) -> dict[str, str]:
    """The messages of a page as it writes them, by their normalized form."""
    return {normalize(one): one for cell, *_ in table_rows(page) for one in re.findall(r"`([^`]+)`", cell)}


def page_faults(page: str, messages: Mapping[str, str]) -> list[str]:
    """Rows that a page lacks, ready to be filled in, and messages that nothing says any more."""
    documented = documented_messages(page)
    missing = [f"| `{text}` |  |  |" for key, text in messages.items() if is_message(key) and key not in documented]
    return sorted(missing) + [f"no longer said: {text}" for key, text in documented.items() if key not in messages]


def test_every_message_has_its_row_and_every_row_its_message() -> None:
    faults = page_faults(PAGE.read_text(encoding="utf-8"), collect_messages(sources()))
    assert not faults, "\n".join(["docs/troubleshooting.md:", *faults])


def test_every_row_has_a_cause_and_a_cure() -> None:
    rows = list(table_rows(PAGE.read_text(encoding="utf-8")))
    assert len(rows) > 200
    assert [row for row in rows if len(row) != 3 or not all(row)] == []


def frequent_symptoms(text: str) -> list[str]:
    """The first column of the first table after the heading of the most frequent problems."""
    table = text.partition("| what you see |")[2].partition("\n\n")[0]
    return [line.split(" | ")[0].strip("| ") for line in table.splitlines()[2:]]


def test_readme_has_the_same_five_problems() -> None:
    readme = (PAGE.parent.parent / "README.md").read_text(encoding="utf-8")
    symptoms = frequent_symptoms(PAGE.read_text(encoding="utf-8"))
    assert len(symptoms) == 5
    assert symptoms == frequent_symptoms(readme)


SOURCE = """
PART, OTHER = "plan.json", 3
TABLE_HINT = "not a message"
def find_problem(x):
    return f"the file {x} is odd"
def work(x, name):
    logging.warning("%s: is slow; wait %.1f s", x, 2.0)
    raise AssertionError("an internal fault of ours")
    problem = "is red" if x else "is blue"
    header["reason"] = "needs more memory"
    report.problems.append(f"{x} and {name!r} differ")
    raise ValueError(f"out={x}: {problem}")
    raise ReadError(f"out={x}: holds no {PART}; copy it")
"""
ROWS = [
    "the file NAME is odd", "NAME: is slow; wait N s", "is red", "is blue", "needs more memory",
    "ONE and 'OTHER' differ", "out=FOLDER: holds no plan.json; copy it",
]  # fmt: skip


def page_of(rows: list[str]) -> str:
    return "\n".join([HEADER, "|---|---|---|", *(f"| `{row}` | cause | cure |" for row in rows)])


def test_messages_are_found_in_all_forms() -> None:
    assert page_faults(page_of(ROWS), collect_messages({"x.py": SOURCE})) == []


@pytest.mark.parametrize("index", range(len(ROWS)))
def test_a_missing_row_bites(index: int) -> None:
    (fault,) = page_faults(page_of(ROWS[:index] + ROWS[index + 1 :]), collect_messages({"x.py": SOURCE}))
    assert fault.endswith("|  |  |")


def test_an_old_row_bites() -> None:
    page = page_of([*ROWS, "out=FOLDER: was removed long ago"])
    assert page_faults(page, collect_messages({"x.py": SOURCE})) == ["no longer said: out=FOLDER: was removed long ago"]
