"""Bundles: a store in one file that can be sent, checked, and merged with others. Imports no torch.

A bundle is a ZIP file of `store.sqlite` and `manifest.json`, which states what is in it and the store's SHA-256.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .. import __version__
from ..errors import GradleakError
from ..paths import written_whole
from . import record
from .file import connect
from .store import SCHEMA, Store
from .trust import Text

FORMAT = 1
"""Raised whenever the layout of a bundle changes."""
STORE, MANIFEST = "store.sqlite", "manifest.json"
MOST_MANIFEST = 2**24
"""Most bytes of a manifest."""
MOST_STORE = 2**34
"""Most bytes of a bundle's store."""
MOST_RATIO = 200
"""How much larger than its bundle a store may be, from 100 MB on; its arrays are compressed already, so what unpacks to
more was made to fill a disk."""

_EPOCH = (1980, 1, 1, 0, 0, 0)
_CHUNK = 2**20

Count = Annotated[int, Field(ge=0)]


class _Manifest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal[1]
    schema_: Annotated[int, Field(alias="schema")]
    gradleak: Text
    cells: Count
    failed: Count
    images: Count
    victim_lists: list[Text]
    suites: list[Text]
    versions: list[dict[Text, Text]]
    sha256: dict[Literal["store.sqlite"], Annotated[str, Field(pattern="^[0-9a-f]{64}$")]]


def publish(store: Path, out: Path) -> dict[str, Any]:
    """Write a bundle of a store and return its manifest.

    Raises:
        GradleakError: the store cannot be read or holds no finished cell, or `out` is there already or cannot be
            written; then nothing is left of it.
    """
    if out.exists():
        raise GradleakError(f"bundle {out}: already exists; bundles are never overwritten")
    with Store(store) as opened:
        cells = opened.cells()
        images = len(opened.rows(cells))
        lists = opened.victim_lists()
    finished = cells[cells["status"] == "ok"]
    if not len(finished):
        raise GradleakError(f"store {store}: holds no finished cell to publish")
    with _temporary(f"bundle {out}") as folder:
        copy = folder / STORE
        _copy(store, copy)
        manifest = {
            "format": FORMAT,
            "schema": SCHEMA,
            "gradleak": __version__,
            "cells": len(cells),
            "failed": len(cells) - len(finished),
            "images": images,
            "victim_lists": lists,
            "suites": sorted(
                {f"{name} {number}" for name, number in zip(cells["suite"], cells["suite_version"], strict=True)}
            ),
            "versions": _distinct(cells["versions"]),
            "sha256": {STORE: _sha256(copy)},
        }
        _write(out, copy, json.dumps(manifest, indent=1).encode())
    return manifest


def _copy(store: Path, copy: Path) -> None:
    """Copy a store as it is at one moment, without the side files of one in use and without claims."""
    try:
        with contextlib.closing(connect(store)) as database:
            database.execute("VACUUM INTO ?", (str(copy),))
        with contextlib.closing(sqlite3.connect(copy, isolation_level=None)) as database:
            if database.execute("SELECT 1 FROM sqlite_master WHERE name = 'claims'").fetchone():
                database.execute("DROP TABLE claims")
                database.execute("VACUUM")
    except sqlite3.Error as error:
        raise GradleakError(f"store {store}: cannot be copied: {error}") from error


