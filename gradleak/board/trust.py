"""What is asked of a store before it is believed: it may come from anybody.

Its tables must be ours to the letter: a view or a trigger would run SQL of a stranger's. Every JSON text has a
schema, every number a range, and what is made up for failed cells is bounded by what is stored.
"""

from __future__ import annotations

import json
import math
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ..errors import GradleakError
from .schema import CLAIMS, LEFT_OUT, NUMBERS, STATUSES, tables, victim_list

SECONDS = 120.0
"""That one query may take: a store of 100,000 cells is read in a tenth of it."""
MOST_IMAGES = 1000
"""Images that a failed cell may stand for where the store keeps nothing of its list of victims."""
LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: 2**30,
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 10**5,
    sqlite3.SQLITE_LIMIT_COLUMN: 100,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 50,
    sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH: 1,
    sqlite3.SQLITE_LIMIT_ATTACHED: 1,  # which VACUUM INTO takes
}

RANGES: Mapping[str, tuple[float, float]] = {
    "matched": (0, math.inf),
    "finite": (0, 1),
    "mse": (0, math.inf),
    "psnr": (-2000, 2000),
    "ssim": (-2, 2),
    "ms_ssim": (-2, 2),
    "lpips": (-1e-3, 1e6),
    "lpips_64": (-1e-3, 1e6),
    "contrast": (-1e-6, 2.000001),
    "reidentified": (0, 1),
    "label_correct": (0, 1),
    "label_found": (0, 1),
    "oracle_psnr": (-2000, 2000),
    "message_norm": (0, math.inf),
    "late_progress": (0, 1),
    "iterations": (0, 2**62),
    "gradient_evaluations": (0, 2**62),
    "seconds": (0, math.inf),
}
"""Sane measurements; others are any finite number. PSNR of float32 images is above -800 dB."""

Text = Annotated[str, Field(max_length=1000)]
Natural = Annotated[int, Field(ge=0, le=2**31)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class _Stored(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _Part(_Stored):
    name: Text
    label: Text = ""
    options: dict[str, Any] | list[Any] = Field(default_factory=dict)
    version: Text | int = ""
    digest: Text = ""
    code: Text = ""


class _Setting(_Stored):
    name: Text
    batch_size: Annotated[int, Field(ge=1, le=10**6)] = 1
    grants: dict[str, Any] = Field(default_factory=dict)


class _Named(_Stored):
    name: Text = ""
    version: Text | int = ""


class _Config(_Stored):
    attack: _Part
    defense: _Part
    model: _Part
    dataset: _Part
    setting: _Setting
    knowledge: Text | None = None
    victims: Natural = 0
    candidates: Natural | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0
    tuning: bool = False
    engine: dict[str, Any] = Field(default_factory=dict)
    suite: _Named | None = None
    secret: Text | None = None


class _Guarantee(_Stored):
    epsilon: Amount | None = None
    delta: Amount | None = None


class _Server(_Stored):
    queries: Amount | None = None
    most_queries: Amount | None = None
    expected: Amount | None = None
    added_parameters: Annotated[int, Field(ge=-(2**62), le=2**62)] | None = None
    added_bytes: Annotated[int, Field(ge=-(2**62), le=2**62)] | None = None
    accuracy: Share | None = None
    counts: Text | None = None


class _Inspection(_Stored):
    refused: Share
    false_alarms: Share
    honest_rounds: Natural
    thresholds: list[float] = Field(default_factory=list)


class _Provenance(_Stored):
    attack_family: Text | None = None
    defense_family: Text | None = None
    threat_model: Text | None = None
    server: _Server | None = None
    inspection: _Inspection | None = None
    adaptive: bool = False
    stochastic: bool = False
    bytes: Amount | None = None
    dense_bytes: Amount | None = None
    client_seconds: Amount | None = None
    test_accuracy: Annotated[float, Field(ge=0, le=1)] | None = None
    model_accuracy: Annotated[float, Field(ge=0, le=1)] | None = None
    epsilon: _Guarantee | None = None
    training_epsilon: _Guarantee | None = None


_SHAPES: dict[str, TypeAdapter[Any]] = {
    "config": TypeAdapter(_Config),
    "provenance": TypeAdapter(_Provenance),
    "versions": TypeAdapter(dict[Text, Text]),
}


def guard(database: sqlite3.Connection) -> None:
    """Set the bounds of a connection, before anything is read through it."""
    database.execute("PRAGMA trusted_schema = OFF")
    database.execute("PRAGMA cell_size_check = ON")
    for limit, value in LIMITS.items():
        database.setlimit(limit, value)


@contextmanager
def in_time(database: sqlite3.Connection) -> Iterator[None]:
    """Interrupt what a connection does in the block after `SECONDS`."""
    end = time.monotonic() + SECONDS
    database.set_progress_handler(lambda: time.monotonic() > end, 10**6)
    try:
        yield
    finally:
        database.set_progress_handler(None, 0)


def check_tables(database: sqlite3.Connection, where: str) -> None:
    """Refuse a file whose tables are not ours to the letter.

    Raises:
        GradleakError: a table is missing, differs, or something else is there too.
    """
    expected = {("table", name, name, statement) for name, statement in tables().items()}
    found = database.execute("SELECT type, name, tbl_name, sql FROM sqlite_master").fetchall()
    # SQLite makes indexes of keys itself, without a statement.
    made = {line for line in found if not (line[0] == "index" and line[3] is None)}
    for kind, name, _, _ in sorted(expected - made):
        raise GradleakError(f"{where}: its {kind} {name!r} is not the one that gradleak makes")
    later = {("table", "claims", "claims", CLAIMS), ("table", "left_out", "left_out", LEFT_OUT)}
    for kind, name, _, _ in sorted(made - expected - later, key=repr):
        raise GradleakError(f"{where}: holds a {kind} {str(name)[:40]!r} that gradleak does not make")


def read_json(kind: str, texts: Sequence[Any], keys: Sequence[str], where: str) -> list[Any]:
    """Return JSON texts of a column as plain data, checked.

    Raises:
        GradleakError: one is no JSON, or not as this column has to be.
    """
    adapter, found, seen = _SHAPES[kind], [], set[object]()
    for text, key in zip(texts, keys, strict=True):
        try:
            found.append(json.loads(text, parse_constant=_no_number))
            marks = _marks(found[-1]) if kind == "config" else {text}
            if not marks <= seen:
                adapter.validate_python(found[-1])
                seen |= marks
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, (kind, *first["loc"][:4])))
            _refuse(where, key, f"{place}: {first['msg'].lower().partition(' or instance of')[0]}")
        except (ValueError, TypeError, RecursionError) as error:
            _refuse(where, key, f"{kind} is no JSON ({str(error)[:60]})")
    return found


