"""Pictures of truth and reconstruction, picked by rank and never by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from ..board.results import HEADLINE, Results
from ..board.store import Store, victim_list
from ..errors import GradleakError
from ..pictures import Picture, picture

QUANTILES = (0.1, 0.5, 0.9)
"""Places, in the order of PSNR, of the images that are shown; the nearest image is taken."""


def picks(rows: pd.DataFrame, by: str | Sequence[str] = "key") -> pd.DataFrame:
    """Return the rows at `QUANTILES` of each group, as many a group, with their `share`, in the order of the groups.

    Within a group images are ordered by PSNR, ties by cell, victim and image. Unmeasured images stand first, as the
    least leaked.
    """
    by = [by] if isinstance(by, str) else list(by)
    order = [*by, HEADLINE, "key", "victim", "image"]
    ordered = rows.sort_values(list(dict.fromkeys(order)), kind="stable", na_position="first", ignore_index=True)
    sizes = ordered.groupby(by, sort=True).size().to_numpy()
    starts = np.cumsum(sizes) - sizes
    chosen = [starts + np.round(share * (sizes - 1)).astype(int) for share in QUANTILES]
    found = ordered.iloc[np.stack(chosen, axis=1).ravel()].reset_index(drop=True)
    found["share"] = np.tile(QUANTILES, len(sizes))
    return found


class Pictures:
    """The pictures that stores hold of a set of results."""

    def __init__(self, results: Results, stores: Sequence[Store]):
        """Find out which store holds which cell."""
        self._owner: dict[str, Store] = {}
        for store in stores:
            for key, status in store.statuses().items():
                if status == "ok":
                    self._owner.setdefault(key, store)
        self._list = {
            key: victim_list(config) for key, config in zip(results.cells["key"], results.cells["config"], strict=True)
        }
        self._stores = list(stores)
        self._truth: dict[tuple[str, int], npt.NDArray[Any] | None] = {}

    def list_of(self, key: str) -> str:
        """Return the name of the victim list of a cell."""
        return self._list[key]

    def truth(self, key: str, victim: int, image: int) -> Picture | None:
        """Return a true image of a cell, or None where no store keeps it."""
        place = (self._list[key], victim)
        if place not in self._truth:
            self._truth[place] = next(filter(_there, (_truth(store, *place) for store in self._stores)), None)
        images = self._truth[place]
        return None if images is None or image >= len(images) else picture(images[image])

    def reconstruction(self, key: str, victim: int, matched: float) -> Picture | None:
        """Return the reconstruction of number `matched` (NaN for none), or None where no store keeps it."""
        store = self._owner.get(key)
        if store is None or not np.isfinite(matched):
            return None
        try:
            return picture(store.reconstruction(key, victim)[int(matched)])
        except (GradleakError, IndexError):  # none is kept of this victim
            return None

    def curve(self, key: str, victims: Sequence[int]) -> npt.NDArray[np.float64]:
        """Return the median over victims of the attacker's loss over its iterations, [T]; empty where none is kept."""
        store = self._owner.get(key)
        traces = [] if store is None else [_trace(store, key, victim) for victim in victims]
        length = max(map(len, traces), default=0)
        kept = [np.pad(trace, (0, length - len(trace)), mode="edge") for trace in traces if len(trace)]
        if not kept:
            return np.zeros(0)
        losses = np.ma.masked_invalid(np.array(kept))
        return np.ma.median(losses, axis=0).filled(np.nan)  # type: ignore[no-any-return, no-untyped-call]


def _there(images: npt.NDArray[Any] | None) -> bool:
    return images is not None


def _truth(store: Store, name: str, victim: int) -> npt.NDArray[Any] | None:
    try:
        return store.truth(name, victim)[0]
    except GradleakError:  # another store may keep it
        return None


def _trace(store: Store, key: str, victim: int) -> npt.NDArray[np.float64]:
    try:
        return np.asarray(store.trace(key, victim), dtype=float)
    except GradleakError:  # a closed form has no trace
        return np.zeros(0)
