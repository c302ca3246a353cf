"""Bundles: a store in one file that can be sent, checked, and merged with others. Imports no torch.

A bundle is a ZIP file of `store.sqlite` and `manifest.json`, which states what is in it and the store's SHA-256.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import GradleakError
from .store import SCHEMA, Store

FORMAT = 1
"""Raised whenever the layout of a bundle changes."""
STORE, MANIFEST = "store.sqlite", "manifest.json"

_EPOCH = (1980, 1, 1, 0, 0, 0)


def publish(store: Path, out: Path) -> dict[str, Any]:
    """Write a bundle of a store and return its manifest.

    Raises:
        GradleakError: the store cannot be read or holds no finished cell, or `out` is there already.
    """
    if out.exists():
        raise GradleakError(f"bundle {out}: is there already; bundles are never overwritten")
    with Store(store) as opened:
        cells = opened.cells()
        images = len(opened.rows(cells))
        lists = opened.victim_lists()
    finished = cells[cells["status"] == "ok"]
    if not len(finished):
        raise GradleakError(f"store {store}: holds no finished cell to publish")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / STORE
        with contextlib.closing(sqlite3.connect(store)) as database:
            # A copy of one moment, without the side files of a store that is in use.
            database.execute("VACUUM INTO ?", (str(copy),))
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
        try:
            with zipfile.ZipFile(out, "x", zipfile.ZIP_DEFLATED) as bundle:
                for name, content in ((MANIFEST, json.dumps(manifest, indent=1).encode()), (STORE, copy.read_bytes())):
                    bundle.writestr(zipfile.ZipInfo(name, _EPOCH), content, zipfile.ZIP_DEFLATED)
        except OSError as error:
            raise GradleakError(f"bundle {out}: cannot be written: {error.strerror or error}") from error
    return manifest


@contextlib.contextmanager
def open_all(paths: Sequence[Path]) -> Iterator[list[Store]]:
    """Open stores and bundles to be read together; a bundle is unpacked into a temporary folder.

    Raises:
        GradleakError: one of them is neither, or a bundle's store is not the one its manifest states.
    """
    with contextlib.ExitStack() as stack:
        stores = []
        for path in paths:
            found = path
            if path.is_file() and zipfile.is_zipfile(path):
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                found = unpack(path, folder)
            stores.append(stack.enter_context(Store(found)))
        yield stores


def unpack(bundle: Path, folder: Path) -> Path:
    """Write the store of a bundle into a folder and return its path.

    Raises:
        GradleakError: the file is no bundle of this format, or its store is not the one that its manifest states.
    """
    try:
        with zipfile.ZipFile(bundle) as opened:
            names = sorted(opened.namelist())
            if names != sorted((MANIFEST, STORE)):
                raise GradleakError(f"bundle {bundle}: holds {', '.join(names)}; expected {MANIFEST}, {STORE}")
            manifest = json.loads(opened.read(MANIFEST))
            content = opened.read(STORE)
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        raise GradleakError(f"bundle {bundle}: cannot be read: {error}") from error
    if not isinstance(manifest, dict) or (manifest.get("format"), manifest.get("schema")) != (FORMAT, SCHEMA):
        raise GradleakError(
            f"bundle {bundle}: is not of format {FORMAT} and schema {SCHEMA}, which gradleak {__version__} reads"
        )
    if manifest.get("sha256") != {STORE: hashlib.sha256(content).hexdigest()}:
        raise GradleakError(f"bundle {bundle}: was changed: {STORE} has another SHA-256 than {MANIFEST} states")
    path = folder / STORE
    path.write_bytes(content)
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _distinct(values: Any) -> list[Any]:
    return [json.loads(text) for text in sorted({json.dumps(value, sort_keys=True) for value in values})]
