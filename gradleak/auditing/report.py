"""What an audit found, in words, numbers and pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy.typing as npt

from ..board.statistics import Interval, wilson
from ..errors import GradleakError
from ..paths import printable, written_whole
from ..pictures import tag
from ..report.document import document, listed, table
from ..scales import CAP
from .plan import Ran

RECOGNISABLE = 20.0
"""PSNR in dB from which an image counts as recovered: a mean squared error of .01."""
CLEARLY = 3.0
"""Decibels by which it has to be better than what a guess without the update has of the same image: half its squared
error."""
PLAIN = 30.0
"""PSNR from which it counts as recovered whatever a guess has."""

LEAKS, HOLDS, UNSURE = "leaks", "holds", "unsure"


@dataclass(frozen=True)
class Finding:
    """How one attack by one attacker fared."""

    attack: str
    attacker: str
    share: float
    """Of the images, in [0, 1], that came back."""
    psnr: float
    """Mean over images in dB; failed ones count as what a guess has."""
    fits: float
    """Share of victims whose answer explains the update at least as well as the true images do; NaN where it has
    no loss of its own. Below a half a search has not come to its end, and its failure says nothing."""
    iterations: int | None
    usual: int | None
    error: str = ""
    needed: float = math.nan
    """Seconds that the usual iterations would have taken; NaN where that was not measured."""


@dataclass(frozen=True)
class Exposed:
    """A true image beside its reconstruction, [C, H, W] each in [0, 1]."""

    truth: npt.NDArray[Any]
    reconstruction: npt.NDArray[Any]
    psnr: float
    label: int


@dataclass(frozen=True)
class Remedy:
    """What one defense of the registry would change."""

    defense: str
    verdict: str
    share: float
    psnr: float
    attacks: tuple[str, ...]
    """What it faced."""
    accuracy: float = math.nan
    """After further training under it, in [0, 1], on the private half of the data."""
    lost: float = math.nan
    """Accuracy of the same training without it, minus that."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Audit:
    """The answer to: does my training leak?"""

    verdict: str
    """leaks, holds, or unsure."""
    share: Interval
    """Of the images, that the strongest attack recovered, in [0, 1]."""
    images: int
    """How many were attacked."""
    training: str
    """What was audited, in words."""
    worst: Finding | None
    """Of the attack that recovered most."""
    findings: tuple[Finding, ...]
    """One of each attack by each attacker."""
    floor: float
    """Mean PSNR in dB of the best guess that reads nothing of the update."""
    malicious: Finding | None = None
    """What a server recovers that changes the model; no part of the verdict."""
    advice: str = ""
    """What would make it sure."""
    exposed: tuple[Exposed, ...] = ()
    """The images that came back best, if any did."""
    remedies: tuple[Remedy, ...] = ()
    """Defenses that were tried, if it leaks."""
    not_run: tuple[str, ...] = ()
    """What was not tried, each with its reason."""
    trained: str = ""
    """How accuracies were measured, in words."""
    seconds: float = 0.0
    """What the audit took."""
    store: str = ""
    """Path of the store with its cells; empty for none."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What else `report.json` shall hold."""

    def passes(self, limit: float) -> bool | None:
        """Whether no more than a share in [0, 1] comes back; None where that is not sure."""
        if self.share.estimate > limit:
            return False
        return None if self.verdict == UNSURE else True

    def lines(self) -> list[str]:
        """Say in sentences what was found."""
        found = [self._headline(), f"Audited: {self.training}."]
        for name in dict.fromkeys(each.attacker for each in self.findings):
            own = max((each for each in self.findings if each.attacker == name), key=_strength)
            found.append(
                f"{name}: {_percent(own.share)} of the images, by {own.attack} ({own.psnr:.1f} dB on average)."
            )
        found.append(f"A guess that reads nothing of the update has {self.floor:.1f} dB.")
        if self.malicious is not None:
            found.append(
                f"A server that changes the model it sends would get {_percent(self.malicious.share)} "
                f"({self.malicious.psnr:.1f} dB); the verdict is about servers that do not."
            )
        holding = [each for each in self.remedies if each.verdict == HOLDS]
        for each in holding:
            cost = f"; {100 * each.lost:.1f} points of accuracy lost" if math.isfinite(each.lost) else ""
            found.append(f"{each.defense} would bring it to the floor against {', '.join(each.attacks)}{cost}.")
        if self.remedies and not holding:
            found.append("No defense that was tried is sure to bring it to the floor.")
        return found

    def _headline(self) -> str:
        low, high = 100 * self.share.low, 100 * self.share.high
        many = f"{_percent(self.share.estimate)} of {self.images} images (95 % interval {low:.0f} to {high:.0f} %)"
        if self.verdict == LEAKS:
            return f"Leaks: {many} came back."
        if self.verdict == HOLDS:
            return f"No leak found: {many} came back, and a search came to its end."
        return f"Not sure: {many} came back, but no search came to its end, which proves nothing. {self.advice}".strip()

    def facts(self) -> dict[str, Any]:
        """Return everything but the pictures as plain data."""
        return {
            "verdict": self.verdict,
            "share": self.share.estimate,
            "share_low": self.share.low,
            "share_high": self.share.high,
            "images": self.images,
            "training": self.training,
            "worst": None if self.worst is None else _plain(asdict(self.worst)),
            "floor_db": _plain(self.floor),
            "findings": [_plain(asdict(each)) for each in self.findings],
            "malicious": None if self.malicious is None else _plain(asdict(self.malicious)),
            "advice": self.advice,
            "remedies": [_plain(asdict(each)) for each in self.remedies],
            "exposed": [{"psnr": each.psnr, "label": each.label} for each in self.exposed],
            "not_run": list(self.not_run),
            "accuracy_measured_by": self.trained,
            "recovered_means": _meaning(),
            "seconds": self.seconds,
            "lines": self.lines(),
            **self.extra,
        }

    def _repr_html_(self) -> str:
        return "".join(self._parts())

    def _parts(self) -> Iterable[str]:
        first, *rest = self.lines()
        yield f'<p class="verdict {self.verdict}">{escape(first)}</p>'
        yield listed(rest)
        if self.exposed:
            back = self.worst is not None and self.worst.share > 0
            yield f"<h2>{'Most exposed images' if back else 'Nearest answers, none of them recovered'}</h2>"
            for each in self.exposed:
                pair = tag(each.truth, "truth") + tag(each.reconstruction, "reconstruction")
                caption = f"truth, reconstruction: {each.psnr:.1f} dB, label {each.label}"
                yield f"<figure>{pair}<figcaption>{escape(caption)}</figcaption></figure>"
        yield "<h2>Attacks</h2>"
        yield f"<p>{escape(_meaning())}</p>"
        yield table(
            ("attacker", "attack", "recovered", "PSNR", "iterations", "came to its end"),
            [_cells(each) for each in sorted(self.findings, key=_strength, reverse=True)],
        )
        if self.remedies:
            yield "<h2>Defenses</h2>"
            yield f"<p>{escape(self.trained)}</p>"
            yield table(
                ("defense", "verdict", "recovered", "PSNR", "faced", "accuracy", "points lost", "note"),
                [_remedy(each) for each in self.remedies],
            )
        if self.not_run:
            yield "<h2>Not run</h2>"
            yield listed(self.not_run)

    def write(self, out: Path) -> None:
        """Write index.html and report.json into a folder, which is made if it is not there.

        Raises:
            GradleakError: it cannot be written.
        """
        page = document(f"Audit: {self.training}", self._parts())
        files = {"index.html": page, "report.json": json.dumps(self.facts(), indent=2, allow_nan=False) + "\n"}
        try:
            out.mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                with written_whole(out / name) as path:
                    path.write_text(printable(text, keep="\n"), encoding="utf-8")
        except OSError as error:
            raise GradleakError(f"--out {out}: cannot be written ({error.strerror})") from error


