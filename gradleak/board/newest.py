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

_GROUPS = ("attack", "defense", "model", "dataset")


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
    for group in _GROUPS:
        label = cells[group] + "\x1f" + cells[f"{group}_name" if f"{group}_name" in cells else group]
        code = pd.Series([_code(config, group) for config in cells["config"]], index=cells.index, dtype=str)
        latest = began.groupby([label, code]).transform("max")
        current &= latest == latest.groupby(label).transform("max")
    if left := int((~current).sum()):
        log.warning("%d cells of older code are not shown; --all-code shows them", left)
    return cells[current]


def _code(config: Mapping[str, Any], group: str) -> str:
    """Return the code that a part was computed with; the engine and the metrics count as the attack's."""
    shared = json.dumps(config.get("definitions"), sort_keys=True) if group == "attack" else ""
    return f"{config[group].get('version')}\x1f{config[group].get('code')}\x1f{shared}"
