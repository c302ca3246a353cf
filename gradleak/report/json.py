"""Boards as JSON, every column, unrounded."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from ..board.leaderboard import Board
from ..paths import printable


def write(boards: Sequence[Board]) -> str:
    """Return `{"boards": [{"name", "title", "notes", "strong", "rows"}]}`; what was not measured is null."""
    found = [
        {
            "name": board.name,
            "title": board.title,
            "notes": list(board.notes),
            "strong": sorted(board.strong),
            "rows": [
                {str(name): _plain(value) for name, value in line.items()} for line in board.table.to_dict("records")
            ],
        }
        for board in boards
    ]
    text = json.dumps({"boards": found}, indent=2, ensure_ascii=False, allow_nan=False)
    # JSON allows marks that steer a terminal; written out they are the same data.
    return printable(text, keep="\n", form=lambda mark: json.dumps(mark)[1:-1]) + "\n"


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    missing = value is None or value is pd.NA or (isinstance(value, float) and not math.isfinite(value))
    return None if missing else value
