"""Figures of the source's structure: sizes, names, comments and imports, of this checkout and of another one beside it.

    python -m benchmarks.structure [--tree OTHER_CHECKOUT]

The source is common, shards, stage1_encode, stage2_distill, commands and cli.py. Lines count everything in a file.
Function
lengths leave the docstring out. Comments are comment tokens per 100 lines. Names are those of functions, methods and
classes without dunder names; a name's words are its parts between underscores or capitals.
"""

import argparse
import ast
import io
import re
import statistics
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

FOLDERS = ("common", "shards", "stage1_encode", "stage2_distill", "commands")
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Structure:
    """What one checkout measures."""

    files: int
    lines: int
    file_lines_median: float
    file_lines_max: int
    folders: int
    files_in_a_folder_max: int
    functions: int
    function_lines_median: float
    function_lines_p95: int
    function_lines_max: int
    arguments_max: int
    annotated_percent: float
    comments_per_100_lines: float
    names_of_two_words_percent: float
    words_in_a_name_median: float
    import_depth: int
    files_in_cycles: int


def source_files(tree: Path) -> list[Path]:
    """All source files with code, in order."""
    paths = [path for folder in FOLDERS for path in (tree / folder).rglob("*.py")] + [tree / "cli.py"]
    return sorted(path for path in paths if path.read_text(encoding="utf-8").strip())


def function_lines(function: Function) -> int:
    """Lines of a function from its `def` to its end, without decorators and docstring."""
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None and first.end_lineno is not None:
        lines -= first.end_lineno - first.lineno + 1
    return lines


def arguments(function: Function) -> list[ast.arg]:
    """A function's arguments without self and cls."""
    given = function.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    return [argument for argument in every if argument.arg not in ("self", "cls")]


def word_count(name: str) -> int:
    """Number of words in a name, such as 2 in `load_vae` and `PhaseTimer`."""
    return len(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+", name))


def count_comments(text: str) -> int:
    """Number of comment tokens in a file."""
    return sum(token.type == tokenize.COMMENT for token in tokenize.generate_tokens(io.StringIO(text).readline))


def imported_files(path: Path, tree: Path) -> Iterator[Path]:
    """Source files that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        for module in modules:
            candidate = tree / (module.replace(".", "/") + ".py")
            if candidate.is_file():
                yield candidate


def import_figures(paths: list[Path], tree: Path) -> tuple[int, int]:
    """Longest chain of imports, in files, and the number of files that import themselves in the end."""
    graph = {path: set(imported_files(path, tree)) & set(paths) for path in paths}

    @cache
    def reachable(path: Path) -> frozenset[Path]:
        seen: set[Path] = set()
        todo = list(graph[path])
        while todo:
            current = todo.pop()
            if current not in seen:
                seen.add(current)
                todo += graph[current]
        return frozenset(seen)

    in_cycles = {path for path in paths if path in reachable(path)}

    @cache
    def depth(path: Path) -> int:
        below = [depth(other) for other in graph[path] if path not in reachable(other)]
        return 1 + max(below, default=0)

    return max(map(depth, paths)), len(in_cycles)


def measure_structure(tree: Path) -> Structure:
    """Measure one checkout."""
    paths = source_files(tree)
    texts = [path.read_text(encoding="utf-8") for path in paths]
    nodes = [node for text in texts for node in ast.walk(ast.parse(text))]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    named = [node.name for node in nodes if isinstance(node, Function | ast.ClassDef)]
    words = [word_count(name) for name in named if not name.startswith("__")]
    lengths = sorted(function_lines(function) for function in functions)
    file_lines = [len(text.splitlines()) for text in texts]
    every_argument = [argument for function in functions for argument in arguments(function)]
    in_folder = [sum(path.parent == folder for path in paths) for folder in {path.parent for path in paths}]
    depth, in_cycles = import_figures(paths, tree)
    return Structure(
        files=len(paths),
        lines=sum(file_lines),
        file_lines_median=statistics.median(file_lines),
        file_lines_max=max(file_lines),
        folders=len(in_folder),
        files_in_a_folder_max=max(in_folder),
        functions=len(functions),
        function_lines_median=statistics.median(lengths),
        function_lines_p95=lengths[int(0.95 * len(lengths))],
        function_lines_max=max(lengths),
        arguments_max=max(len(arguments(function)) for function in functions),
        annotated_percent=100 * statistics.mean(argument.annotation is not None for argument in every_argument),
        comments_per_100_lines=100 * sum(map(count_comments, texts)) / sum(file_lines),
        names_of_two_words_percent=100 * statistics.mean(count > 1 for count in words),
        words_in_a_name_median=statistics.median(words),
        import_depth=depth,
        files_in_cycles=in_cycles,
    )


def main() -> None:
    """Print a table of one or two checkouts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, help="another checkout, printed in the first column")
    other = parser.parse_args().tree
    trees = ([other] if other else []) + [Path(__file__).parent.parent]
    measured = [measure_structure(tree) for tree in trees]
    for item in fields(Structure):
        values = (vars(structure)[item.name] for structure in measured)
        print(f"| {item.name.replace('_', ' ')} | " + " | ".join(f"{value:.5g}" for value in values) + " |")


if __name__ == "__main__":
    main()
