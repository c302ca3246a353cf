"""Luck: whoever makes a store can draw its secret many times. Cells are drawn anew with a secret of the verifier's.

One draw of M that was chosen as the best looks like an honest one that was one in M lucky, and lies about
sqrt(2 ln M) standard errors off. So what was chosen among hundreds cannot be told from luck, and is not refused; what
no honest store in `RARE` shows is. The difference itself is said, for whoever wants to know which way it lies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from ... import secret
from ...scales import CAP
from ...suite import AttackCell
from .again import DECIBELS, Reruns
from .findings import Finding

RARE = 10_000
"""One honest bundle in so many is refused."""

Unit = tuple[object, ...]
"""A victim: two cells that attack it share its image."""


@dataclass(frozen=True)
class Gap:
    """By how much the PSNR of an attack's, or a defense's, victims lies above what a new secret gives."""

    what: str
    mean: float
    """dB; published less new."""
    error: float
    """Standard error, over victims."""
    chance: float
    """Of a mean as far from 0 where nothing was chosen: Student's t, two-sided."""


def check(reruns: Reruns, keys: Sequence[str]) -> Finding:
    """Draw the noise of cells anew, and compare their scores with the published ones, victim by victim.

    Args:
        reruns: of the bundle.
        keys: of cells that were run again, of which those are drawn anew whose messages hang on the secret.
    """
    groups: dict[str, list[Mapping[Unit, float]]] = {}
    drawn = [key for key in keys if _hangs_on_the_secret(reruns, key)]
    own = secret.draw()
    for number, key in enumerate(drawn, start=1):
        cell = reruns.bundle.cells[key]
        assert isinstance(cell, AttackCell)
        reruns.say(f"luck: cell {number} of {len(drawn)}, {cell.title}")
        gaps = dict(_gaps(reruns, key, cell, replace(cell, secret=own)))
        for what in (f"defense {cell.defense.label!r}", f"attack {cell.attack.label!r}"):
            groups.setdefault(what, []).append(gaps)
    found = [gap for what, parts in groups.items() if (gap := gap_of(what, parts)) is not None]
    return _judged(found, len(drawn))


def gap_of(what: str, cells: Sequence[Mapping[Unit, float]]) -> Gap | None:
    """Return the mean gap over victims of what was found in cells; None where fewer than two victims differ at all."""
    units = {unit for gaps in cells for unit in gaps}
    values = np.array([np.mean([gaps[unit] for gaps in cells if unit in gaps]) for unit in units])
    if len(values) < 2 or not (np.abs(values) > DECIBELS).any():
        return None
    mean, error = float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)
    return Gap(what, mean, error, float(2 * stats.t.sf(abs(mean) / error, len(values) - 1)) if error else 0.0)


def _judged(found: Sequence[Gap], drawn: int) -> Finding:
    if not found:
        return Finding("luck", True, "no score of the sample hangs on the store's secret")
    odd = min(found, key=lambda gap: gap.chance)
    chance = min(1.0, odd.chance * len(found))
    detail = (
        f"{drawn} cells drawn anew with another secret; of {odd.what}, the oddest of {len(found)}, published PSNR is"
        f" {odd.mean:+.2f} dB off (standard error {odd.error:.2f}), as by chance in {_share(chance)} of bundles"
    )
    return Finding("luck", chance >= 1 / RARE, detail)


def _share(chance: float) -> str:
    return f"{100 * chance:.0f} %" if chance >= 0.01 else f"one in {1 / max(chance, 1e-12):,.0f}"


def _hangs_on_the_secret(reruns: Reruns, key: str) -> bool:
    cell, told = reruns.bundle.cells[key], reruns.bundle.told[key]
    drew = told["status"] == "ok" and told["provenance"].get("stochastic")
    return bool(drew and isinstance(cell, AttackCell) and cell.secret is not None and key in reruns.bundle.rows)


def _gaps(reruns: Reruns, key: str, cell: AttackCell, anew: AttackCell) -> Iterator[tuple[Unit, float]]:
    """Yield how far each image's PSNR lies above that of the new draw; not of images that have none in one of them."""
    place = (cell.model.label, cell.dataset.label, cell.setting.name, cell.seed)
    here = {(row.victim, row.image): row.psnr for row in reruns.run_anew(anew).rows}
    stored = reruns.bundle.rows[key]
    for victim, image, told in zip(stored["victim"], stored["image"], stored["psnr"], strict=True):
        own = here.get((victim, image))
        if own is not None and np.isfinite(own) and np.isfinite(told):
            yield (*place, victim, image), min(told, CAP) - min(own, CAP)
