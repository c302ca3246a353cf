"""Recovery against encoding degree and restarts: does a more expressive encoding protect?

    python benchmarks/papers/quantum_encoding.py

The claim of Kumar et al., arXiv:2309.13002: more frequencies a feature (here 5^0 to 5^(m-1), degree m) make
exponentially many spurious minima, so gradient matching fails. Measured with the paper's circuit (parity, fixed
head, so that only the circuit's gradient is sent; known label, one example, random weights) on random features,
for matching over the image (direct) and over free encoding angles (relaxed), from the same number of restarts. A
victim counts as recovered if the image of lowest own loss among the first R restarts is within 0.05 rad of base
angle in every feature. Writes a CSV, a PNG and an SVG, and prints the table. Intervals are Wilson's over victims, each
of whom has a circuit of its own; with several to a circuit, over their effective number.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from gradleak import registry, seeds
from gradleak.attack import Attack
from gradleak.board.statistics import effective_trials, wilson
from gradleak.model import initialise
from gradleak.seeds import Generators
from gradleak.testing import Scene
from gradleak.threat import Compute, Observation
from gradleak.update import one_hot

CLASSES = 2
TOLERANCE = 0.05  # radians of the base angle
TURN = 0.5


def attacks(restarts: int, iterations: int) -> dict[str, Attack]:
    """The two searches, alike but for what they search over."""
    shared: dict[str, Any] = {
        "objective": "relative-squared",
        "restarts": restarts,
        "iterations": iterations,
        "schedule": "cosine",
        "lr": 0.1,
    }
    pixels = {"tv": 0.0, "signed": False, "space": "raw", "initialisation": "uniform"}
    return {
        "direct": registry.build("attacks", "inverting-gradients", shared | pixels),
        "relaxed": registry.build("attacks", "quantum-relaxation", shared),
    }


def observe(features: int, degree: int, circuit: int, victims: int) -> tuple[Observation, Tensor]:
    """Observation of victims with one circuit, and their images [N, 1, 1, 1, F]."""
    shape = (1, 1, features)
    draw = seeds.generator("quantum-encoding", features, circuit)
    images = torch.rand(victims, 1, *shape, generator=draw, dtype=torch.float64)
    labels = torch.randint(CLASSES, (victims, 1), generator=draw)
    options = {
        "encoding": "exponential",
        "qubits": features * degree,
        "repetitions": degree,
        "observable": "parity",
        "head": "fixed",
        "turn": TURN,
        "seed": circuit,
    }
    defense = registry.build("defenses", "quantum-encoding", options)
    module = initialise(registry.build("models", "linear"), shape, CLASSES, 0)
    scene = Scene.of(module, images, labels, defense, classes=CLASSES)
    observation = scene.observe("public", compute=Compute(width=128))
    return observation, images


def recovered(attack: Attack, observation: Observation, images: Tensor, name: object) -> tuple[Tensor, Tensor]:
    """Own loss and success of every restart, [N, R] each."""
    streams = Generators([(name, victim) for victim in range(len(images))], dtype=torch.float64)
    candidates = attack.reconstruct(observation, streams).candidates
    assert candidates is not None and observation.labels is not None
    targets = one_hot(observation.labels, CLASSES, torch.float64)
    losses = [attack.loss(observation, candidates[:, r], targets, {}) for r in range(candidates.shape[1])]
    errors = (candidates - images[:, None]).abs().flatten(2).amax(2) * 2 * math.pi * TURN
    return torch.stack([loss for loss in losses if loss is not None], dim=1), errors < TOLERANCE


def measure(options: argparse.Namespace) -> pd.DataFrame:
    """One row an attack, degree and number of restarts; the CSV is written as they come."""
    budgets = [2**k for k in range(int(math.log2(options.restarts)) + 1)]
    rows = []
    for degree in options.degrees:
        for label, attack in attacks(options.restarts, options.iterations).items():
            found = []
            for circuit in range(options.circuits):
                observation, images = observe(options.features, degree, circuit, options.victims)
                found.append(recovered(attack, observation, images, (degree, circuit)))
            single = float(torch.stack([hits for _, hits in found]).double().mean())
            for budget in budgets:
                rates = np.array([
                    float(hits.gather(1, losses[:, :budget].argmin(1, keepdim=True)).double().mean())
                    for losses, hits in found
                ])  # fmt: skip
                interval = wilson(float(rates.mean()), effective_trials(rates, options.victims * options.circuits))
                rows.append(
                    {
                        "attack": label,
                        "features": options.features,
                        "degree": degree,
                        "qubits": options.features * degree,
                        "restarts": budget,
                        "rate": interval.estimate,
                        "low": interval.low,
                        "high": interval.high,
                        "rate_of_one_restart": single,
                        "victims": options.victims * options.circuits,
                    }
                )
            print(f"degree {degree}, {label}: {100 * single:.1f} % of single restarts, "
                  f"{100 * rows[-1]['rate']:.0f} % of victims with {budgets[-1]}", flush=True)  # fmt: skip
            pd.DataFrame(rows).to_csv(options.out / "quantum_encoding.csv", index=False)
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, path: Path) -> None:
    """Rate against degree at the largest budget, and against restarts at the largest degree."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True, layout="constrained")
    for axis, x, fixed in ((axes[0], "degree", "restarts"), (axes[1], "restarts", "degree")):
        largest = table[fixed].max()
        for label, rows in table[table[fixed] == largest].groupby("attack"):
            reach = np.abs(rows[["low", "high"]].to_numpy() - rows[["rate"]].to_numpy()).T
            axis.errorbar(rows[x], rows["rate"], yerr=reach, marker="o", capsize=3, label=label)
        axis.set_xlabel(f"{x} ({fixed} = {largest})")
        axis.set_xticks(sorted(table[x].unique()))
    axes[1].set_xscale("log", base=2)
    axes[0].set_ylabel("victims recovered")
    axes[0].set_ylim(-0.03, 1.03)
    axes[0].legend()
    # Neither date nor version goes in: equal results give equal files.
    figure.savefig(path.with_suffix(".png"), dpi=150, metadata={"Software": None})
    with plt.rc_context({"svg.hashsalt": path.name}):
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
    plt.close(figure)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/papers/quantum_encoding"))
    parser.add_argument("--features", type=int, default=2)
    parser.add_argument("--degrees", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--circuits", type=int, default=24)
    parser.add_argument("--victims", type=int, default=1, help="of each circuit")
    parser.add_argument("--restarts", type=int, default=32)
    parser.add_argument("--iterations", type=int, default=150)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    table = measure(options)
    draw(table, options.out / "quantum_encoding")
    print(table.drop(columns=["features", "victims"]).to_string(index=False, float_format="%.3f"))


if __name__ == "__main__":
    main()