def guesses(ran: Sequence[Ran]) -> dict[tuple[int, int], float]:
    """Return the best PSNR that controls have of each image, by victim and image."""
    found: dict[tuple[int, int], float] = {}
    for each in ran:
        for row in each.result.rows:
            if row.psnr is not None and row.status == "ok":
                place = row.victim, row.image
                found[place] = max(found.get(place, -math.inf), min(row.psnr, CAP))
    return found


def finding(ran: Ran, floor: dict[tuple[int, int], float]) -> Finding:
    """Return how an attack fared, beside what guesses have of each image."""
    rows = ran.result.rows
    values, back, fits = [], [], []
    for row in rows:
        guess = floor.get((row.victim, row.image), 0.0)
        # An image of which an attack gives nothing is worth what a guess is.
        failed = row.psnr is None or row.status not in ("ok", "timeout")
        psnr = guess if failed or row.psnr is None else min(row.psnr, CAP)
        values.append(psnr)
        back.append(recovered(psnr, guess) and not failed)
        if row.loss is not None and row.loss_at_truth is not None and math.isfinite(row.loss):
            fits.append(row.loss <= row.loss_at_truth + 1e-9 * abs(row.loss_at_truth))
    return Finding(
        attack=ran.attack,
        attacker=ran.attacker,
        share=sum(back) / len(back) if back else 0.0,
        psnr=sum(values) / len(values) if values else math.nan,
        fits=sum(fits) / len(fits) if fits and ran.iterations is not None else math.nan,
        iterations=ran.iterations,
        usual=ran.usual,
        error=ran.result.error or "",
        needed=ran.needed,
    )


