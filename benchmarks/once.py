"""Runs every kind of cell of a suite once, with one victim and few iterations: nobody finds a crash after hours.

`python benchmarks/once.py SUITE [--data-root FOLDER] [--iterations N]`: a kind is an attack or a defense at a level of
knowledge, in a context. Prints the CPU seconds of each, and ends with 1 if any failed. The numbers mean nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from gradleak import suite
from gradleak.evaluation import check, evaluate
from gradleak.evaluation.workshop import Resources, Workshop
from gradleak.suite import AttackCell, Cell, LearnedPrior, TrainingCell

COSTLY = (
    "iterations",
    "weights_iterations",
    "messages",
    "epochs",
    "restarts",
    "rounds",
    "search_iterations",
    "population",
)
"""Options that say how long an attack or a prior takes."""
FEWEST = {"messages": 64, "population": 8}
"""What these need at least."""


def kinds(cells: Iterable[Cell]) -> Iterator[Cell]:
    """Yield the first cells that have an attack, or a defense at a level, that no other has had in their context."""
    seen: set[tuple[str, ...]] = set()
    for cell in cells:
        level = cell.knowledge.value if isinstance(cell, AttackCell) else "training"
        own: set[tuple[str, ...]] = {(cell.context, "defense", cell.defense.label, level)}
        if isinstance(cell, AttackCell):
            own.add((cell.context, "attack", cell.attack.label))
        # A control reads little of a message.
        blind = isinstance(cell, AttackCell) and cell.built_attack.family == "control"
        new = {kind for kind in own if not (blind and kind[1] == "defense")} - seen
        if new:
            seen |= new
            yield cell


def shortened(cell: Cell, iterations: int) -> Cell:
    """Return a cell of one victim whose attack, prior and training take so many iterations, or less."""

    def less(options: dict[str, object]) -> dict[str, object]:
        most = {name: FEWEST.get(name, iterations if "iterations" in name else 1) for name in COSTLY}
        return {
            key: min(value, most[key]) if key in most and isinstance(value, int) else value
            for key, value in options.items()
        }

    setting = replace(cell.setting, epochs=min(1, cell.setting.epochs))
    if isinstance(cell, TrainingCell):
        return replace(cell, setting=setting, recipe=cell.recipe.model_copy(update={"rounds": 2}))
    assert isinstance(cell, AttackCell)
    prior = cell.prior
    if isinstance(prior, LearnedPrior):
        prior = replace(prior, options=less(dict(prior.options)))
    attack = replace(cell.attack, options=less(dict(cell.attack.options)))
    return replace(cell, victims=1, setting=setting, attack=attack, prior=prior)


def main() -> int:
    """Run them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("suite", type=Path)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--download", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--iterations", type=int, default=3)
    given = parser.parse_args()
    shop = Workshop(Resources(data_root=given.data_root, download=given.download, device=given.device))
    chosen = list(kinds(suite.expand(suite.read(given.suite), shop.digest, given.data_root)))
    failed, ran = 0, 0
    for cell in chosen:
        for short in check.check([shortened(cell, given.iterations)], shop):
            began = time.process_time()
            found = evaluate.evaluate(short, shop)
            ran += 1
            failed += bool(found.error)
            print(f"{time.process_time() - began:7.1f} s  {short.title}  {found.error or ''}", flush=True)
    print(f"{ran} kinds of cells, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
