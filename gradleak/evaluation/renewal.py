"""Why cells that a store has from older code are computed anew, in a line for each reason."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..board.newest import PARTS, part_of
from ..board.store import Store
from ..suite import Cell, question_of


def reasons(store: Store, cells: Sequence[Cell]) -> list[str]:
    """Return a line for each change of code because of which cells are computed anew.

    Args:
        store: what is there.
        cells: those that it lacks.
    """
    if not cells:
        return []
    older: dict[str, tuple[Mapping[str, Any], str]] = {}
    for text, started in store.query("SELECT config, started FROM cells ORDER BY started"):
        config = json.loads(text)
        older[question_of(config)] = config, started
    found: dict[str, list[str]] = defaultdict(list)
    for cell in cells:
        before = older.get(question_of(stored := cell.stored()))
        if before is not None:
            found[" and ".join(_changes(before[0], stored)) or "the prior's code"].append(before[1])
    return [
        f"{len(since)} cell{'s are' if len(since) > 1 else ' is'} computed anew: {what} changed since {max(since)}"
        for what, since in found.items()
    ]


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    for kind in PARTS:
        old, new = part_of(before, kind), part_of(after, kind)
        if any(old.get(mark) != new.get(mark) for mark in ("code", "version")):
            yield f"the code of {kind} {new['name']!r}"
    if before.get("definitions") != after.get("definitions"):
        yield "the engine or a metric"
