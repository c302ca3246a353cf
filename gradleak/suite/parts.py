"""Parts of a cell: the plugins that it names, with all their options, and the prior that its attacker is given."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

from .. import code, registry
from ..errors import GradleakError

_T = TypeVar("_T")


@dataclass(frozen=True)
class Part:
    """A plugin with every option; two that differ in their labels only are equal."""

    name: str
    label: str = field(default="", compare=False)
    """What tables call it."""
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Plain values; of a chain of defenses (`a + b`), each part's by its name."""
    version: str = ""
    code: str = ""
    """Digest of its code and of the files that its options name (`code_of`); empty in older stores."""

    @classmethod
    def of(cls, stored: Mapping[str, Any], **more: str) -> Self:
        """Return the part of a stored form.

        Raises:
            GradleakError: something is missing, or is of another kind.
        """
        name, options = taken(stored, "name", str), taken(stored, "options", (dict, list))
        if isinstance(options, list):
            if len(options) != len(members(name)):
                raise GradleakError(f"cell: {name!r} has options of {len(options)} defenses")
            options = dict(zip(members(name), options, strict=True))
        label, version, digest = (taken(stored, key, str, "") for key in ("label", "version", "code"))
        return cls(name, label, options, version, digest, **more)

    def stored(self) -> dict[str, Any]:
        """Return it as plain data."""
        names = members(self.name)
        options = [self.options[name] for name in names] if len(names) > 1 else self.options
        own = {"name": self.name, "label": self.label, "options": options, "version": self.version}
        return {**own, **({"code": self.code} if self.code else {})}

    def check_code(self, group: str, root: Path | None = None) -> None:
        """Refuse other code than it was made with.

        Args:
            group: of the plugin.
            root: the data root.

        Raises:
            GradleakError: its file, or a module or file that belongs to it, was changed or differs on this machine.
        """
        # A file that an option names but that was not there when the cell was made may be the plugin's own output.
        known = (code_of(group, self.name, options, root) for options in (self.options, {}))
        if self.code and self.code not in known:
            raise GradleakError(f"{registry.GROUPS[group]} {self.name!r}: its code is not that of this cell")


@dataclass(frozen=True)
class DatasetPart(Part):
    """A dataset, with the hash of its images."""

    digest: str = ""

    @classmethod
    def of(cls, stored: Mapping[str, Any], **more: str) -> Self:
        """Return the dataset of a stored form.

        Raises:
            GradleakError: something is missing, or is of another kind.
        """
        return super().of(stored, digest=taken(stored, "digest", str, ""), **more)

    def stored(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {**super().stored(), "digest": self.digest}


@dataclass(frozen=True)
class LearnedPrior:
    """A generator that is trained here."""

    dataset: DatasetPart
    """Whose train split it learns."""
    options: Mapping[str, Any] = field(hash=False)
    """Every field of `gradleak.training.priors.Recipe`."""

    def stored(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {"dataset": self.dataset.stored(), "options": self.options}


@dataclass(frozen=True)
class GivenPrior:
    """A user's generator."""

    source: str
    """`module:function` that builds it."""
    weights: str | None
    """Its weights, relative to the data root."""
    digest: str
    """Hash of the weights."""
    code: str = ""
    """Digest of the module; empty in older stores."""

    def stored(self) -> dict[str, Any]:
        """Return it as plain data."""
        own = {"source": self.source, "weights": self.weights, "digest": self.digest}
        return {**own, **({"code": self.code} if self.code else {})}


def prior_of(stored: Mapping[str, Any]) -> LearnedPrior | GivenPrior:
    """Return the prior of a stored form.

    Raises:
        GradleakError: something is missing, or is of another kind.
    """
    if "source" in stored:
        weights = taken(stored, "weights", (str, type(None)))
        code = taken(stored, "code", str, "")
        return GivenPrior(taken(stored, "source", str), weights, taken(stored, "digest", str), code)
    return LearnedPrior(DatasetPart.of(taken(stored, "dataset", dict)), taken(stored, "options", dict))


def taken(stored: Mapping[str, Any], key: str, kind: type[_T] | tuple[type, ...], default: Any = ...) -> Any:
    """Return a value of a stored form.

    Raises:
        GradleakError: there is none and no default, or one of another kind.
    """
    value = stored.get(key, default)
    if value is ...:
        raise GradleakError(f"cell: {key!r} is missing")
    if value is not default and (not isinstance(value, kind) or (isinstance(value, bool) and kind is int)):
        raise GradleakError(f"cell: {key!r} is {type(value).__name__}")
    return value


def members(name: str) -> list[str]:
    """Return the names of a chain's members (`a + b`); of any other plugin, its own.

    >>> members("sketch + dp-sgd")
    ['sketch', 'dp-sgd']
    """
    return [part.strip() for part in name.split("+")]


def code_of(group: str, name: str, options: Mapping[str, Any], root: Path | None = None) -> str:
    """Return the digest of what a plugin's results depend on: its code, local modules, and files that options name.

    Args:
        group: of the plugin.
        name: its own, or of a chain of defenses `a + b`.
        options: of it; of a chain, each member's by its name.
        root: the data root; paths may be relative to it, to the working folder, or to the plugin file's folder.
    """
    names = members(name)
    parts = [(f"{place} {each}", registry.fingerprint(group, each)) for place, each in enumerate(names)]
    # The images of a dataset have a digest of their own.
    folders = [folder for each in names if (folder := registry.folder_of(group, each)) is not None]
    named = "" if group == "datasets" else code.of_files_named(options, [root or Path(), Path(), *folders])
    if named:
        parts.append(("files", named))
    return parts[0][1] if len(parts) == 1 else code.combined(parts)


def plain(value: Any) -> Any:
    """Round-trip through JSON, so that a key does not depend on tuples, enums or paths."""
    return json.loads(json.dumps(value, default=str))
