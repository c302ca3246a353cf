"""What a suite asks, for commands that keep or show its cells and no other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def questions(path: Path, data_root: Path | None = None, plugins: Sequence[Path] = ()) -> frozenset[str]:
    """Return the questions of a suite's cells (`gradleak.suite.question_of`).

    Raises:
        GradleakError: the suite or a plugin file is not as it should be, or a dataset is missing.
    """
    from .. import registry, suite
    from ..evaluation.workshop import Resources, Workshop

    for plugin in plugins:
        registry.add_file(plugin)
    cells = suite.expand(suite.read(path), Workshop(Resources(data_root=data_root)).digest, data_root)
    return frozenset(suite.question_of(cell.stored()) for cell in cells)