def _write(out: Path, store: Path, manifest: bytes) -> None:
    try:
        with written_whole(out) as path, zipfile.ZipFile(path, "x", zipfile.ZIP_DEFLATED) as bundle:
            for name, content in ((MANIFEST, manifest), (STORE, store.read_bytes())):
                bundle.writestr(zipfile.ZipInfo(name, _EPOCH), content, zipfile.ZIP_DEFLATED)
    except OSError as error:
        raise GradleakError(f"bundle {out}: cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def open_all(paths: Sequence[Path]) -> Iterator[list[Store]]:
    """Open stores and bundles to be read together; a bundle is unpacked into a temporary folder.

    A bundle with a record beside it (`gradleak verify --record`) says how far its cells were checked.

    Raises:
        GradleakError: one of them is neither, a bundle's store is not the one its manifest states, or its record is of
            another bundle.
    """
    with contextlib.ExitStack() as stack:
        stores = []
        for path in paths:
            if _is_bundle(path):
                folder = stack.enter_context(_temporary(f"bundle {path}"))
                stores.append(stack.enter_context(open_bundle(path, folder)))
                known = record.checked(path)
                stores[-1].checked = {key: known.get(key, record.SUBMITTED) for key in stores[-1].statuses()}
            else:
                stores.append(stack.enter_context(Store(path)))
        yield stores


@contextlib.contextmanager
def open_bundle(bundle: Path, folder: Path) -> Iterator[Store]:
    """Unpack a bundle into a folder and open its store; errors name the bundle.

    Raises:
        GradleakError: as `unpack`, or the manifest counts other cells or images than the store holds.
    """
    with _named(bundle, unpack(bundle, folder)) as store:
        yield store


def unpack(bundle: Path, folder: Path) -> Path:
    """Write the store of a bundle into a folder and return its path.

    Raises:
        GradleakError: the file is no bundle of this format, or its store is not the one that its manifest states.
    """
    path = folder / STORE
    try:
        with zipfile.ZipFile(bundle) as opened:
            members = _members(bundle, opened)
            manifest = _manifest(bundle, opened.read(members[MANIFEST]))
            digest = _unpack(opened, members[STORE], path)
    except (
        OSError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
        ValueError,
        # An encrypted member, an unknown compression, JSON nested too deep.
        RuntimeError,
        MemoryError,
    ) as error:
        raise GradleakError(f"bundle {bundle}: cannot be read: {' '.join(str(error).split())[:200]}") from error
    if manifest.sha256 != {STORE: digest}:
        raise GradleakError(f"bundle {bundle}: was changed: {STORE} has another SHA-256 than {MANIFEST} states")
    _check_counts(bundle, manifest, path)
    return path


def _is_bundle(path: Path) -> bool:
    try:
        return path.is_file() and zipfile.is_zipfile(path)
    except OSError:
        return False


@contextlib.contextmanager
def _temporary(what: str) -> Iterator[Path]:
    try:
        folder = tempfile.TemporaryDirectory()
    except OSError as error:
        raise GradleakError(f"{what}: no temporary folder: {error.strerror or error}") from error
    with folder as name:
        yield Path(name)


@contextlib.contextmanager
def _named(bundle: Path, path: Path) -> Iterator[Store]:
    try:
        store = Store(path)
    except GradleakError as error:
        raise GradleakError(str(error).replace(f"store {path}", f"bundle {bundle}")) from error
    with store:
        store.path = bundle
        yield store


def _members(bundle: Path, opened: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return the two members of a bundle, after a look at what they say of themselves."""
    found = opened.infolist()
    names = sorted(info.filename for info in found)
    if names != sorted((MANIFEST, STORE)):
        listed = ", ".join(name[:40] for name in names[:5])
        raise GradleakError(f"bundle {bundle}: holds {listed}; expected {MANIFEST}, {STORE}")
    size = bundle.stat().st_size
    for info in found:
        mode = info.external_attr >> 16
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            raise GradleakError(f"bundle {bundle}: {info.filename} is not a regular file")
        most = MOST_MANIFEST if info.filename == MANIFEST else min(MOST_STORE, max(10**8, MOST_RATIO * size))
        if info.file_size > most:
            raise GradleakError(f"bundle {bundle}: {info.filename} has {info.file_size} bytes (at most {most})")
    return {info.filename: info for info in found}


def _manifest(bundle: Path, content: bytes) -> _Manifest:
    plain = json.loads(content)
    if not isinstance(plain, dict) or (plain.get("format"), plain.get("schema")) != (FORMAT, SCHEMA):
        raise GradleakError(
            f"bundle {bundle}: is not of format {FORMAT} and schema {SCHEMA}, which gradleak {__version__} reads"
        )
    try:
        return _Manifest.model_validate(plain)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))[:60]
        raise GradleakError(f"bundle {bundle}: {MANIFEST}: {place}: {first['msg'].lower()}") from error


def _unpack(opened: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> str:
    """Write a member to a file and return its SHA-256; no more than it says it has."""
    digest, size = hashlib.sha256(), 0
    with opened.open(member) as source, path.open("xb") as target:
        while chunk := source.read(_CHUNK):
            size += len(chunk)
            if size > member.file_size:
                raise ValueError(f"{member.filename} is longer than it says")
            digest.update(chunk)
            target.write(chunk)
    return digest.hexdigest()


def _check_counts(bundle: Path, manifest: _Manifest, path: Path) -> None:
    with _named(bundle, path) as store:
        statuses, images = store.statuses(), store.images()
    found = {"cells": len(statuses), "failed": list(statuses.values()).count("failed"), "images": images}
    for name, value in found.items():
        if getattr(manifest, name) != value:
            raise GradleakError(
                f"bundle {bundle}: {MANIFEST} states {getattr(manifest, name)} {name}, {STORE} holds {value}"
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _distinct(values: Any) -> list[Any]:
    return [json.loads(text) for text in sorted({json.dumps(value, sort_keys=True) for value in values})]