def recovered(psnr: float, guess: float) -> bool:
    """Whether an image counts as recovered, beside what a guess without the update has of it, in dB."""
    return psnr >= PLAIN or (psnr >= RECOGNISABLE and psnr >= guess + CLEARLY)


def verdict_of(findings: Sequence[Finding]) -> str:
    """Say whether anything came back or, if not, whether a search came to its end."""
    if any(each.share > 0 for each in findings):
        return LEAKS
    return HOLDS if any(each.fits >= 0.5 for each in findings) else UNSURE


def advice(findings: Sequence[Finding], searches: float) -> str:
    """Say what would make an unsure verdict sure: how far the searches came, and the budget that would end one.

    Args:
        findings: of all attacks.
        searches: seconds of a budget that give the first search one second.
    """
    tried = [each for each in findings if each.iterations is not None and each.usual is not None and not each.error]
    if not tried:
        return "No search could run: see what was not run, and why."
    best = max(tried, key=lambda each: (each.iterations or 0) / (each.usual or 1))
    if (best.iterations or 0) >= (best.usual or 1):
        return (
            f"{best.attack} made all of its iterations and is stuck: other options, in a suite of your own, may tell."
        )
    told = f"{best.attack} made {best.iterations} of its {best.usual} iterations"
    if not math.isfinite(best.needed):
        return f"{told}: an iteration takes too long for this budget. Give a larger --budget, or fewer --victims."
    return f"{told}; with --budget {math.ceil(searches * best.needed / 60)}m it would make them all."


def interval(share: float, images: int) -> Interval:
    """Return a share of images with its interval."""
    return wilson(share, images)


def strongest(findings: Sequence[Finding]) -> Finding | None:
    """Return the finding of the most images, then of the highest PSNR."""
    return max(findings, key=_strength, default=None)


def _strength(each: Finding) -> tuple[float, float]:
    return each.share, each.psnr if math.isfinite(each.psnr) else -math.inf


def _meaning() -> str:
    return (
        f"An image counts as recovered from {RECOGNISABLE:g} dB on, if that is {CLEARLY:g} dB above the best guess "
        f"that reads nothing of the update, and from {PLAIN:g} dB on in any case."
    )


def _cells(each: Finding) -> list[str]:
    steps = "-" if each.iterations is None else f"{each.iterations} of {each.usual}"
    ended = "-" if not math.isfinite(each.fits) else f"{_percent(each.fits)} of clients"
    psnr = f"{each.psnr:.1f} dB" if math.isfinite(each.psnr) else "-"
    return [each.attacker, each.attack, each.error or _percent(each.share), psnr, steps, ended]


def _remedy(each: Remedy) -> list[str]:
    known = f"{100 * each.accuracy:.1f} %" if math.isfinite(each.accuracy) else "-"
    lost = f"{100 * each.lost:.1f}" if math.isfinite(each.lost) else "-"
    psnr = f"{each.psnr:.1f} dB" if math.isfinite(each.psnr) else "-"
    return [each.defense, each.verdict, _percent(each.share), psnr, ", ".join(each.attacks), known, lost, each.note]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _plain(value: Any) -> Any:
    """Return data with None in place of numbers that JSON cannot write (NaN, infinity)."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
