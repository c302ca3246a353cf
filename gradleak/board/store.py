"""The store: one SQLite file that holds every finished cell, its per-image rows and its reconstructions.

A cell is written in one transaction, so after a crash it is there once or not at all. One process writes;
any number may read meanwhile.
"""

from __future__ import annotations

import json
import math
import os
import sqlite3
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pandas as pd

from .. import __version__
from ..errors import GradleakError

SCHEMA = 1
"""Raised whenever the tables below change; a store of another schema is refused, never converted in place."""

STATUSES = ("ok", "diverged", "oom", "timeout", "invalid", "error")
"""How the attack on one victim ended; everything but `ok` is scored at the floor."""

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class ImageRow:
    """One true image of one victim: how it fared. What was not measured is None."""

    victim: int
    image: int
    status: str = "ok"
    """One of `STATUSES`."""
    matched: int | None = None
    """Index of the reconstruction that was assigned to this image."""
    finite: bool | None = None
    """Whether that reconstruction held only finite pixels."""
    mse: float | None = None
    psnr: float | None = None
    """dB."""
    ssim: float | None = None
    ms_ssim: float | None = None
    lpips: float | None = None
    reidentified: bool | None = None
    label_correct: bool | None = None
    label_found: bool | None = None
    oracle_psnr: float | None = None
    """dB of the restart that the truth would have picked; a ceiling, never a headline."""
    loss: float | None = None
    """The attacker's loss at its answer, of the whole victim."""
    loss_at_truth: float | None = None
    """The attacker's loss at the true images, of the whole victim."""
    message_norm: float | None = None
    """Euclidean norm of the victim's message."""
    late_progress: float | None = None
    """Share of the loss's fall that came in the last tenth of the iterations; from the trace if left out."""
    iterations: int | None = None
    gradient_evaluations: int | None = None
    seconds: float | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)
    """Anything else, as JSON."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Return a row of the known keys, all others as extras."""
        known = {item.name for item in fields(cls)} - {"extras"}
        row = {name: value for name, value in values.items() if name in known}
        return cls(**row, extras={name: value for name, value in values.items() if name not in known})


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """All that is kept of one cell; plain Python and NumPy."""

    key: str
    """Hash of the resolved configuration."""
    config: Mapping[str, Any]
    """The resolved choices: attack, defense, model, dataset, setting, knowledge, victims, seed and suite."""
    status: Literal["ok", "failed"] = "ok"
    error: str = ""
    """What went wrong, if the cell failed or its attack's whole answer was invalid."""
    started: str = ""
    """ISO 8601, UTC."""
    seconds: float = 0.0
    device: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """What is known beside the configuration. The leaderboard reads these, all optional:

    `attack_family` ("control" for a floor), `adaptive` (the attack uses what it knows of the defense),
    `threat_model`, `defense_family` ("none" for no defense), `stochastic` (messages of one update differ),
    `bytes` and `dense_bytes` of a message, `epsilon` ({"epsilon", "delta", "accountant", "unit"}),
    `client_seconds`, `test_accuracy`, `training_epsilon` (as `epsilon`, of all messages of a training run).
    """
    rows: Sequence[ImageRow] = ()
    reconstructions: Mapping[int, Array] = field(default_factory=dict)
    """By victim, [B, C, H, W] in the order of the attack's answer (see `ImageRow.matched`)."""
    traces: Mapping[int, Array] = field(default_factory=dict)
    """By victim, the attacker's loss over its iterations, [T]."""


_ROW_COLUMNS = tuple(item.name for item in fields(ImageRow))
_TEXTS = ("status", "extras")
_INTEGERS = ("victim", "image")
_TABLES = f"""
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE cells (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, config TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('ok', 'failed')), error TEXT NOT NULL,
    started TEXT NOT NULL, seconds REAL NOT NULL, device TEXT NOT NULL,
    versions TEXT NOT NULL, provenance TEXT NOT NULL
);
CREATE TABLE rows (
    cell INTEGER NOT NULL REFERENCES cells (id) ON DELETE CASCADE,
    {", ".join(name + (" NOT NULL" if name in _INTEGERS + _TEXTS else "") for name in _ROW_COLUMNS)},
    PRIMARY KEY (cell, victim, image)
) WITHOUT ROWID;
CREATE TABLE blobs (
    cell INTEGER NOT NULL REFERENCES cells (id) ON DELETE CASCADE,
    victim INTEGER NOT NULL, kind TEXT NOT NULL, shape TEXT NOT NULL, dtype TEXT NOT NULL, data BLOB NOT NULL,
    PRIMARY KEY (cell, victim, kind)
);
CREATE TABLE victims (
    list TEXT NOT NULL, victim INTEGER NOT NULL, labels TEXT NOT NULL,
    shape TEXT NOT NULL, dtype TEXT NOT NULL, data BLOB NOT NULL,
    PRIMARY KEY (list, victim)
);
"""


