"""Which cells a board shows: those of the newest code under each label, and of a suite if one is named."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from typing import Any

import pandas as pd

from ..errors import GradleakError
from ..suite import question_of

log = logging.getLogger(__name__)

_OF_SETTINGS = ("server", "client")
"""Parts that stand under the label of their setting."""
PARTS = ("attack", "defense", "model", "dataset", *_OF_SETTINGS)
"""What has code; the engine and the metrics count as the attack's."""


def chosen(cells: pd.DataFrame, all_code: bool = False, asked: Collection[str] | None = None) -> pd.DataFrame:
    """Return the cells to show.

    Args:
        cells: as `Store.cells`.
        all_code: also those of code that a label no longer stands for.
        asked: show these questions only (`gradleak.suite.question_of`).

    Raises:
        GradleakError: none of the questions is answered.
    """
    if asked is not None:
        cells = cells[[question_of(config) in asked for config in cells["config"]]]
        if not len(cells):
            raise GradleakError("no cell of the suite is stored; fill the store with `gradleak run`")
    return cells if all_code else _newest(cells)


def _newest(cells: pd.DataFrame) -> pd.DataFrame:
    current = pd.Series(True, index=cells.index)
    # Of two cells that began in the same second the later line is the newer; a cell without a time is never newer.
    began = cells["started"] + [f" {number:010d}" for number in cells["id"]]
    began = began.where(cells["started"] != "", "")
    for kind in PARTS:
        parts = [part_of(config, kind) for config in cells["config"]]
        label = cells["setting" if kind in _OF_SETTINGS else kind] + [f"\x1f{part.get('name')}" for part in parts]
        code = pd.Series([_code(part) for part in parts], index=cells.index, dtype=str)
        if kind == "attack":
            code += [json.dumps(config.get("definitions"), sort_keys=True) for config in cells["config"]]
        latest = began.groupby([label, code]).transform("max")
        current &= latest == latest.groupby(label).transform("max")
    if left := int((~current).sum()):
        log.warning("%d cells of older code are not shown; --all-code shows them", left)
    return cells[current]


def part_of(config: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """Return a part of a cell; empty for an honest server or a plain client."""
    found: Mapping[str, Any] = (config["setting"] if kind in _OF_SETTINGS else config).get(kind, {})
    return found


def _code(part: Mapping[str, Any]) -> str:
    return f"{part.get('version')}\x1f{part.get('code')}\x1f"
