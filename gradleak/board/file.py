"""A database as a file: how it is made and opened, which files belong to it, whether it is still where it was."""

from __future__ import annotations

import os
import sqlite3
import time
from datetime import UTC, datetime
from pathlib import Path

from .. import __version__
from .schema import SCHEMA, STATEMENTS

PATIENCE = 60.0
"""Seconds to wait for another process's transaction."""


def is_blank(path: Path | str) -> bool:
    """Return whether nothing was ever stored at a path: no file, an empty one, or a database without tables.

    A run that is killed as it makes its store leaves one of these; the next one takes it for new.
    """
    path = Path(path)
    if not path.exists():
        return True
    if not path.is_file():
        return False
    try:
        database = connect(path)
        try:
            return not database.execute("SELECT 1 FROM sqlite_master").fetchone()
        finally:
            database.close()
    except sqlite3.Error:
        return False


def connect(path: Path) -> sqlite3.Connection:
    """Open a database, or make an empty one; read-only where this process may not write."""
    mode = "rwc"
    if path.exists() and not (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)):
        # Without write permission SQLite cannot make the files beside the store that a reader needs.
        log = log_of(path)
        mode = "ro" if log.exists() and log.stat().st_size else "ro&immutable=1"
    # Autocommit: transactions are ours, see `Store.transaction`.
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=PATIENCE, isolation_level=None)


def create_tables(database: sqlite3.Connection) -> None:
    """Make all tables in one transaction, in the main file: a process that dies meanwhile leaves a blank file."""
    database.execute("BEGIN IMMEDIATE")
    try:
        # Another process may have made the tables since we looked.
        if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone():
            for statement in STATEMENTS:
                database.execute(statement)
            created = datetime.now(UTC).isoformat(timespec="seconds")
            facts = {"schema": str(SCHEMA), "gradleak": __version__, "created": created}
            database.executemany("INSERT INTO meta VALUES (?, ?)", facts.items())
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:  # a full disk has ended it already
            database.execute("ROLLBACK")
        raise
    database.execute("PRAGMA wal_checkpoint(PASSIVE)")


def log_of(path: Path) -> Path:
    """Return the write-ahead log of a database, which lies beside the file itself, not beside a link to it."""
    real = path.resolve()
    return real.with_name(f"{real.name}-wal")


def place_of(path: Path) -> tuple[int, int]:
    """Return which file is at a path now: its device and number there."""
    found = path.stat()
    return found.st_dev, found.st_ino


def free_name(folder: Path, path: Path) -> Path:
    """Return a name in a folder for what is saved of a file; nothing has it yet."""
    number = 1
    while (free := folder / f"{path.stem}.saved-{number}{path.suffix or '.sqlite'}").exists():
        number += 1
    return free


def keep_log(database: sqlite3.Connection) -> None:
    """Let readers read while others write; without that they take turns, which is slower and no less safe."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            database.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                return
            time.sleep(0.05)
        else:
            return