def victim_list(config: Mapping[str, Any]) -> str:
    """Return the name of the list of victims that a cell attacks: dataset, its version and digest, images a victim.

    Cells with equal names attack the same images, victim by victim; tuning victims are a list of their own.
    """
    dataset = config["dataset"]
    purpose = "tuning" if config.get("tuning") else "evaluation"
    size = config["setting"].get("batch_size", 1)
    # The version is part of the seed that picks victims, whatever the images.
    return f"{dataset['name']}/{dataset.get('version', '')}/{dataset.get('digest', '')}/{purpose}/{size}"


class Store:
    """A store on disk; a context manager.

    Raises:
        GradleakError: there is no such file and `create` is False, or the file is not a store of this schema.
            An existing file is never overwritten.
    """

    def __init__(self, path: Path | str, create: bool = False):
        """Open the store at `path`; with `create`, make it if nothing is there."""
        self.path = Path(path)
        if not self.path.exists() and not create:
            raise GradleakError(f"store {self.path}: no such file")
        if self.path.is_dir():
            raise GradleakError(f"store {self.path}: is a folder, not a file")
        try:
            self._database = self._connect()
        except sqlite3.OperationalError as error:
            raise GradleakError(f"store {self.path}: cannot be opened: {error}") from error
        try:
            self._prepare(create)
        except sqlite3.DatabaseError as error:
            self.close()
            locked = isinstance(error, sqlite3.OperationalError)
            what = "cannot be opened" if locked else "is not a SQLite file"
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
        found = self._database.execute("SELECT 1 FROM cells WHERE key = ? AND status = 'ok'", (key,))
        return found.fetchone() is not None

    def statuses(self) -> dict[str, str]:
        """Return the status (ok, failed) of every cell by its key."""
        return dict(self._database.execute("SELECT key, status FROM cells"))

    def write(self, result: CellResult) -> None:
        """Add a cell in one transaction; a failed one of the same key is replaced.

        Raises:
            GradleakError: the cell is there already, or a row has a status outside `STATUSES`.
        """
        for row in result.rows:
            if row.status not in STATUSES:
                raise GradleakError(
                    f"cell {result.key[:12]}: row status {row.status!r} (allowed: {', '.join(STATUSES)})"
                )
        with self._transaction() as database:
            database.execute("DELETE FROM cells WHERE key = ? AND status = 'failed'", (result.key,))
            if database.execute("SELECT 1 FROM cells WHERE key = ?", (result.key,)).fetchone():
                raise GradleakError(f"store {self.path}: cell {result.key[:12]} is there already")
            cell = self._insert_cell(result)
            marks = ", ".join("?" * (len(_ROW_COLUMNS) + 1))
            database.executemany(
                f"INSERT INTO rows VALUES ({marks})",
                [(cell, *_row_values(row, result.traces)) for row in result.rows],
            )
            blobs = [("reconstruction", result.reconstructions), ("trace", result.traces)]
            database.executemany(
                "INSERT INTO blobs VALUES (?, ?, ?, ?, ?, ?)",
                [(cell, victim, kind, *_pack(array)) for kind, arrays in blobs for victim, array in arrays.items()],
            )

    def rename(self, configs: Mapping[str, Mapping[str, Any]]) -> int:
        """Give stored cells the labels of these configurations, by key; return how many had others.

        A key does not depend on labels, so whoever changes one in a suite need not compute its cells again.
        """
        with self._transaction() as database:
            changed = []
            for key, text in database.execute("SELECT key, config FROM cells").fetchall():
                config = json.loads(text)
                if key in configs:
                    names = {part: {**config[part], **_names(configs[key][part])} for part in _NAMED}
                    if _dump({**config, **names}) != _dump(config):
                        changed.append((_dump({**config, **names}), key))
            database.executemany("UPDATE cells SET config = ? WHERE key = ?", changed)
            return len(changed)

    def write_victims(self, name: str, images: Array, labels: Array) -> None:
        """Keep the truth of a victim list, once: images [N, B, C, H, W] in [0, 1], labels [N, B].

        Victims that are there already are left as they are; `name` comes from `victim_list`.
        """
        with self._transaction() as database:
            database.executemany(
                "INSERT OR IGNORE INTO victims VALUES (?, ?, ?, ?, ?, ?)",
                [
                    (name, victim, json.dumps(label.tolist()), *_pack(image))
                    for victim, (image, label) in enumerate(zip(images, labels, strict=True))
                ],
            )

    def delete_failed(self) -> int:
        """Delete every failed cell, so that it is run again; return how many there were."""
        with self._transaction() as database:
            return database.execute("DELETE FROM cells WHERE status = 'failed'").rowcount

    def cells(self) -> pd.DataFrame:
        """Return one line a cell, sorted by key.

        Columns: key, status, error, started, seconds, device; config, versions and provenance as dicts; and
        the labels of the configuration: attack, attack_name, attack_family, defense, defense_name,
        defense_family, model, dataset, setting, knowledge, batch_size, victims, seed, suite, suite_version.
        """
        frame = pd.read_sql_query("SELECT * FROM cells ORDER BY key", self._database)
        for name in ("config", "versions", "provenance"):
            frame[name] = pd.Series([json.loads(text) for text in frame[name]], index=frame.index, dtype=object)
        described = [_describe(*pair) for pair in zip(frame["config"], frame["provenance"], strict=True)]
        labels = pd.DataFrame(described, index=frame.index, columns=list(_DESCRIBED)).astype(_DESCRIBED)
        return pd.concat([frame, labels], axis=1)

    def rows(self, cells: pd.DataFrame | None = None) -> pd.DataFrame:
        """Return one line a true image, sorted by cell key, victim, image, with the columns of `ImageRow`.

        Beside them stand the cell's key and the labels of its configuration, as in `cells`. Unmeasured
        numbers are NaN; yes-or-no columns are 0, 1 or NaN; extras stay JSON text.

        Args:
            cells: what `cells` returned, to spare reading it again.
        """
        cells = (self.cells() if cells is None else cells)[["id", "key", *_DESCRIBED]]
        rows = pd.read_sql_query("SELECT * FROM rows", self._database)
        numbers = [name for name in _ROW_COLUMNS if name not in _TEXTS + _INTEGERS]
        rows = rows.astype(dict.fromkeys(numbers, float))
        order = ["key", "victim", "image"]
        joined = cells.merge(rows, left_on="id", right_on="cell", how="inner")
        return joined.drop(columns=["id", "cell"]).sort_values(order, ignore_index=True)

    def reconstruction(self, key: str, victim: int) -> Array:
        """Return the attacker's images of one victim, [B, C, H, W].

        Raises:
            GradleakError: none is kept.
        """
        return self._blob(key, victim, "reconstruction")

    def trace(self, key: str, victim: int) -> Array:
        """Return the attacker's loss over its iterations for one victim, [T].

        Raises:
            GradleakError: none is kept.
        """
        return self._blob(key, victim, "trace")

    def truth(self, name: str, victim: int) -> tuple[Array, Array]:
        """Return the images [B, C, H, W] and labels [B] of one victim of a list.

        Raises:
            GradleakError: the list or victim is not kept.
        """
        query = "SELECT labels, shape, dtype, data FROM victims WHERE list = ? AND victim = ?"
        found = self._database.execute(query, (name, victim)).fetchone()
        if found is None:
            raise GradleakError(f"store {self.path}: no victim {victim} of list {name!r}")
        return _unpack(*found[1:]), np.asarray(json.loads(found[0]))

    def victim_lists(self) -> list[str]:
        """Return the names of the victim lists whose truth is kept, sorted."""
        return [name for (name,) in self._database.execute("SELECT DISTINCT list FROM victims ORDER BY list")]

    def export_parquet(self, path: Path | str) -> None:
        """Write `rows` to a Parquet file, with each cell's configuration and provenance as JSON text."""
        cells = self.cells()
        rows, cells = self.rows(cells), cells.set_index("key")
        for name in ("config", "provenance", "versions"):
            rows[name] = rows["key"].map(cells[name].map(_dump))
        rows["device"] = rows["key"].map(cells["device"])
        rows.to_parquet(path, index=False)

    def _connect(self) -> sqlite3.Connection:
        mode = "rwc"
        if self.path.exists() and not (os.access(self.path, os.W_OK) and os.access(self.path.parent, os.W_OK)):
            # Without write permission SQLite cannot make the files beside the store that a reader needs.
            mode = "ro&immutable=1"
        # Autocommit: transactions are ours, see `_transaction`.
        return sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode={mode}", uri=True, timeout=60, isolation_level=None
        )

    def _prepare(self, create: bool) -> None:
        database = self._database
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not tables and create:
            self._create()
        elif "meta" not in tables or "cells" not in tables:
            raise GradleakError(f"store {self.path}: is a SQLite file, but not a store of gradleak")
        found = database.execute("SELECT value FROM meta WHERE name = 'schema'").fetchone()
        if found is None or found[0] != str(SCHEMA):
            version = found[0] if found else "unknown"
            raise GradleakError(
                f"store {self.path}: has schema {version}, gradleak {__version__} reads schema {SCHEMA}; "
                "use the version that wrote it, or a new file"
            )
        database.execute("PRAGMA foreign_keys = ON")
        # Every commit survives the death of the process; only a power cut may cost the last ones.
        database.execute("PRAGMA synchronous = NORMAL")

    def _create(self) -> None:
        self._database.execute("PRAGMA journal_mode = WAL")
        with self._transaction() as database:
            # Another process may have made the tables since we looked.
            if database.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone():
                return
            for statement in _TABLES.split(";\n"):
                database.execute(statement)
            created = datetime.now(UTC).isoformat(timespec="seconds")
            facts = {"schema": str(SCHEMA), "gradleak": __version__, "created": created}
            database.executemany("INSERT INTO meta VALUES (?, ?)", facts.items())

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            self._database.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            raise GradleakError(f"store {self.path}: cannot be written: {error}") from error
        try:
            yield self._database
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")

    def _insert_cell(self, result: CellResult) -> int:
        cursor = self._database.execute(
            "INSERT INTO cells (key, config, status, error, started, seconds, device, versions, provenance)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                result.key,
                _dump(result.config),
                result.status,
                result.error,
                result.started,
                result.seconds,
                result.device,
                _dump(result.versions),
                _dump(result.provenance),
            ),
        )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def _blob(self, key: str, victim: int, kind: str) -> Array:
        query = (
            "SELECT shape, dtype, data FROM blobs JOIN cells ON cells.id = blobs.cell"
            " WHERE cells.key = ? AND victim = ? AND kind = ?"
        )
        found = self._database.execute(query, (key, victim, kind)).fetchone()
        if found is None:
            raise GradleakError(f"store {self.path}: cell {key[:12]} keeps no {kind} of victim {victim}")
        return _unpack(*found)


