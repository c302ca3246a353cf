"""Upkeep of stores: what is wrong with one, what can be saved of a damaged one, and how to drop what is out of date."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import GradleakError
from ..paths import written_whole
from . import left_out, trust
from .file import connect, log_of
from .schema import LEFT_OUT
from .store import Store


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    check: str
    ok: bool
    detail: str


def check(path: Path) -> list[Finding]:
    """Look at all of a store: file, tables, cells, rows, arrays; nothing is changed.

    Raises:
        GradleakError: there is no such file, or it is no store at all.
    """
    with Store(path) as store:
        return list(_findings(store))


def _findings(store: Store) -> Iterator[Finding]:
    yield Finding("tables", True, "are those that gradleak makes")
    yield _found("file", lambda: _integrity(store))
    cells = None
    try:
        cells = store.cells()
        counts = cells["status"].value_counts()
        yield Finding("cells", True, f"{len(cells)}, {counts.get('failed', 0)} of them failed")
    except GradleakError as error:
        yield Finding("cells", False, str(error))
    if cells is not None:
        yield _found("rows", lambda: f"{len(store.rows(cells))} images")
    yield _found("arrays", lambda: _arrays(store))
    yield _found("victims", lambda: _victims(store))
    yield _found("left out", lambda: f"{left_out.lines_of(store.query, f'store {store.path}')} combinations")


def _found(name: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, look())
    except GradleakError as error:
        return Finding(name, False, str(error))


def _integrity(store: Store) -> str:
    problems = [str(line) for (line,) in store.query("PRAGMA integrity_check(5)") if line != "ok"]
    problems += [f"a line of {table} belongs to no cell" for table, *_ in store.query("PRAGMA foreign_key_check")[:3]]
    if problems:
        raise GradleakError("; ".join(" ".join(problem.split())[:200] for problem in problems))
    return "every page is sound"


def _arrays(store: Store) -> str:
    found = store.query("SELECT key, victim, kind FROM blobs JOIN cells ON cells.id = blobs.cell")
    for key, victim, kind in found:
        store.array(key, victim, kind)
    return f"{len(found)} can be read"


def _victims(store: Store) -> str:
    found = store.query("SELECT list, victim FROM victims")
    for name, victim in found:
        store.truth(name, victim)
    return f"{len(found)} in {len({name for name, _ in found})} lists can be read"


def rescue(path: Path, new: Path) -> tuple[int, int]:
    """Write every cell that can be read whole into a new store; return how many were saved and how many were not.

    The damaged file stays as it is. What of it lies in pages that cannot be read is not counted: nobody knows of it.

    Raises:
        GradleakError: `new` is there already or cannot be written, or nothing can be read of `path`.
    """
    if new.exists():
        raise GradleakError(f"store {new}: already exists; nothing is overwritten")
    if not path.is_file():
        raise GradleakError(f"store {path}: no such file")
    try:
        with written_whole(new) as beside, contextlib.closing(_looked_at(path)) as damaged:
            with Store(beside, create=True) as store:
                saved, lost = _save_cells(damaged, store)
                if not saved:
                    raise GradleakError(f"store {path}: no cell of it can be read")
                _save_victims(damaged, store)
                _save_left_out(damaged, store)
            log_of(beside).unlink(missing_ok=True)
    except (OSError, sqlite3.Error) as error:
        raise GradleakError(f"store {path}: cannot be rescued to {new}: {error}") from error
    return saved, lost


def _looked_at(path: Path) -> sqlite3.Connection:
    database = connect(path)
    database.execute("PRAGMA query_only = ON")
    trust.guard(database)
    return database


def _save_cells(damaged: sqlite3.Connection, store: Store) -> tuple[int, int]:
    saved = lost = 0
    for number in _numbers(damaged):
        try:
            _save_cell(damaged, store, number)
            saved += 1
        except (sqlite3.Error, GradleakError, UnicodeDecodeError):
            lost += 1
    return saved, lost


def _numbers(damaged: sqlite3.Connection) -> list[int]:
    """Return the numbers of cells, as far as the table or else its index can be followed."""
    found: set[int] = set()
    for query in ("SELECT id FROM cells NOT INDEXED ORDER BY id", "SELECT id FROM cells ORDER BY key"):
        with contextlib.suppress(sqlite3.Error):
            for (number,) in damaged.execute(query):
                found.add(number)
    return sorted(number for number in found if isinstance(number, int))


def _save_cell(damaged: sqlite3.Connection, store: Store, number: int) -> None:
    """Copy one cell with its rows and arrays, and keep it if it can be read like any other."""
    cell = damaged.execute("SELECT * FROM cells NOT INDEXED WHERE id = ?", (number,)).fetchone()
    if cell is None:
        raise GradleakError("its line is gone")
    parts = {
        "cells": [cell],
        "rows": damaged.execute("SELECT * FROM rows WHERE cell = ?", (number,)).fetchall(),
        "blobs": damaged.execute("SELECT * FROM blobs WHERE cell = ?", (number,)).fetchall(),
    }
    with store.transaction() as database:
        for table, lines in parts.items():
            _insert(database, table, lines)
        checked = store.cells_where("id = ?", (number,))
        rows = store.rows(checked)
        expected = int(checked["victims"].iloc[0] * checked["batch_size"].iloc[0])
        if (
            checked["status"].iloc[0] == "ok"
            and checked["attack_family"].iloc[0] != "utility"
            and len(rows) != expected
        ):
            raise GradleakError(f"{len(rows)} of its {expected} rows can be read")
        for _, victim, kind, *_ in parts["blobs"]:
            store.array(checked["key"].iloc[0], victim, kind)


def _save_victims(damaged: sqlite3.Connection, store: Store) -> None:
    with contextlib.suppress(sqlite3.Error):
        for line in damaged.execute("SELECT * FROM victims NOT INDEXED"):
            with contextlib.suppress(sqlite3.Error, GradleakError), store.transaction() as database:
                _insert(database, "victims", [line])
                store.truth(line[0], line[1])


def _save_left_out(damaged: sqlite3.Connection, store: Store) -> None:
    """Copy what was noted on combinations that are left out: all of it, or else the next run notes it again."""
    with contextlib.suppress(sqlite3.Error, GradleakError, UnicodeDecodeError):
        lines = damaged.execute("SELECT * FROM left_out").fetchall()
        trust.check_left_out(lines, "store")
        with store.transaction() as database:
            database.execute(LEFT_OUT)
            _insert(database, "left_out", lines)


def _insert(database: sqlite3.Connection, table: str, lines: Sequence[tuple[Any, ...]]) -> None:
    if lines:
        database.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(lines[0]))})", lines)


def prune(path: Path, keep: Callable[[str, dict[str, Any]], bool], dry_run: bool = False) -> list[str]:
    """Drop the cells that are not to be kept, with their rows and arrays; return their keys.

    Args:
        path: the store.
        keep: told a cell's key and configuration.
        dry_run: drop nothing, only tell.
    """
    with Store(path) as store:
        cells = store.cells()
        gone = [key for key, config in zip(cells["key"], cells["config"], strict=True) if not keep(key, config)]
        if gone and not dry_run:
            with store.transaction() as database:
                database.executemany("DELETE FROM cells WHERE key = ?", [(key,) for key in gone])
            left_out.forget(store)
            store.query("VACUUM")
    return gone
