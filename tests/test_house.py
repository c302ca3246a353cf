"""The house rules that a reader feels: short functions, files that one can hold in mind, a drawing that is true."""

from __future__ import annotations

import ast
import contextlib
import io
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("gradleak", "attacks", "defenses", "servers", "benchmarks", "examples")
FUNCTION, FILE = 60, 500
"""Most lines of a function, signature and docstring counted, and of a file."""


def _files() -> Iterator[Path]:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            # The package links to the folders of plugins, which are looked at by themselves.
            if not any(part.is_symlink() for part in (path, *path.parents)):
                yield path


@pytest.mark.parametrize("folder", FOLDERS)
def test_functions_and_files_are_short(folder: str) -> None:
    long = []
    for path in _files():
        name = path.relative_to(ROOT)
        if name.parts[0] != folder:
            continue
        text = path.read_text(encoding="utf-8")
        if (count := text.count("\n")) > FILE:
            long.append(f"{name}: {count} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                count = (node.end_lineno or node.lineno) - node.lineno + 1
                if count > FUNCTION:
                    long.append(f"{name}:{node.lineno}: {node.name} has {count} lines")
    assert not long, "\n".join(long)


def test_the_drawing_of_the_rooms_is_true() -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        runpy.run_path(str(ROOT / "benchmarks" / "rooms.py"), run_name="__main__")
    drawn = (ROOT / "docs" / "rooms.md").read_text(encoding="utf-8")
    assert printed.getvalue() == drawn, "run `python benchmarks/rooms.py > docs/rooms.md`"
