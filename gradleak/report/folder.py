"""A folder that holds a whole report: the page, the boards in every format, the rows, the figures."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq

from .. import __version__
from ..board import leaderboard
from ..board.flags import flag_board
from ..board.leaderboard import Board
from ..board.malicious import one_kind, server_boards
from ..board.results import Results
from ..board.store import Store
from ..errors import GradleakError
from ..paths import printable, written_whole
from . import figures, page
from . import render as render_boards
from .dictionary import schema
from .gallery import Pictures
from .reproduction import Reported, reproduction_board

MARKER = "report.json"
"""Lists the files of a report, so that the next one replaces these and nothing else."""
TABLES = {"leaderboard.md": "markdown", "leaderboard.tex": "latex"}
CONTEXTS, SCHEMA = "contexts", "schema.json"
PAGE, ROWS, FIGURES = "index.html", "rows.parquet", "figures"


def write(
    results: Results, stores: Sequence[Store], out: Path, reported: Sequence[Reported] = (), about: str = ""
) -> list[Path]:
    """Write a report and return its files; one that was there before is replaced, file by file.

    Args:
        results: what to show.
        stores: where its pictures and rows are.
        out: a new folder, or one of an earlier report.
        reported: published numbers to compare with.
        about: what the suite is, for the page's head.

    Raises:
        GradleakError: `out` holds something that no report wrote, or cannot be written.
    """
    before = _files_before(out)
    boards = all_boards(results, reported)
    contexts: list[Board] = []
    honest = one_kind(results)
    if 1 < len(honest.contexts) <= page.MOST_CONTEXTS:
        contexts = leaderboard.context_boards(honest)
    pictures = Pictures(results, stores)
    try:
        out.mkdir(parents=True, exist_ok=True)
        # First the marker, so that an interrupted report can be written again.
        _mark(out, before)
        written = [out / MARKER, *_write_tables(boards, contexts, stores, out)]
        written += figures.write(honest, boards, pictures, out / FIGURES)
        beside = [path.relative_to(out).as_posix() for path in written[1:]]
        made = page.write(results, boards, pictures, contexts, beside, about)
        written.append(_write_text(out / PAGE, printable(made, keep="\n\t")))
        names = sorted(path.relative_to(out).as_posix() for path in written)
        for name in set(before) - set(names):
            (out / name).unlink(missing_ok=True)
        _mark(out, names)
    except OSError as error:
        raise GradleakError(f"report {out}: cannot be written: {error.strerror or error}") from error
    return written


def _write_tables(
    boards: dict[str, Board], contexts: Sequence[Board], stores: Sequence[Store], out: Path
) -> list[Path]:
    """Write boards for people, a CSV for each kind of board, every row, and what all columns mean."""
    shown = [board for name, board in boards.items() if name != "flags"]
    written = [_write_text(out / name, render_boards([*shown, *contexts], form)) for name, form in TABLES.items()]
    columns: dict[str, list[str]] = {}
    for name, found in {**{name: [board] for name, board in boards.items()}, CONTEXTS: list(contexts)}.items():
        if found:
            text = render_boards(found, "csv")
            written.append(_write_text(out / f"{name}.csv", text))
            columns[f"{name}.csv"] = next(csv.reader(io.StringIO(text)), [])
    with written_whole(out / ROWS) as path:
        _write_rows(stores, path)
        columns[ROWS] = list(pq.read_schema(path).names)
    schemas = {name: schema(names) for name, names in columns.items()}
    text = json.dumps(schemas, indent=1, ensure_ascii=False)
    return [*written, out / ROWS, _write_text(out / SCHEMA, f"{text}\n")]


def _write_text(path: Path, text: str) -> Path:
    with written_whole(path) as beside:
        beside.write_text(text, encoding="utf-8")
    return path


def all_boards(results: Results, reported: Sequence[Reported] = ()) -> dict[str, Board]:
    """Return the boards of a report by name."""
    honest = one_kind(results)
    defenses, attacks = leaderboard.landing_board(honest), leaderboard.attack_board(honest)
    boards = {
        "defenses": defenses,
        "attacks": attacks,
        "pareto": leaderboard.pareto_board(defenses),
        "compute": leaderboard.compute_board(attacks),
        "flags": flag_board(honest),
    }
    boards |= {board.name: board for board in server_boards(results)}
    return {**boards, "reproduction": reproduction_board(results, reported)} if reported else boards


def _files_before(out: Path) -> list[str]:
    """Return the files of an earlier report; none where the folder is new or empty."""
    if out.exists() and not out.is_dir():
        raise GradleakError(f"report {out}: is a file, not a folder")
    if not out.exists() or not any(out.iterdir()):
        return []
    try:
        found: list[str] = json.loads((out / MARKER).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GradleakError(f"report {out}: holds files that no report wrote; name a new or empty folder") from error
    return [name for name in found if (out / name).resolve().is_relative_to(out.resolve())]


def _mark(out: Path, names: Sequence[str]) -> None:
    text = json.dumps({"made_by": "gradleak report", "version": __version__, "files": list(names)}, indent=1)
    _write_text(out / MARKER, text + "\n")


def _write_rows(stores: Sequence[Store], path: Path) -> None:
    """Write the rows of all stores as measured, each cell once, with their configurations as JSON."""
    stores[0].export_parquet(path)
    parts = [pd.read_parquet(path)] if len(stores) > 1 else []
    for store in stores[1:]:
        store.export_parquet(path)
        parts.append(pd.read_parquet(path))
    if parts:
        rows = pd.concat(parts, ignore_index=True).drop_duplicates(["key", "victim", "image"], ignore_index=True)
        rows.to_parquet(path, index=False)
