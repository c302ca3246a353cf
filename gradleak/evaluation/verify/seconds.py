"""Seconds, which boards show as prices: no machine repeats another's, but their order of magnitude is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from .findings import Finding, judged

FACTOR = 100.0
"""How many times more or less time may be claimed than is taken here: for all, and against that for one of them. Load,
threads and caches make less than ten of it."""
SHORT = 1.0
"""Seconds of an attack on a victim list below which starting it takes too large a part."""

Times = Mapping[str, Sequence[tuple[float, float]]]
"""Seconds as submitted and here, by what took them."""


def check(times: Times) -> Finding:
    """Compare seconds as to their order of magnitude: each group's, by the machines' own factor, and that factor."""
    ratios = {
        what: median([told / here for told, here in pairs if here > 0])
        for what, pairs in times.items()
        if any(here > 0 for _, here in pairs)
    }
    if not ratios:
        return Finding("seconds", None, "none that could be compared")
    pace = median(ratios.values())
    wrong = [
        f"{what}: {_times(ratio / pace)} the share of what is submitted for the others"
        for what, ratio in sorted(ratios.items(), key=lambda item: item[1])
        if not 1 / FACTOR <= ratio / max(pace, 1e-300) <= FACTOR
    ]
    if not 1 / FACTOR <= pace <= FACTOR:
        wrong.insert(0, f"{_times(pace)} what is taken here")
    right = f"of {len(ratios)} defenses and attacks, {_times(pace)} those here and each within a factor of {FACTOR:.0f}"
    return judged("seconds", wrong, right)


def _times(ratio: float) -> str:
    return f"{ratio:.3g} times"