def _marks(config: Any) -> set[object]:
    """Return the fields of a configuration and their values as text: it is right if each of them is.

    Thousands of cells share a few parts, and no field's shape depends on another's.
    """
    if not isinstance(config, dict):
        return {repr(config)}
    return {tuple(config), *((name, repr(value)) for name, value in config.items())}


def check_cells(frame: pd.DataFrame, where: str) -> None:
    """Refuse cells whose plain columns are not what they have to be."""
    for key, status, error, started, seconds, device in zip(
        *(frame[name].tolist() for name in ("key", "status", "error", "started", "seconds", "device")), strict=True
    ):
        if not isinstance(key, str) or not key or len(key) > 200 or not key.isprintable():
            raise GradleakError(f"{where}: {key!r:.40} is not a key of a cell")
        if status not in ("ok", "failed"):
            _refuse(where, key, f"status {status!r:.40} (allowed: ok, failed)")
        if not isinstance(error, str) or not isinstance(started, str) or not isinstance(device, str):
            _refuse(where, key, "error, started and device have to be text")
        if len(error) > 2**20 or len(started) > 1000 or len(device) > 1000:
            _refuse(where, key, "error, started or device are too long")
        if not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
            _refuse(where, key, f"took {seconds!r:.40} seconds")


def check_rows(rows: pd.DataFrame, where: str) -> None:
    """Refuse rows that no attack can have: numbers out of range, places that their cell does not have.

    Args:
        rows: one line an image with its cell's `key`, `victims`, `batch_size` and `status`; numbers as floats.
        where: the store, for the error.
    """
    size, victims = rows["batch_size"], rows["victims"]
    wrong: dict[str, Any] = {
        "status": ~rows["status"].isin(STATUSES),
        "victim": (rows["victim"] < 0) | ((rows["victim"] >= victims) & (victims > 0)),
        "image": (rows["image"] < 0) | (rows["image"] >= size),
        "extras": ~rows["extras"].map({text: _is_object(text) for text in rows["extras"].unique()}).astype(bool),
    }
    for name in NUMBERS:
        low, high = RANGES.get(name, (-math.inf, math.inf))
        values = rows[name]
        wrong[name] = values.notna() & ~((values >= low) & (values <= high) & np.isfinite(values))
    wrong["matched"] |= rows["matched"] >= size
    for name, lines in wrong.items():
        if lines.any():
            line = rows[lines].iloc[0]
            value = str(line[name])[:40]
            _refuse(where, line["key"], f"victim {line['victim']} image {line['image']}: {name} {value!r}")


def check_left_out(lines: Sequence[tuple[Any, ...]], where: str) -> None:
    """Refuse notes on what a grid leaves out that are not one line of text each, or that neither suite nor attack made.

    Args:
        lines: of the table `left_out`.
        where: the store, for the error.
    """
    for line in lines:
        for text in line[:7]:
            if not isinstance(text, str) or len(text) > 1000 or not text.isprintable():
                raise GradleakError(
                    f"{where}: a note on what is left out has {text!r:.60}, which is not a line of text"
                )
        if line[7] not in (0, 1):
            raise GradleakError(f"{where}: a note on what is left out is chosen {line[7]!r:.40} (allowed: 0, 1)")


def check_failed(cells: pd.DataFrame, kept: Mapping[str, int], where: str) -> None:
    """Refuse failed cells that stand for more images than there are: each counts at the floor.

    Args:
        cells: as `Store.cells` returns them.
        kept: how many images of each list of victims are stored.
        where: the store, for the error.
    """
    failed = cells[cells["status"] == "failed"]
    for key, config, victims, size in zip(
        *(failed[name] for name in ("key", "config", "victims", "batch_size")), strict=True
    ):
        most = max(kept.get(victim_list(config), 0), MOST_IMAGES)
        if victims * size > most:
            _refuse(where, key, f"failed on {victims * size} images, of which the store keeps {most} at most")


def _refuse(where: str, key: Any, what: str) -> NoReturn:
    raise GradleakError(f"{where}: cell {str(key)[:12]}: {what[:200]}")


def _is_object(text: Any) -> bool:
    try:
        return isinstance(json.loads(text, parse_constant=_no_number), dict)
    except (ValueError, TypeError, RecursionError):
        return False


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number")
