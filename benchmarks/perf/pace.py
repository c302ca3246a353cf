"""How well a run tells the time that is left: stored seconds, replayed in the order in which a run takes its cells.

    python benchmarks/perf/pace.py [STORE ...] [--workers 2]

Prints, for each store or bundle, the error of the estimate of what is left when so much of the work is done.
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from gradleak.board.bundle import open_all
from gradleak.evaluation.pace import Pace, in_order
from gradleak.suite import Cell

SMALL = Path(__file__).parents[2] / "results" / "bundles" / "small.zip"
MARKS = (0.1, 0.25, 0.5, 0.75)


def stored(path: Path) -> tuple[list[Cell], dict[str, float]]:
    """Return the finished cells of a store, and what each of them took, by its key."""
    with open_all([path]) as (store,):
        frame = store.cells()
    frame = frame[frame["status"] == "ok"]
    cells: list[Cell] = [Cell.of(config) for config in frame["config"]]
    return cells, dict(zip((cell.key for cell in cells), frame["seconds"], strict=True))


def ends(cells: Sequence[Cell], seconds: Mapping[str, float], workers: int) -> Iterator[str]:
    """Yield the keys of cells as so many workers end them."""
    busy: list[tuple[float, str]] = []
    for cell in in_order(cells):
        now = heapq.heappop(busy) if len(busy) == workers else (0.0, "")
        if now[1]:
            yield now[1]
        heapq.heappush(busy, (now[0] + seconds[cell.key], cell.key))
    yield from (key for _, key in sorted(busy))


def errors(cells: Sequence[Cell], seconds: Mapping[str, float], workers: int = 2) -> dict[float, float]:
    """Return by how much what is left is over- or underestimated, relative to it, at each of `MARKS`."""
    pace, total, done = Pace(cells), sum(seconds.values()), 0.0
    left, marks, found = dict(seconds), list(MARKS), dict[float, float]()
    for key in ends(cells, seconds, workers):
        pace.note(key, seconds[key])
        done += left.pop(key)
        while marks and done >= marks[0] * total:
            found[marks.pop(0)] = sum(map(pace.seconds, left)) / (sum(left.values()) or 1.0) - 1
    return found


def main() -> None:
    """Print a line a store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", nargs="*", type=Path, default=[SMALL])
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    print(f"{'store':20}{'cells':>7}{'guess':>8}" + "".join(f"{f'at {mark:.0%}':>9}" for mark in MARKS))
    for path in options.stores:
        cells, seconds = stored(path)
        pace, total = Pace(cells), sum(seconds.values())
        guess = sum(map(pace.seconds, seconds)) / total - 1
        found = errors(cells, seconds, options.workers)
        print(f"{path.name:20}{len(cells):7d}{guess:+8.0%}" + "".join(f"{found[mark]:+9.0%}" for mark in MARKS))


if __name__ == "__main__":
    main()
