"""Processor time of whole cells, attack x defense and level x model, beside another checkout of gradleak.

    python benchmarks/perf/cells.py                                # this checkout alone
    python benchmarks/perf/cells.py --against DIR --csv cells.csv  # and another one, in turns
    python benchmarks/perf/cells.py --only gaussian-noise          # cases whose name contains a word

A cell is what `gradleak run` computes of it: clients, attack and scores, of 16 victims. Each checkout has a process
with one thread of its own, which has computed a short cell of the case before it is timed. They take turns, cell by
cell; what is shown are the medians of CPU seconds. The cost of an iteration is the difference of a long and a short
cell over the difference of their lengths. `to oblivious` is its ratio to the undefended case of the same attack and
model, in the same checkout.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import IO, Any

HERE = Path(__file__).resolve().parents[2]

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp": ("photos", {"name": "mlp", "options": {"widths": [64]}}),
    "lenet": ("photos", {"name": "lenet", "options": {"activation": "tanh", "initialisation": "default"}}),
    "convnet-16": ("photos", {"name": "convnet", "options": {"width": 16}}),
    "vit": ("photos", {"name": "vit"}),
    "digits mlp": ("digits", {"name": "mlp", "options": {"widths": [64]}}),
}
"""Dataset and entry of a suite, by the name of the case."""
DEFENSES: dict[str, dict[str, Any]] = {
    "gaussian-noise": {"name": "gaussian-noise", "options": {"sigma": 0.01, "clip": 1.0}},
    "dp-sgd": {"name": "dp-sgd", "options": {"sigma": 0.01, "clip": 1.0}},
    "top-k": {"name": "top-k", "options": {"ratio": 0.1}},
    "random-k": {"name": "random-k", "options": {"ratio": 0.1}},
    "sketch": {"name": "sketch", "options": {"ratio": 0.1}},
    "sketch + noise": {"name": "sketch", "options": {"ratio": 0.1, "clip": 1.0, "sigma": 0.01}},
    "sign": {"name": "sign"},
    "quantise": {"name": "quantise"},
}
LENGTHS = {"mlp": (20, 120), "lenet": (20, 80), "convnet-16": (2, 8), "vit": (2, 8), "digits mlp": (20, 320)}
"""Iterations of a short and of a long cell."""


@dataclass(frozen=True)
class Case:
    """A cell but for its length."""

    model: str
    attack: str = "inverting-gradients"
    defense: str = ""

    @property
    def name(self) -> str:
        """What it is called in tables."""
        return f"{self.attack}, {f'{self.defense}, public' if self.defense else 'oblivious'}, {self.model}"

    def suite(self, iterations: int) -> dict[str, Any]:
        """Return a suite of this one cell."""
        dataset, model = MODELS[self.model]
        return {
            "name": "cells",
            "victims": 16,
            "seeds": [0],
            "candidates": 10,
            "controls": "listed",
            "engine": {"backend": "auto" if self.attack == "gauss-newton" else "layerwise"},
            "knowledge": ["public" if self.defense else "oblivious"],
            "datasets": [dataset],
            "models": [model],
            "settings": [{"name": "fedsgd", "batch_size": 1, "grants": {"labels": "known"}}],
            "attacks": [{"name": self.attack, "options": {"iterations": iterations}}],
            "defenses": [DEFENSES.get(self.defense, "none")],
        }


CASES = [
    *(Case(model) for model in MODELS),
    *(Case(model, defense=defense) for model in ("mlp", "lenet") for defense in DEFENSES),
    *(Case(model, defense=defense) for model in ("convnet-16", "vit") for defense in list(DEFENSES)[:5:2]),
    *(Case(model, "dlg") for model in ("mlp", "digits mlp")),
]


class Checkout:
    """A process that computes cells by the gradleak of a folder."""

    def __init__(self, folder: Path, cache: str):
        variables = {
            "PYTHONPATH": str(folder),
            "PYTHONDONTWRITEBYTECODE": "1",
            "GRADLEAK_CACHE": cache,
            "OMP_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={**os.environ, **variables},
        )

    def seconds(self, case: Case, iterations: int) -> float:
        """CPU seconds of a cell.

        Raises:
            RuntimeError: it failed; its error is on stderr.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(case.suite(iterations)), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{case.name}: no answer from {self._process.args!r}")
        return float(answer)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve(requests: IO[str], answers: IO[str]) -> None:
    """Compute suites of one cell, a line each, and answer CPU seconds."""
    import yaml

    from gradleak import suite
    from gradleak.evaluation.evaluate import evaluate
    from gradleak.evaluation.workshop import Workshop
    from gradleak.process import tune

    tune()
    workshop = Workshop()
    with tempfile.TemporaryDirectory() as folder:
        for line in requests:
            path = Path(folder) / "cells.yaml"
            path.write_text(yaml.safe_dump(json.loads(line)))
            (cell,) = suite.expand(suite.read(path), workshop.digest)
            started = time.process_time()
            result = evaluate(cell, workshop)
            taken = time.process_time() - started
            if result.error:
                raise RuntimeError(result.error)
            print(taken, file=answers, flush=True)


