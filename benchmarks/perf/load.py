"""Processor time and memory of the commands that read stores, as the number of cells grows.

    python benchmarks/perf/load.py [--cells 2000 20000] [--folder FOLDER] [--only leaderboard ...]

The stores are of the load only: real configurations and keys, drawn scores. Nothing of them is a result.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from multiprocessing import Process
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

if TYPE_CHECKING:
    from gradleak.board.store import ImageRow

SEEDS, DEFENSES, ATTACKS = 10, 20, 10
PER_MODEL = SEEDS * DEFENSES * ATTACKS


def suite_of(models: int) -> dict[str, Any]:
    """Return a suite of `models` contexts with 20 defenses, 10 attacks and 10 seeds each."""
    weak = [{"name": "idlg", "label": f"idlg-{n}", "options": {"iterations": n}} for n in range(1, ATTACKS - 2)]
    kept = [{"name": "top-k", "label": f"top-{n}", "options": {"ratio": n / 100}} for n in range(1, DEFENSES)]
    return {
        "name": "load",
        "victims": 2,
        "seeds": list(range(SEEDS)),
        "candidates": 10,
        "controls": "listed",
        "knowledge": ["oblivious"],
        "datasets": ["digits"],
        "models": [{"name": "mlp", "label": f"mlp-{n}", "options": {"widths": [16 + n]}} for n in range(models)],
        "settings": [{"name": "fedsgd", "batch_size": 1, "grants": {"labels": "known"}}],
        "attacks": ["mean-image", "random-image", "linear-leakage", *weak],
        "defenses": ["none", *kept],
    }


def fill(path: Path, store: Path) -> None:
    """Write a store that has every cell of a suite, with scores drawn at random."""
    from gradleak import secret, suite
    from gradleak.board.store import CellResult, Store, victim_list
    from gradleak.evaluation.workshop import Workshop

    workshop, random = Workshop(), np.random.default_rng(0)
    with Store(store, create=True) as target:
        # Keys depend on the store's secret: without it a run would find nothing of its own here.
        kept = target.keep_secret(secret.draw())
        cells = suite.expand(suite.read(path), workshop.digest, secret=kept)
        first = next(iter(suite.attacking(cells)))
        target.write_victims(victim_list(first.stored()), *workshop.victims_of(first))
        for cell in suite.attacking(cells):
            blind = cell.attack.name in ("mean-image", "random-image")
            target.write(
                CellResult(
                    key=cell.key,
                    config=cell.stored(),
                    started="2026-01-01T00:00:00+00:00",
                    seconds=0.2,
                    device="cpu",
                    provenance={
                        "attack_family": "control" if blind else "optimisation",
                        "defense_family": "none" if cell.defense.name == "none" else "compression",
                        "bytes": 100,
                        "dense_bytes": 400,
                        "client_seconds": 0.01,
                    },
                    rows=[_row(victim, random) for victim in range(2)],
                    reconstructions=dict(enumerate(random.random((2, 1, 1, 8, 8)).astype(np.float32))),
                    traces={} if blind else {victim: np.linspace(1, 0.1, 20) for victim in range(2)},
                )
            )


def _row(victim: int, random: np.random.Generator) -> ImageRow:
    from gradleak.board.store import ImageRow

    return ImageRow(
        victim=victim,
        image=0,
        matched=0,
        finite=True,
        mse=0.01,
        psnr=float(random.normal(20, 4)),
        ssim=float(random.random()),
        reidentified=bool(random.random() > 0.5),
        label_correct=True,
        loss=0.1,
        loss_at_truth=0.05,
        message_norm=1.0,
        iterations=20,
        gradient_evaluations=20,
        seconds=0.1,
    )


def measured(arguments: list[object]) -> tuple[float, float]:
    """Return processor seconds and peak memory in GiB of a command in a process of its own, start-up included."""
    command = [sys.executable, "-m", "gradleak", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} ended with status {os.waitstatus_to_exitcode(status)}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def main() -> None:
    """Print one line a command and size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=[2000, 20000])
    parser.add_argument("--folder", type=Path, help="where stores are kept and found again")
    parser.add_argument("--only", nargs="+", help="commands to measure")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="gradleak-load-"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{'command':14}{'cells':>8}{'CPU s':>9}{'us a cell':>11}{'peak GiB':>10}")
    for cells in options.cells:
        path, store = folder / f"load-{cells}.yaml", folder / f"load-{cells}.sqlite"
        if not store.exists():
            path.write_text(yaml.safe_dump(suite_of(max(1, cells // PER_MODEL))))
            # In a process of its own: what this one holds would count as theirs.
            filling = Process(target=fill, args=(path, store))
            filling.start()
            filling.join()
        bundle, page = folder / f"load-{cells}.zip", folder / f"page-{cells}-{time.monotonic_ns()}"
        commands: dict[str, list[object]] = {
            "plan": ["run", path, "--store", folder / "none.sqlite", "--dry-run"],
            "run": ["run", path, "--store", store],
            "leaderboard": ["leaderboard", store, "--format", "csv"],
            "compare": ["compare", store, store],
            "check": ["store", "check", store],
            "publish": ["publish", store, "--out", bundle],
            "report": ["report", store, "--out", page],
        }
        for name, arguments in commands.items():
            if options.only and name not in options.only:
                continue
            bundle.unlink(missing_ok=True)
            seconds, memory = measured(arguments)
            print(f"{name:14}{cells:8d}{seconds:9.2f}{1e6 * seconds / cells:11.0f}{memory:10.2f}", flush=True)


if __name__ == "__main__":
    main()
