"""`gradleak run`: the cells of a suite that a store lacks."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..errors import GradleakError
from ..evaluation.summary import Summary
from ..paths import printable, written_whole
from ..secret import Secret, is_secret
from . import shared

_Executor = Annotated[str, typer.Option("--executor", metavar="NAME", help="processes, local or ray.")]
_Workers = Annotated[
    int | None,
    typer.Option("--workers", min=1, metavar="N", help="Worker processes [default: one a core, or one a GPU]."),
]
_RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray-address", metavar="ADDRESS", help="A Ray cluster: auto, ray://HOST:PORT [default: starts one here]."
    ),
]
_CellTimeout = Annotated[
    float, typer.Option("--cell-timeout", metavar="SECONDS", help="A cell that takes longer is ended and failed.")
]
_MemoryLimit = Annotated[
    float | None,
    typer.Option("--memory-limit", metavar="GIB", help="Memory of a worker [default: four fifths of the machine's]."),
]
_SummaryFile = Annotated[
    Path | None, typer.Option("--summary", metavar="FILE", help="Also write how the run ended, as JSON.")
]


def run(
    suite: Annotated[Path, typer.Argument(metavar="SUITE", help="A YAML file, e.g. benchmarks/quick.yaml.")],
    store: Annotated[
        Path | None, typer.Option("--store", metavar="FILE", help="Where results go [default: SUITE's name.sqlite].")
    ] = None,
    executor: _Executor = "processes",
    workers: _Workers = None,
    ray_address: _RayAddress = None,
    device: shared.Device = "cpu",
    data_root: shared.DataRoot = None,
    download: Annotated[bool, typer.Option("--download", help="Allow datasets to be downloaded there.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run failed cells again.")] = False,
    cell_timeout: _CellTimeout = 86400.0,
    memory_limit: _MemoryLimit = None,
    plugin: shared.PluginFiles = None,
    secret: shared.Secret = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and list the cells.")] = False,
    summary_file: _SummaryFile = None,
) -> None:
    """Run the cells of a suite that the store lacks; the same command goes on where it was interrupted."""
    from ..board import finished
    from ..suite import outline

    started = time.monotonic()
    outline(suite, added=[path.stem.replace("_", "-") for path in plugin or ()])
    target = store or Path(f"{suite.stem}.sqlite")
    fits = executor == "processes" or (executor == "local" and workers in (None, 1))
    plain = fits and (secret, ray_address, memory_limit, device) == (None, None, None, "cpu")
    plain = plain and not dry_run and not plugin and 0 < cell_timeout < math.inf
    watch = finished.watch(suite, data_root) if plain else None
    if watch is not None and (cells := finished.known(target, watch)) is not None:
        _end(Summary(cells, 0, cells, {}, time.monotonic() - started), suite, target, summary_file)
        return
    from ..evaluation import executors, runner
    from ..evaluation.workshop import Resources

    memory = None if memory_limit is None else int(memory_limit * 2**30)
    engine = executors.build(executor, workers, ray_address, executors.Limits(cell_timeout, memory))
    resources = Resources(data_root=data_root, download=download, device=device)
    plugins = tuple(plugin or ())
    chosen = None if secret is None else _secret(secret)
    if dry_run:
        _print_plan(runner.plan(suite, target, resources, plugins, chosen))
        return
    console = Console(stderr=True)
    summary = runner.run(suite, target, engine, resources, plugins, retry_failed, console, chosen, watch)
    _end(summary, suite, target, summary_file)


def _end(summary: Summary, suite: Path, store: Path, summary_file: Path | None) -> None:
    """Write the summary if it is wanted, and conclude."""
    if summary_file is not None:
        _write_summary(summary, suite, store, summary_file)
    _conclude(summary, store)


def _write_summary(summary: Summary, suite: Path, store: Path, path: Path) -> None:
    """Write how a run ended as JSON, for scripts.

    Raises:
        GradleakError: it cannot be written.
    """
    text = json.dumps({"suite": str(suite), "store": str(store), **asdict(summary)}, indent=2) + "\n"
    try:
        with written_whole(path) as beside:
            beside.write_text(text, encoding="utf-8")
    except OSError as error:
        raise GradleakError(f"--summary {path}: cannot be written ({error.strerror})") from error


def _secret(given: str) -> Secret:
    """Return a secret by its value, or by a store or bundle that has it."""
    from ..board.bundle import open_all

    if is_secret(given) or not Path(given).exists():
        return Secret.of(given, "--secret")
    with open_all([Path(given)]) as (store,):
        if store.secret is None:
            raise GradleakError(f"--secret {given}: has none; it is of a version before there were secrets")
        return store.secret


def _conclude(summary: Summary, target: Path) -> None:
    """Say how a run ended, and exit with the code that says the same."""
    for title, error in summary.failed.items():
        _say(f"failed: {title}: {error}")
    for title, reason in summary.pending.items():
        _say(f"not computed: {title}: {reason}")
    already = summary.stored - summary.ran
    if summary.interrupted:
        _say(f"interrupted: {summary.stored} of {summary.cells} cells are in {target}; the same command goes on")
        raise typer.Exit(128 + summary.interrupted)
    line = f"{summary.cells} cells: {summary.ran} run, {already} stored already, {len(summary.failed)} failed"
    _say(f"{line}; {summary.seconds:.0f} s; see: gradleak leaderboard {target}")
    if summary.failed:
        _say(f"run again with --retry-failed to repeat the {len(summary.failed)} failed cells")
    if summary.pending:
        _say(f"run again to compute the {len(summary.pending)} cells that this run could not")
    if summary.failed or summary.pending:
        raise typer.Exit(1)


def _print_plan(plan: Any) -> None:
    from ..evaluation.pace import in_words

    contexts: dict[str, list[Any]] = {}
    for cell in plan.cells:
        print(printable(f"{cell.key[:12]}  {plan.statuses.get(cell.key, 'to run'):6}  {cell.title}"))
        contexts.setdefault(cell.context, []).append(cell)
    for title, cells in contexts.items() if len(contexts) > 1 else ():
        victims = sum(getattr(cell, "victims", 0) for cell in cells)
        _say(printable(f"{title}: {len(cells)} cells, {victims} victims to attack"))
    for line in plan.anew:
        _say(line)
    counts = {state: sum(value == state for value in plan.statuses.values()) for state in ("ok", "failed")}
    to_run = len(plan.cells) - sum(counts.values())
    _say(f"{len(plan.cells)} cells: {to_run} to run, {counts['ok']} stored already, {counts['failed']} failed")
    if to_run:
        source = "by the cells that are stored" if plan.timed else "a guess: no cell is stored yet"
        _say(f"about {in_words(plan.estimate())} of one worker ({source})")


def _say(text: str) -> None:
    print(f"gradleak: {printable(text)}", file=sys.stderr)