def measure(checkouts: dict[str, Checkout], case: Case, rounds: int) -> dict[str, tuple[float, float]]:
    """Milliseconds of an iteration and CPU seconds of the long cell, by checkout."""
    short, long = LENGTHS[case.model]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in checkouts}
    for checkout in checkouts.values():
        checkout.seconds(case, short)
    for _, (name, checkout) in itertools.product(range(rounds), checkouts.items()):
        little, much = checkout.seconds(case, short), checkout.seconds(case, long)
        found[name].append((1e3 * (much - little) / (long - short), much))
    return {name: (median(a for a, _ in pairs), median(b for _, b in pairs)) for name, pairs in found.items()}


def rows(checkouts: dict[str, Checkout], cases: Sequence[Case], rounds: int) -> Iterator[dict[str, Any]]:
    """Measure every case; a row each."""
    plain: dict[tuple[str, str, str], float] = {}
    for case in cases:
        row: dict[str, Any] = {"attack": case.attack, "defense": case.defense or "none", "model": case.model}
        for name, (each, whole) in measure(checkouts, case, rounds).items():
            if not case.defense:
                plain[name, case.attack, case.model] = each
            base = plain.get((name, case.attack, case.model))
            row |= {f"{name} ms an iteration": round(each, 3), f"{name} cell s": round(whole, 3)}
            row[f"{name} to oblivious"] = round(each / base, 2) if base else ""
        if "today" in checkouts:
            row["times faster"] = round(row["today ms an iteration"] / row["after ms an iteration"], 2)
        yield row


def main() -> None:
    """Measure, print a line a case, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--against", type=Path, help="another checkout; its columns are called today, ours after")
    parser.add_argument("--only", nargs="*", default=[""], help="measure cases alone whose name contains one of these")
    parser.add_argument("--rounds", type=int, default=3, help="cells of each length, of which the median is shown")
    parser.add_argument("--csv", type=Path, help="where to write the table")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        # What a cell prints must not be taken for an answer.
        answers, sys.stdout = sys.stdout, sys.stderr
        serve(sys.stdin, answers)
        return
    folders = {"after": HERE} if given.against is None else {"today": given.against.resolve(), "after": HERE}
    with tempfile.TemporaryDirectory() as cache:
        checkouts = {name: Checkout(folder, f"{cache}/{name}") for name, folder in folders.items()}
        table = []
        # The undefended case is what others are compared with.
        cases = [case for case in CASES if any(word in case.name for word in given.only)]
        for row in rows(checkouts, cases, given.rounds):
            table.append(row)
            print("  ".join(f"{key}: {value}" for key, value in row.items()), flush=True)
        for checkout in checkouts.values():
            checkout.close()
    if given.csv is not None and table:
        with given.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)


if __name__ == "__main__":
    main()
