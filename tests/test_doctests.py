"""Examples in docstrings: what they show is so."""

from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = (
    "board.statistics",
    "cli.values",
    "errors",
    "knowledge",
    "paths",
    "privacy",
    "registry",
    "scales",
    "seeds",
    "suite.parts",
    "testing",
    "update",
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings_are_right(name: str) -> None:
    found = doctest.testmod(importlib.import_module(f"gradleak.{name}"))
    assert found.attempted and not found.failed


def test_there_are_enough_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    told = [
        each.name
        for name in MODULES
        for each in finder.find(importlib.import_module(f"gradleak.{name}"))
        if each.examples
    ]
    assert len(told) >= 25, told
