"""Processor time and memory of one sketch of each family, on one core, at the size of a network's update.

    python benchmarks/perf/sketching.py [--dimension 11173962] [--ratio 0.01] [--dense-size 64] [--repeats 3]

The unit for the count sketch is one copy of the vector plus one scatter of it. Dense families take O(s d) time,
so they get their own, small size.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable

import torch
from torch import Tensor

from gradleak.mechanisms.sketching import FAMILIES


def best_of(action: Callable[[], Tensor], repeats: int) -> float:
    """Return the least processor seconds of `repeats` calls after one that does not count."""
    action()
    times = []
    for _ in range(repeats):
        started = time.process_time()
        action()
        times.append(time.process_time() - started)
    return min(times)


def scatter_of(vector: Tensor, size: int, generator: torch.Generator) -> Callable[[], Tensor]:
    """Return one scatter of the vector's entries to random places."""
    places = torch.randint(size, vector.shape, generator=generator)
    return lambda: torch.zeros(size).scatter_add_(0, places, vector)


def main() -> None:
    """Print one line a family."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dimension", type=int, default=11_173_962, help="entries of the update (resnet18)")
    parser.add_argument("--ratio", type=float, default=0.01, help="s / d of the fast families")
    parser.add_argument("--dense-size", type=int, default=64, help="s of the gaussian and ams families")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(options.dimension, generator=generator)
    size = int(options.ratio * options.dimension)
    copy = best_of(vector.clone, options.repeats)
    scatter = best_of(scatter_of(vector, size, generator), options.repeats)
    print(f"d = {options.dimension}: copy {copy:.4f} s, scatter {scatter:.4f} s, unit {copy + scatter:.4f} s")
    print(f"{'family':14}{'s':>9}{'sketch s':>11}{'units':>8}{'desketch s':>12}{'peak GiB':>10}")
    for family in ("count-sketch", "srht", "gaussian", "ams"):
        rows = size if family in ("count-sketch", "srht") else options.dense_size
        repeats = options.repeats if family in ("count-sketch", "srht") else 1
        draws = FAMILIES[family].draw(options.dimension, rows, generator)
        operator = FAMILIES[family](options.dimension, rows, draws)
        sketched = operator.sketch(vector)
        forward = best_of(lambda operator=operator: operator.sketch(vector), repeats)  # type: ignore[misc]
        back = best_of(lambda operator=operator, y=sketched: operator.desketch(y), repeats)  # type: ignore[misc]
        # The peak of the process so far: families are listed in the order of their need.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{family:14}{rows:9}{forward:11.4f}{forward / (copy + scatter):8.2f}{back:12.4f}{peak:10.2f}")


if __name__ == "__main__":
    main()
