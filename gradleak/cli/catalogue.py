"""What `gradleak list` says of the plugins that come along, kept between calls so that it needs no torch."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import installation, registry
from ..process import default_cache

Facts = dict[str, Any]
"""What `registry.describe` says of a plugin, as JSON has it."""


def describe(group: str) -> list[Facts]:
    """Return what is known of every plugin of a group, sorted by name.

    Built-ins are described once for each state of the package's files; plugins of others are asked each time.
    """
    kept, known = _kept(group), registry.names(group)
    missing = [name for name in known if name not in kept]
    found = kept | {name: _plain(registry.describe(group, name)) for name in missing}
    # What is wrong with one may be mended outside the package, by an installation.
    own = {name: found[name] for name in registry.built_in(group) if not found[name]["error"]}
    if own.keys() - kept.keys():
        _keep(group, own)
    return [found[name] for name in known]


def _plain(facts: Mapping[str, Any]) -> Facts:
    """Round-trip through JSON, so that a first call prints what later ones do."""
    plain: Facts = json.loads(json.dumps(facts, default=as_json))
    return plain


def as_json(value: Any) -> Any:
    """Return what JSON has no form for: collections as lists, all else as text."""
    return list(value) if isinstance(value, tuple | set | frozenset) else str(value)


def _kept(group: str) -> dict[str, Facts]:
    try:
        kept: dict[str, Facts] = json.loads(_place(group).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _keep(group: str, facts: Mapping[str, Facts]) -> None:
    """Write what was found; a cache that cannot be written costs the next call its time and nothing else."""
    place = _place(group)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        for old in place.parent.glob(f"{group}-*.json"):
            old.unlink(missing_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=place.parent, delete=False, encoding="utf-8") as file:
            json.dump(facts, file)
        Path(file.name).replace(place)
    except OSError:
        return


def _place(group: str) -> Path:
    return default_cache() / "catalogue" / f"{group}-{_state()}.json"


def _state() -> str:
    """Hash of every Python file of the package, by content, and of the Python that reads them."""
    return installation.digest_of_files(path for path in installation.own_files() if path.suffix == ".py")
