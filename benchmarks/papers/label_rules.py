"""Label inference: which share of a batch's labels does every rule read from the gradient?

    python benchmarks/papers/label_rules.py

Rules of `gradleak.search.labels` on batches of test images whose labels are distinct (as far as there are classes, then
as even as possible), uniform with repeats, or all of one class, for untrained and trained networks. The share is of
the multiset, so order does not count; `chance` draws labels at random. A rule is left out where it cannot serve: for
more images than classes, or for more than one. Writes a CSV, a PNG and an SVG, and prints the table; intervals are
Wilson's over images, narrowed to the effective number where images share a batch.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from gradleak import registry, seeds, structure
from gradleak.board.statistics import effective_trials, wilson
from gradleak.dataset import Data
from gradleak.errors import GradleakError
from gradleak.evaluation.metrics import labels_found
from gradleak.model import initialise
from gradleak.search import labels as label_rules
from gradleak.training import networks
from gradleak.update import LocalTraining, Network, Update, local_update, one_hot, stack

MODELS: dict[str, dict[str, Any]] = {"lenet": {}, "convnet": {"width": 16}, "resnet18": {"width": 16}}
KINDS = ("distinct", "uniform", "one class")
CHANCE = "chance"


def draw_labels(kind: str, batch_size: int, classes: int, stream: torch.Generator) -> Tensor:
    """Labels [B] of one batch."""
    if kind == "distinct":
        rounds = -(-batch_size // classes)
        return torch.cat([torch.randperm(classes, generator=stream) for _ in range(rounds)])[:batch_size]
    if kind == "uniform":
        return torch.randint(classes, (batch_size,), generator=stream)
    return torch.randint(classes, (1,), generator=stream).repeat(batch_size)


def draw_images(data: Data, labels: Tensor, stream: torch.Generator) -> Tensor:
    """Test images [B, C, H, W] of these labels, none twice while its class has others."""
    order = torch.randperm(len(data.split.test), generator=stream)
    pools = {label: order[data.split.test.labels[order] == label].tolist() for label in labels.unique().tolist()}
    seen = dict.fromkeys(pools, 0)
    index = []
    for label in labels.tolist():
        index.append(pools[label][seen[label] % len(pools[label])])
        seen[label] += 1
    return data.split.test.images[torch.tensor(index)]


def gradients(network: Network, data: Data, kind: str, batch_size: int, batches: int) -> tuple[Update, Tensor]:
    """Gradients [N, ...] of the last two tensors for N batches, and their labels [N, B]."""
    last = dict(list(network.parameters.items())[-2:])
    updates, truth = [], []
    for batch in range(batches):
        stream = seeds.generator("label-rules", data.name, kind, batch_size, batch)
        labels = draw_labels(kind, batch_size, data.classes, stream)
        images = draw_images(data, labels, stream)
        targets = one_hot(labels, data.classes, images.dtype)
        updates.append(local_update(network, images, targets, LocalTraining(), parameters=last))
        truth.append(labels)
    return stack(updates), torch.stack(truth)


def shares(
    update: Update, head: structure.Head, truth: Tensor, classes: int
) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """Share of the labels [N] that every rule finds; without the rules that cannot serve."""
    found: dict[str, Tensor] = {}
    for rule in label_rules.RULES:
        try:
            found[rule] = label_rules.infer(update, head, truth.shape[1], rule=rule)
        except GradleakError:
            continue
    found[CHANCE] = torch.randint(classes, truth.shape, generator=seeds.generator("label-rules", *truth.shape))
    return {
        rule: np.array([float(labels_found(*pair).double().mean()) for pair in zip(labels, truth, strict=True)])
        for rule, labels in found.items()
    }


def measure(options: argparse.Namespace) -> pd.DataFrame:
    """One row a model, state, kind of labels, batch size and rule."""
    data = Data(registry.build("datasets", options.dataset), options.dataset)
    rows = []
    for name in options.models:
        module: nn.Module = initialise(registry.build("models", name, MODELS[name]), data.shape, data.classes, 0)
        for trained in (False, True):
            accuracy = networks.train(module, data, options.epochs, 0) if trained else float("nan")
            network = Network.of(module.eval(), "eval")
            for kind in KINDS:
                for batch_size in options.batch_sizes:
                    update, truth = gradients(network, data, kind, batch_size, options.batches)
                    head = structure.of(network.module).head
                    for rule, rates in shares(update, head, truth, data.classes).items():
                        interval = wilson(float(rates.mean()), effective_trials(rates, truth.numel()))
                        rows.append({
                            "dataset": options.dataset, "model": name, "state": "trained" if trained else "untrained",
                            "accuracy": accuracy, "labels": kind, "batch_size": batch_size, "rule": rule,
                            "share": interval.estimate, "low": interval.low, "high": interval.high,
                            "whole": float((rates == 1).mean()), "batches": options.batches,
                        })  # fmt: skip
            print(f"{name}, {rows[-1]['state']}: done", flush=True)
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, path: Path) -> None:
    """Share against batch size, a row a model and state, a column a kind of labels."""
    cases = list(table[["model", "state"]].drop_duplicates().itertuples(index=False, name=None))
    size = (3.2 * len(KINDS), 2.1 * len(cases))
    figure, axes = plt.subplots(len(cases), len(KINDS), figsize=size, sharex=True, sharey=True, layout="constrained",
                                squeeze=False)  # fmt: skip
    sizes = sorted(table["batch_size"].unique())
    for line, (model, state) in zip(axes, cases, strict=True):
        for axis, kind in zip(line, KINDS, strict=True):
            chosen = table[(table["model"] == model) & (table["state"] == state) & (table["labels"] == kind)]
            for number, rule in enumerate([*label_rules.RULES, CHANCE]):
                rows = chosen[chosen["rule"] == rule]
                style = {"color": "grey", "linestyle": ":"} if rule == CHANCE else {"color": f"C{number}"}
                reach = np.abs(rows[["low", "high"]].to_numpy() - rows[["share"]].to_numpy()).T
                axis.errorbar(rows["batch_size"], rows["share"], yerr=reach, marker=".", capsize=2, label=rule, **style)
            axis.set_title(f"{model}, {state}, {kind}", fontsize="small")
            axis.set_xscale("log", base=2)
            axis.set_xticks(sizes, [str(value) for value in sizes])
        line[0].set_ylabel("labels found")
    for axis in axes[-1]:
        axis.set_xlabel("images in a batch")
    axes[0][0].set_ylim(-0.03, 1.03)
    axes[0][-1].legend(fontsize="x-small")
    # Neither date nor version goes in: equal results give equal files.
    figure.savefig(path.with_suffix(".png"), dpi=150, metadata={"Software": None})
    with plt.rc_context({"svg.hashsalt": path.name}):
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
    plt.close(figure)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/papers/label_rules"))
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--batches", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=5, help="of training")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    table = measure(options)
    table.to_csv(options.out / "label_rules.csv", index=False, float_format="%.6g")
    draw(table, options.out / "label_rules")
    shown = table.pivot_table(index=["model", "state", "labels", "rule"], columns="batch_size", values="share")
    print(shown.to_string(float_format="%.2f"))


if __name__ == "__main__":
    main()