_DESCRIBED: dict[str, type] = {
    "attack": str,
    "attack_name": str,
    "attack_family": str,
    "defense": str,
    "defense_name": str,
    "defense_family": str,
    "model": str,
    "dataset": str,
    "setting": str,
    "knowledge": str,
    "batch_size": int,
    "victims": int,
    "seed": int,
    "suite": str,
    "suite_version": str,
}


_NAMED = ("attack", "defense", "model", "dataset", "setting")
"""Parts of a configuration that have a label, or as a setting a name of the user's."""


def _names(part: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a part is only a label: plugins have a name of their own beside it."""
    return {"label": part["label"]} if "label" in part else {"name": part["name"]}


def _describe(config: Mapping[str, Any], provenance: Mapping[str, Any]) -> tuple[Any, ...]:
    part: dict[str, Mapping[str, Any]] = {group: config[group] for group in _NAMED}
    label = {group: str(values.get("label") or values["name"]) for group, values in part.items()}
    suite = config.get("suite") or {}
    return (
        label["attack"],
        part["attack"]["name"],
        provenance.get("attack_family") or "",
        label["defense"],
        part["defense"]["name"],
        provenance.get("defense_family") or "",
        label["model"],
        label["dataset"] + (" (tuning victims)" if config.get("tuning") else ""),
        label["setting"],
        config.get("knowledge") or "oblivious",
        part["setting"].get("batch_size", 1),
        config.get("victims", 0),
        config.get("seed", 0),
        suite.get("name", ""),
        str(suite.get("version", "")),
    )


def _row_values(row: ImageRow, traces: Mapping[int, Array]) -> tuple[Any, ...]:
    values = asdict(row)
    if row.late_progress is None and row.victim in traces:
        values["late_progress"] = late_progress(traces[row.victim])
    return tuple(_dump(value) if name == "extras" else _plain(value) for name, value in values.items())


def late_progress(trace: Array) -> float | None:
    """Return the share of a loss's fall that came in the last tenth of its trace [T], in [0, 1].

    Losses are taken as best so far. None where nothing fell or fewer than ten losses are there.
    """
    losses = np.asarray(trace, dtype=float)
    losses = losses[np.isfinite(losses)]
    if len(losses) < 10:
        return None
    best = np.minimum.accumulate(losses)
    fall = best[0] - best[-1]
    return float((best[-1 - len(best) // 10] - best[-1]) / fall) if fall > 0 else None


def _pack(array: Array) -> tuple[str, str, bytes]:
    array = np.ascontiguousarray(array)
    return json.dumps(array.shape), array.dtype.str, zlib.compress(array.tobytes(), level=1)


def _unpack(shape: str, dtype: str, data: bytes) -> Array:
    return np.frombuffer(zlib.decompress(data), dtype=dtype).reshape(json.loads(shape)).copy()


def _dump(value: Any) -> str:
    return json.dumps(_plain(value), sort_keys=True, allow_nan=False)


def _plain(value: Any) -> Any:
    """Return plain data: NumPy numbers as Python's, and None for what is not finite (JSON has no NaN)."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
