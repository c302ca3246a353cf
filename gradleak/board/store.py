"""The store: one SQLite file that holds every finished cell, its per-image rows and its reconstructions.

A cell is written in one transaction, so after a crash it is there once or not at all. Any number of runs may write and
read at a time; which of them computes a cell is settled by `claims`.
"""

from __future__ import annotations

import json
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pandas as pd

from .. import __version__
from ..errors import GradleakError
from ..secret import Secret
from . import left_out, trust
from .codec import dump, late_progress, pack, row_values, unpack
from .file import connect, create_tables, free_name, is_blank, keep_log, log_of, place_of
from .schema import (
    DESCRIBED,
    INTEGERS,
    NAMED,
    NUMBERS,
    ROW_COLUMNS,
    SCHEMA,
    STATUSES,
    Array,
    CellResult,
    ImageRow,
    describe,
    names_of,
    victim_list,
)

__all__ = [
    "SCHEMA",
    "STATUSES",
    "Array",
    "CellResult",
    "ImageRow",
    "Store",
    "is_blank",
    "late_progress",
    "victim_list",
]

_SIDES = {"reconstruction": 4, "trace": 1}
CHECKPOINT = 60.0
"""Seconds after which a commit also brings the main file up to date, so that it can be read without its log."""


class Store:
    """A store on disk; a context manager.

    Raises:
        GradleakError: there is no such file and `create` is False, or the file is not a store of this schema, or
            holds what no store holds. An existing file is never overwritten.
    """

    def __init__(self, path: Path | str, create: bool = False):
        """Open the store at `path`; with `create`, make it if nothing is there."""
        self.path = Path(path)
        self.checked: dict[str, str] = {}
        """How far cells were checked, by key, where the store came in a bundle (`record`)."""
        if not self.path.exists() and not create:
            raise GradleakError(f"store {self.path}: no such file")
        if self.path.is_dir():
            raise GradleakError(f"store {self.path}: is a folder, not a file")
        if self.path.exists() and not self.path.is_file():
            raise GradleakError(f"store {self.path}: is not a regular file")
        log = log_of(self.path).exists()
        self._brought_up_to_date = time.monotonic()
        try:
            self._database = connect(self.path)
        except (sqlite3.Error, OSError) as error:
            raise GradleakError(f"store {self.path}: cannot be opened: {error}") from error
        try:
            self._prepare(create, log)
        except (sqlite3.Error, OSError) as error:
            self.close()
            other = isinstance(error, sqlite3.DatabaseError) and "not a database" in str(error)
            what = "is not a SQLite file" if other else "cannot be opened"
            raise GradleakError(f"store {self.path}: {what}: {error}") from error
        except GradleakError:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; the last process to do so also tidies the write-ahead log away."""
        self._database.close()

    def has(self, key: str) -> bool:
        """Return whether a finished cell has this key; a failed one does not count."""
        return bool(self.query("SELECT 1 FROM cells WHERE key = ? AND status = 'ok'", (key,)))

    @property
    def secret(self) -> Secret | None:
        """What the private randomness of its clients is drawn from; None in older stores, and before any run.

        Raises:
            GradleakError: what is stored is no secret.
        """
        found = self.query("SELECT value FROM meta WHERE name = 'secret'")
        return Secret.of(str(found[0][0]), self._name) if found else None

    def keep_secret(self, secret: Secret) -> Secret:
        """Keep a secret, unless there is one; return the one that is there now."""
        with self.transaction() as database:
            database.execute("INSERT OR IGNORE INTO meta VALUES ('secret', ?)", (secret.value,))
        kept = self.secret
        assert kept is not None
        return kept

    def statuses(self) -> dict[str, str]:
        """Return the status (ok, failed) of every cell by its key."""
        return dict(self.query("SELECT key, status FROM cells"))

    def seconds(self) -> dict[str, float]:
        """Return what every finished cell took, by its key."""
        return dict(self.query("SELECT key, seconds FROM cells WHERE status = 'ok'"))

    def images(self) -> int:
        """Return how many true images have a row."""
        return int(self.query("SELECT count(*) FROM rows")[0][0])

    def failed(self) -> dict[str, str]:
        """Return the error of every failed cell by its key."""
        return dict(self.query("SELECT key, error FROM cells WHERE status = 'failed' ORDER BY key"))

    def write(self, result: CellResult) -> None:
        """Add a cell in one transaction; a failed one of the same key is replaced.

        Raises:
            GradleakError: the cell is there already, a row has a status outside `STATUSES`, or as `offer`.
        """
        if not self.offer(result):
            raise GradleakError(f"store {self.path}: cell {result.key[:12]} is there already")

    def offer(self, result: CellResult) -> bool:
        """Add a cell in one transaction, unless it is there; return whether it was added.

        A failed cell of the same key is replaced. A claim on the cell ends.

        Raises:
            GradleakError: a row has a status outside `STATUSES`; the file cannot be written; or it is no longer at its
                path (then all that it holds, this cell too, was saved in another file, which the error names).
        """
        for row in result.rows:
            if row.status not in STATUSES:
                raise GradleakError(
                    f"cell {result.key[:12]}: row status {row.status!r} (allowed: {', '.join(STATUSES)})"
                )
        with self.transaction() as database:
            if self.claimed:
                database.execute("DELETE FROM claims WHERE key = ?", (result.key,))
            database.execute("DELETE FROM cells WHERE key = ? AND status = 'failed'", (result.key,))
            free = database.execute("SELECT 1 FROM cells WHERE key = ?", (result.key,)).fetchone() is None
            if free:
                self._insert(result)
        self.confirm()
        return free

    def confirm(self) -> None:
        """Check that what is written can be found: that the open file is still the one at its path.

        Raises:
            GradleakError: it was moved or deleted. All that it holds was saved in another file, which the error names.
        """
        if self._is_inplace_of():
            return
        for folder in (self.path.parent, Path(tempfile.gettempdir())):
            saved = free_name(folder, self.path)
            try:
                self._database.execute("VACUUM INTO ?", (str(saved),))
            except sqlite3.Error:
                continue
            raise GradleakError(
                f"store {self.path}: was moved or deleted while in use; all its cells are saved in {saved}"
            )
        raise GradleakError(f"store {self.path}: was moved or deleted while in use, and could not be saved elsewhere")

    def rename(self, configs: Mapping[str, Mapping[str, Any]]) -> int:
        """Give stored cells the labels of these configurations, by key; return how many had others.

        A key does not depend on labels, so whoever changes one in a suite need not compute its cells again.
        """
        changed = []
        for key, text in self.query("SELECT key, config FROM cells"):
            if key in configs:
                config = json.loads(text)
                names = {part: names_of(configs[key][part]) for part in NAMED}
                if any(config[part].get(name) != value for part, new in names.items() for name, value in new.items()):
                    changed.append((dump({**config, **{p: {**config[p], **new} for p, new in names.items()}}), key))
        if changed:
            with self.transaction() as database:
                database.executemany("UPDATE cells SET config = ? WHERE key = ?", changed)
        return len(changed)

    def write_victims(self, name: str, images: Array, labels: Array) -> None:
        """Keep the truth of a victim list, once: images [N, B, C, H, W] in [0, 1], labels [N, B].

        Victims that are there already are left as they are; `name` comes from `victim_list`.
        """
        if {victim for (victim,) in self.query("SELECT victim FROM victims WHERE list = ?", (name,))} >= set(
            range(len(images))
        ):
            return
        with self.transaction() as database:
            database.executemany(
                "INSERT OR IGNORE INTO victims VALUES (?, ?, ?, ?, ?, ?)",
                [
                    (name, victim, json.dumps(label.tolist()), *pack(image))
                    for victim, (image, label) in enumerate(zip(images, labels, strict=True))
                ],
            )

    def delete_failed(self) -> int:
        """Delete every failed cell, so that it is run again; return how many there were."""
        with self.transaction() as database:
            return database.execute("DELETE FROM cells WHERE status = 'failed'").rowcount

    def cells(self) -> pd.DataFrame:
        """Return one line a cell, sorted by key.

        Columns: key, status, error, started, seconds, device; config, versions and provenance as dicts; and
        the labels of the configuration: attack, attack_name, attack_family, defense, defense_name,
        defense_family, model, dataset, setting, knowledge, batch_size, victims, seed, suite, suite_version.

        Raises:
            GradleakError: a cell is not as a cell has to be (`trust`).
        """
        return self.cells_where("true")

    def cells_where(self, condition: str, values: tuple[Any, ...] = ()) -> pd.DataFrame:
        """Return some cells as `cells` does, by a condition of SQL."""
        frame = self._frame("cells", f" WHERE {condition} ORDER BY key", values)
        trust.check_cells(frame, self._name)
        for name in ("config", "versions", "provenance"):
            plain = trust.read_json(name, frame[name].tolist(), frame["key"].tolist(), self._name)
            frame[name] = pd.Series(plain, index=frame.index, dtype=object)
        described = [describe(*pair) for pair in zip(frame["config"], frame["provenance"], strict=True)]
        labels = pd.DataFrame(described, index=frame.index, columns=list(DESCRIBED)).astype(DESCRIBED)
        cells = pd.concat([frame, labels], axis=1)
        if (cells["status"] == "failed").any():
            trust.check_failed(cells, self._kept(), self._name)
        return cells

    def rows(self, cells: pd.DataFrame | None = None) -> pd.DataFrame:
        """Return one line a true image, sorted by cell key, victim, image, with the columns of `ImageRow`.

        Beside them stand the cell's key and the labels of its configuration, as in `cells`. Unmeasured
        numbers are NaN; yes-or-no columns are 0, 1 or NaN; extras stay JSON text.

        Args:
            cells: what `cells` returned, to spare reading it again.

        Raises:
            GradleakError: a row is not as a row has to be (`trust`).
        """
        cells = (self.cells() if cells is None else cells)[["id", "key", *DESCRIBED]]
        for kinds, names in (("'integer'", INTEGERS), ("'integer', 'real', 'null'", NUMBERS)):
            for name in names:
                if odd := self.query(f"SELECT {name} FROM rows WHERE typeof({name}) NOT IN ({kinds}) LIMIT 1"):
                    raise GradleakError(f"{self._name}: a row has {name} {odd[0][0]!r:.40}, which is not a number")
        rows = self._frame("rows").astype(dict.fromkeys(NUMBERS, float))
        order = ["key", "victim", "image"]
        joined = cells.merge(rows, left_on="id", right_on="cell", how="inner")
        trust.check_rows(joined, self._name)
        return joined.drop(columns=["id", "cell"]).sort_values(order, ignore_index=True)

    def unsuited(self) -> pd.DataFrame:
        """Return the attacks that do not apply to a defense in a context, with the reason (`left_out.unsuited`)."""
        return left_out.unsuited(self.query, self._name)

    def reconstruction(self, key: str, victim: int) -> Array:
        """Return the attacker's images of one victim, [B, C, H, W].

        Raises:
            GradleakError: none is kept, or it is no stack of images.
        """
        return self.array(key, victim, "reconstruction")

    def trace(self, key: str, victim: int) -> Array:
        """Return the attacker's loss over its iterations for one victim, [T].

        Raises:
            GradleakError: none is kept, or it is no list of losses.
        """
        return self.array(key, victim, "trace")

    def array(self, key: str, victim: int, kind: str) -> Array:
        """Return a `reconstruction` or a `trace`.

        Raises:
            GradleakError: none is kept, or it is not what it is called.
        """
        query = (
            "SELECT shape, dtype, data FROM blobs JOIN cells ON cells.id = blobs.cell"
            " WHERE cells.key = ? AND victim = ? AND kind = ?"
        )
        found = self.query(query, (key, victim, kind))
        if not found:
            raise GradleakError(f"store {self.path}: cell {key[:12]} keeps no {kind} of victim {victim}")
        return self._unpack(found[0], _SIDES.get(kind, 0), f"cell {key[:12]}: {kind} of victim {victim}")

    def truth(self, name: str, victim: int) -> tuple[Array, Array]:
        """Return the images [B, C, H, W] and labels [B] of one victim of a list.

        Raises:
            GradleakError: the list or victim is not kept, or it is no stack of images with a label each.
        """
        query = "SELECT shape, dtype, data, labels FROM victims WHERE list = ? AND victim = ?"
        found = self.query(query, (name, victim))
        if not found:
            raise GradleakError(f"store {self.path}: no victim {victim} of list {name!r}")
        images = self._unpack(found[0][:3], 4, f"victim {victim} of list {name!r}")
        try:
            labels = json.loads(found[0][3])
            if len(labels) != len(images) or not all(type(label) is int and abs(label) < 2**63 for label in labels):
                raise ValueError("not a label an image")
        except (ValueError, TypeError, RecursionError) as error:
            raise GradleakError(f"{self._name}: labels of victim {victim} of list {name!r}: {error}") from error
        return images, np.asarray(labels)

    def victim_lists(self) -> list[str]:
        """Return the names of the victim lists whose truth is kept, sorted."""
        return [name for (name,) in self.query("SELECT DISTINCT list FROM victims ORDER BY list")]

    def export_parquet(self, path: Path | str) -> None:
        """Write `rows` to a Parquet file, with each cell's configuration and provenance as JSON text."""
        cells = self.cells()
        rows, cells = self.rows(cells), cells.set_index("key")
        for name in ("config", "provenance", "versions"):
            rows[name] = rows["key"].map(cells[name].map(dump))
        rows["device"] = rows["key"].map(cells["device"])
        rows.to_parquet(path, index=False)

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Write in the block, all or nothing.

        Raises:
            GradleakError: the file cannot be written; nothing of the block is kept.
        """
        database = self._database
        try:
            database.execute("BEGIN IMMEDIATE")
            yield database
            database.execute("COMMIT")
        except (sqlite3.OperationalError, OSError) as error:
            self._roll_back()
            raise GradleakError(f"store {self.path}: cannot be written: {error}") from error
        except BaseException:
            self._roll_back()
            raise
        if time.monotonic() > self._brought_up_to_date + CHECKPOINT:
            self._brought_up_to_date = time.monotonic()
            database.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def _roll_back(self) -> None:
        if self._database.in_transaction:  # a full disk has ended it already
            self._database.execute("ROLLBACK")

    @property
    def _name(self) -> str:
        return f"store {self.path}"

    @property
    def claimed(self) -> bool:
        """Whether the file has a table of claims."""
        return bool(self.query("SELECT 1 FROM sqlite_master WHERE name = 'claims'"))

    def query(self, query: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        """Return the lines that a query finds.

        Raises:
            GradleakError: the file cannot be read, or not in the time of `trust.SECONDS`.
        """
        try:
            with trust.in_time(self._database):
                return self._database.execute(query, values).fetchall()
        except (sqlite3.Error, UnicodeDecodeError, OverflowError) as error:
            raise GradleakError(f"store {self.path}: cannot be read: {error}") from error

    def _frame(self, table: str, rest: str = "", values: tuple[Any, ...] = ()) -> pd.DataFrame:
        columns = [name for _, name, *_ in self.query(f"PRAGMA table_info({table})")]
        lines = self.query(f"SELECT * FROM {table}{rest}", values)
        return pd.DataFrame.from_records(lines, columns=columns, coerce_float=True)

    def _kept(self) -> dict[str, int]:
        """Return how many images of each list of victims are stored, by lengths of the lists of labels."""
        kept: dict[str, int] = {}
        for name, labels in self.query("SELECT list, labels FROM victims"):
            kept[name] = kept.get(name, 0) + (labels.count(",") + 1 if isinstance(labels, str) else 0)
        return kept

    def _prepare(self, create: bool, log: bool) -> None:
        database = self._database
        trust.guard(database)
        blank = not database.execute("SELECT 1 FROM sqlite_master").fetchone()
        if blank and create:
            create_tables(database)
        elif blank:
            raise GradleakError(f"store {self.path}: {self._why_blank(log)}")
        names = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
        if not {"meta", "cells"} <= names:
            raise GradleakError(f"store {self.path}: is a SQLite file, but not a store of gradleak")
        found = database.execute("SELECT value FROM meta WHERE name = 'schema'").fetchone()
        if found is None or found[0] != str(SCHEMA):
            version = str(found[0])[:40] if found else "unknown"
            raise GradleakError(
                f"store {self.path}: has schema {version}, gradleak {__version__} reads schema {SCHEMA}; "
                "use the version that wrote it, or a new file"
            )
        trust.check_tables(database, self._name)
        database.execute("PRAGMA foreign_keys = ON")
        if create and database.execute("PRAGMA journal_mode").fetchone()[0] == "delete":
            keep_log(database)
        # Every commit survives the death of the process; only a power cut may cost the last ones.
        database.execute("PRAGMA synchronous = NORMAL")
        self._place = place_of(self.path)
        self._log: tuple[int, int] | None = None

    def _why_blank(self, log: bool) -> str:
        if self._database.execute("PRAGMA journal_mode").fetchone()[0] == "wal" and not log:
            return f"holds no tables; if it is a copy, they are in {log_of(self.path).name}, which was not copied"
        return "is empty; `gradleak run` fills it"

    def _is_inplace_of(self) -> bool:
        try:
            if place_of(self.path) != self._place:
                return False
            if self._database.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                return True
            log = place_of(log_of(self.path))
        except (OSError, sqlite3.Error):
            return False
        known, self._log = self._log, log
        return known in (None, log)

    def _insert(self, result: CellResult) -> None:
        database = self._database
        cell = self._insert_cell(result)
        marks = ", ".join("?" * (len(ROW_COLUMNS) + 1))
        rows = [(cell, *row_values(row, result.traces)) for row in result.rows]
        database.executemany(f"INSERT INTO rows VALUES ({marks})", rows)
        blobs = [("reconstruction", result.reconstructions), ("trace", result.traces)]
        database.executemany(
            "INSERT INTO blobs VALUES (?, ?, ?, ?, ?, ?)",
            [(cell, victim, kind, *pack(array)) for kind, arrays in blobs for victim, array in arrays.items()],
        )

    def _insert_cell(self, result: CellResult) -> int:
        cursor = self._database.execute(
            "INSERT INTO cells (key, config, status, error, started, seconds, device, versions, provenance)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                result.key,
                dump(result.config),
                result.status,
                result.error,
                result.started,
                result.seconds,
                result.device,
                dump(result.versions),
                dump(result.provenance),
            ),
        )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def _unpack(self, packed: tuple[Any, ...], sides: int, what: str) -> Array:
        try:
            array = unpack(*packed)
            if array.ndim != sides or (sides == 4 and array.size == 0):
                raise ValueError(f"shape {list(array.shape)}, expected {sides} sides")
        except (ValueError, TypeError, RecursionError, MemoryError) as error:
            raise GradleakError(f"store {self.path}: {what}: {error}") from error
        return array
