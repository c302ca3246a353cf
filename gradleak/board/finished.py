"""Remembers which suites a store has finished, so that running one again is answered without planning, or torch.

An answer is given only where everything that a plan depends on is as it was when the last cell was stored:

- the suite's file, the files that its options name, and the data root with all its files if a dataset lies there;
- every file of gradleak, by content; Python; the path; every package on it, with the time of its installation;
- the store: the same file, unchanged in size and times, with nothing in its write-ahead log, holding every cell of the
  plan (whose keys depend on its secret) as computed; a failed or missing cell is none.

Nothing is remembered of code that cannot be seen from here: plugin files, plugins of other packages, functions that a
suite names, folders of images.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import code, installation, registry
from ..process import default_cache
from ..suite import outline
from .file import connect, log_of

_COME_ALONG = frozenset({"digits", "faces", "mnist-5k", "photos"})
"""Datasets that lie in installed packages."""
_IN_ROOT = frozenset({"celeba", "cifar10", "cifar100", "fashion-mnist", "mnist", "svhn"})
"""Datasets whose files lie in the data root."""
_MOST_FILES = 10_000
"""Files of a data root that are looked at; with more, nothing is remembered."""


@dataclass(frozen=True)
class Watch:
    """What the plan of a suite depends on beside the store, at one moment."""

    suite: Path
    state: str
    """By content; equal states, equal plans."""
    moment: str = field(default="", repr=False)
    """By the times of the files, which also tells a file that was changed and changed back."""


def watch(suite: Path, data_root: Path | None = None) -> Watch | None:
    """Return what a suite's plan depends on now; None where that cannot be seen without running code.

    Raises:
        GradleakError: the suite cannot be read, or is none.
    """
    if registry.added_files() or any(registry.names(group) != registry.built_in(group) for group in registry.GROUPS):
        return None
    try:
        text, chosen = suite.read_bytes(), outline(suite)
        texts = list(_texts(chosen.model_dump(mode="json", exclude={"description", "reported"})))
        named = {entry.name for entry in (*chosen.datasets, *filter(None, [chosen.prior.dataset]))}
        # A colon names a function, as module:function.
        if suite.read_bytes() != text or not named <= _COME_ALONG | _IN_ROOT or any(":" in each for each in texts):
            return None
        own, data = installation.own_files(), [] if named <= _COME_ALONG else _files(data_root or Path("data"))
        parts = [
            text.hex(),
            installation.digest_of_files(own),
            *installation.packages(),
            str(data_root and data_root.resolve()),
            code.of_files_named(texts, [data_root or Path(), Path()]),
            *map(str, zip(data, installation.moment(data), strict=True)),
        ]
        moment = installation.moment([suite, *own, *data])
    except (OSError, _Unseen):
        return None
    return Watch(suite, *(hashlib.sha256("\n".join(map(str, each)).encode()).hexdigest() for each in (parts, moment)))


def remember(store: Path, before: Watch, now: Watch | None, keys: Iterable[str]) -> bool:
    """Remember that a store has all cells of a suite, if nothing changed while they were planned and computed.

    Args:
        store: closed, with every cell of `keys` computed.
        before: what the plan depends on, from before it was made.
        now: the same from after the last cell was stored.
        keys: of all cells of the plan.
    """
    stamp = _stamp(store)
    if before != now or stamp is None:
        return False
    place = _place(store, before.suite)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=place.parent, delete=False, encoding="utf-8") as file:
            json.dump({"state": before.state, "stamp": stamp, "keys": sorted(keys)}, file)
        Path(file.name).replace(place)
    except OSError:  # The next run plans again; nothing else is lost.
        return False
    return True


def known(store: Path, now: Watch) -> int | None:
    """Return the number of a suite's cells if a store is known to have computed them all; else None."""
    try:
        told = json.loads(_place(store, now.suite).read_text(encoding="utf-8"))
        stamp = _stamp(store)
        if stamp is None or told["state"] != now.state or told["stamp"] != stamp:
            return None
        database = connect(store)
        try:
            there = {key for (key,) in database.execute("SELECT key FROM cells WHERE status = 'ok'")}
        finally:
            database.close()
    except (OSError, ValueError, KeyError, TypeError, sqlite3.Error):
        return None
    keys = set(told["keys"])
    return len(keys) if keys and keys <= there and _stamp(store) == stamp else None


def _stamp(store: Path) -> list[int] | None:
    """Return which file a store is, its size and times; None while its write-ahead log holds anything."""
    try:
        log = log_of(store)
        if log.exists() and log.stat().st_size:
            return None
        return list(installation.moment([store.resolve()])[0])
    except OSError:
        return None


def _place(store: Path, suite: Path) -> Path:
    name = f"{store.resolve()}\n{suite.resolve()}"
    return default_cache() / "finished" / f"{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}.json"


def _texts(value: Any) -> Iterator[str]:
    """Yield every text of a suite's content, keys of options included; descriptions and published numbers are none."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in ("description", "reported", "label"):
                yield from _texts(key)
                yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


class _Unseen(Exception):
    """No files where a dataset should be, more than are looked at, or a folder that is only linked to."""


def _files(root: Path) -> list[Path]:
    found: list[Path] = []
    for folder, inner, names in os.walk(root):
        if any(Path(folder, name).is_symlink() for name in inner):
            raise _Unseen
        found += [Path(folder, name) for name in names]
        if len(found) > _MOST_FILES:
            raise _Unseen
    if not found:
        raise _Unseen
    return sorted(found)
