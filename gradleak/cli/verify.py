"""`gradleak verify`: what a bundle claims, computed again."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..paths import printable

if TYPE_CHECKING:
    from ..evaluation.verify import Finding, Verified

PAUSE = 10.0
"""Seconds between two lines of progress: a log stays short, and nobody takes a long check for one that hangs."""
STATES = {True: "ok", False: "REFUSED", None: "not checked"}


def verify(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A file that `gradleak publish` wrote.")],
    suite: Annotated[
        list[Path] | None,
        typer.Option(
            "--suite", metavar="FILE", help="The suite it is of, if it is not one of gradleak's; may be repeated."
        ),
    ] = None,
    sample: Annotated[
        int,
        typer.Option(min=0, metavar="N", help="Cells to run again of every attack, every defense and every training."),
    ] = 1,
    seed: Annotated[
        int | None, typer.Option(min=0, metavar="S", help="Draws them [default: a new one, which is printed].")
    ] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Keep what was found beside the bundle, for boards to show.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, or cuda:N.")] = "cpu",
    data_root: Annotated[
        Path | None, typer.Option("--data-root", metavar="DIR", help="Where datasets are that do not come along.")
    ] = None,
    plugin: Annotated[
        list[Path] | None, typer.Option("--plugin", metavar="FILE", help="A plugin file to add; may be repeated.")
    ] = None,
) -> None:
    """Compute again what a bundle claims, by a suite of one's own; exit with 1 if anything is not as it says."""
    from .. import registry
    from ..board import record as records
    from ..evaluation.verify import Extent, verify
    from ..evaluation.workshop import Resources
    from ..process import tune

    tune()
    for path in plugin or []:
        registry.add_file(path)
    resources = Resources(data_root=data_root, device=device)
    tell = _unheard if as_json else _print
    found = verify(bundle, resources, Extent(sample, seed), suite or [], _Progress(), tell)
    if as_json:
        print(json.dumps(_plain(found), indent=1))
    if record:
        told = [(each.check, each.ok, each.detail) for each in found.findings]
        _say(f"recorded in {records.write(bundle, found.seed, sample, told, found.cells)}")
    _conclude(bundle, found)


def _print(found: Finding) -> None:
    print(printable(f"{STATES[found.ok]:11}  {found.check}: {found.detail}"), flush=True)


def _unheard(found: Finding) -> None:
    pass


def _conclude(bundle: Path, found: Verified) -> None:
    wrong = [each.check for each in found.findings if each.ok is False]
    again = f"repeat with --seed {found.seed}"
    if wrong:
        _say(f"{bundle}: refused: {', '.join(dict.fromkeys(wrong))}; {again}")
        raise typer.Exit(1)
    unchecked = [each.check for each in found.findings if each.ok is None]
    rest = f", but for {', '.join(dict.fromkeys(unchecked))}, which could not be checked here" if unchecked else ""
    counts = {state: list(found.cells.values()).count(state) for state in sorted(set(found.cells.values()))}
    extent = ", ".join(f"{count} cells {state}" for state, count in counts.items())
    _say(f"{bundle}: verified{rest}: {extent}; {again}")


def _plain(found: Verified) -> dict[str, object]:
    findings = [{"check": each.check, "ok": each.ok, "detail": each.detail} for each in found.findings]
    return {"ok": found.ok, "seed": found.seed, "findings": findings, "cells": found.cells}


class _Progress:
    """Prints what is looked at, at every new stage and every few seconds."""

    def __init__(self) -> None:
        self._stage = ""
        self._told = time.monotonic()

    def __call__(self, line: str) -> None:
        stage, now = line.partition(":")[0], time.monotonic()
        if stage != self._stage or now > self._told + PAUSE:
            self._stage, self._told = stage, now
            _say(line)


def _say(text: str) -> None:
    print(f"gradleak: {printable(text)}", file=sys.stderr)
