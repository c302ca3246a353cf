"""Names to plugin classes: the files of the four folders, entry points of other packages, and single files.

A plugin is a frozen dataclass whose fields are its hyper-parameters. Its name is the stem of its file, with
hyphens for underscores; a file holds exactly one public class. Nothing is imported before it is asked for.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from .errors import GradleakError, unknown
from .options import check

GROUPS = {"attacks": "attack", "datasets": "dataset", "defenses": "defense", "models": "model"}
"""Registry groups and the noun of one member."""

_files: dict[tuple[str, str], Path] = {}
_FINGERPRINT = "__fingerprint__"
"""Attribute of a plugin file's module."""


def names(group: str) -> list[str]:
    """Return every known name of a group, sorted. Imports no plugin."""
    return sorted(_sources(group))


def load(group: str, name: str, where: str = "") -> type[Any]:
    """Return the class behind a name; `where` opens the line of an error.

    Raises:
        GradleakError: the name is unknown, its file cannot be imported, or holds no single public class.
    """
    sources = _sources(group)
    if name not in sources:
        raise unknown(GROUPS[group], name, sources, where)
    return sources[name]()


def ensemble(name: str) -> list[str]:
    """Return the attacks that declare (and do not inherit) membership of an ensemble such as `auto-v1`, sorted."""
    if not name.startswith("auto-"):
        return []
    return [attack for attack in names("attacks") if name in vars(load("attacks", attack)).get("ensembles", ())]


def build(group: str, name: str, options: Mapping[str, Any] | None = None, where: str = "") -> Any:
    """Return an instance with validated hyper-parameters.

    Raises:
        GradleakError: as `load`, or an option has a wrong name, type or range; `where` opens the line.
    """
    cls = load(group, name, where)
    options = _with_preset(cls, dict(options or {}), where)
    place = f"{where}: " if where else ""
    fields = {field.name for field in _options(cls) if field.init}
    for option in options:
        if option not in fields:
            raise unknown(f"option of {GROUPS[group]} {name!r}", str(option), fields, where)
    missing = [field.name for field in _options(cls) if _is_required(field) and field.name not in options]
    if missing:
        raise GradleakError(f"{place}{GROUPS[group]} {name!r}: option {missing[0]!r} is missing, and has no default")
    itself = f"{GROUPS[group]} {name!r}"
    options = check(cls, options, f"{place}{itself}")
    try:
        return cls(**options)
    except (Exception, SystemExit) as error:
        text = str(error) if isinstance(error, GradleakError) else f"{type(error).__name__}: {error}"
        said = "" if text.startswith(itself) else f"{itself}: "
        raise GradleakError(f"{place}{said}{text}") from error


def options_of(plugin: Any) -> dict[str, Any]:
    """Return every hyper-parameter of an instance as plain data, defaults included."""
    return {field.name: getattr(plugin, field.name) for field in dataclasses.fields(plugin)}


def describe(group: str, name: str) -> dict[str, Any]:
    """Return what `gradleak list` shows of a plugin, as plain data; of a broken one its `error`."""
    facts: dict[str, Any] = {"name": name, "error": ""}
    try:
        cls = load(group, name)
        # Of an option without a default there is no instance to ask.
        required = [field.name for field in _options(cls) if _is_required(field)]
        plugin = cls if required else build(group, name)
    except GradleakError as error:
        return {**facts, "error": str(error)}
    facts["summary"] = (inspect.getdoc(cls) or "").partition("\n")[0]
    for fact in ("family", "threat_model", "adaptive", "counter_attacks", "reference", "version"):
        if hasattr(plugin, fact):
            facts[fact] = getattr(plugin, fact)
    if hasattr(plugin, "needs"):
        needs, unneeded = options_of(plugin.needs), options_of(type(plugin.needs)())
        facts["needs"] = {key: value for key, value in needs.items() if value != unneeded[key]}
    facts["defaults"] = dict.fromkeys(required, "required") if required else options_of(plugin)
    return facts


def add_file(path: Path) -> list[tuple[str, str]]:
    """Add the plugin of one file on disk; return its (group, name).

    Raises:
        GradleakError: the file is missing, raises on import, holds no plugin, or its name is taken.
    """
    if not path.is_file():
        raise GradleakError(f"--plugin {path}: no such file")
    module = _import_path(path)
    cls = _public_class(module, str(path))
    group = _group_of(cls, str(path))
    name = _name(path.stem)
    known = _files.get((group, name))
    if known is not None and known.resolve() == path.resolve():
        return [(group, name)]
    if name in _sources(group):
        raise GradleakError(f"--plugin {path}: {GROUPS[group]} {name!r} exists already; rename the file")
    _files[group, name] = path
    return [(group, name)]


def fingerprint(group: str, name: str) -> str:
    """Return the SHA-256 of the code of a plugin that `add_file` added; empty for every other."""
    path = _files.get((group, name))
    return "" if path is None else str(getattr(_import_path(path), _FINGERPRINT))


def _sources(group: str) -> dict[str, Callable[[], type[Any]]]:
    if group not in GROUPS:
        raise unknown("registry", group, GROUPS)
    package = importlib.import_module(f"gradleak.{group}")
    found: dict[str, Callable[[], type[Any]]] = {}

    def add(name: str, source: Callable[[], type[Any]], origin: str) -> None:
        if name in found:
            raise GradleakError(f"{origin}: {GROUPS[group]} {name!r} exists already; rename one of them")
        found[name] = source

    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.startswith("_"):
            full = f"gradleak.{group}.{module.name}"
            add(_name(module.name), lambda full=full: _import_module(full), full)  # type: ignore[misc]
    for entry in _installed(group, tuple(sys.path)):
        add(entry.name, lambda entry=entry: _import_entry(entry), f"entry point {entry.value}")  # type: ignore[misc]
    for (owner, name), path in _files.items():
        if owner == group:
            add(name, lambda path=path: _public_class(_import_path(path), str(path)), str(path))  # type: ignore[misc]
    return found


@functools.cache
def _installed(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Entry points of what is installed on the path; reading them takes as long as all else."""
    return tuple(entry_points(group=f"gradleak.{group}"))


def _name(stem: str) -> str:
    return stem.replace("_", "-")


def _import_module(full: str) -> type[Any]:
    return _public_class(_importing(full, lambda: importlib.import_module(full)), full)


def _import_entry(entry: Any) -> type[Any]:
    loaded = _importing(f"entry point {entry.value}", entry.load)
    return _public_class(loaded, entry.value) if isinstance(loaded, ModuleType) else cast(type[Any], loaded)


def _import_path(path: Path) -> ModuleType:
    # The resolved path keeps two files of the same stem apart in sys.modules.
    full = f"_gradleak_plugin_{path.stem}_{abs(hash(path.resolve())):x}"
    if full in sys.modules:
        return sys.modules[full]
    spec = importlib.util.spec_from_file_location(full, path)
    if spec is None or spec.loader is None:
        raise GradleakError(f"--plugin {path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[full] = module
    # Run from the bytes that are hashed, and not from a cache of compiled code, which may be older.
    content = path.read_bytes()
    setattr(module, _FINGERPRINT, hashlib.sha256(content).hexdigest())
    try:
        run = lambda: exec(compile(content, str(path), "exec", dont_inherit=True), module.__dict__)  # noqa: E731
        _importing(f"--plugin {path}", run)
    except GradleakError:
        del sys.modules[full]
        raise
    return module


def _importing(origin: str, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except GradleakError:
        raise
    except (Exception, SystemExit) as error:
        raise GradleakError(f"{origin}: importing it raised {type(error).__name__}: {error}") from error


def _public_class(module: ModuleType, origin: str) -> type[Any]:
    classes = [
        cls
        for name, cls in inspect.getmembers(module, inspect.isclass)
        if not name.startswith("_") and cls.__module__ == module.__name__
    ]
    if len(classes) != 1:
        found = ", ".join(cls.__name__ for cls in classes) or "none"
        raise GradleakError(f"{origin}: a plugin file holds exactly one public class, found {found}")
    return classes[0]


def _group_of(cls: type[Any], origin: str) -> str:
    for group, noun in GROUPS.items():
        contract = getattr(importlib.import_module(f"gradleak.{noun}"), noun.capitalize())
        if issubclass(cls, contract):
            return group
    allowed = ", ".join(f"gradleak.{noun}.{noun.capitalize()}" for noun in GROUPS.values())
    raise GradleakError(f"{origin}: {cls.__name__} inherits from none of {allowed}")


def _with_preset(cls: type[Any], options: dict[str, Any], where: str) -> dict[str, Any]:
    """Replace the option `preset` by the options it stands for; options given besides it have the last word."""
    presets = getattr(cls, "presets", {})
    if not presets or "preset" not in options:
        return options
    name = options.pop("preset")
    if name not in presets:
        raise unknown("preset", str(name), presets, where)
    return {**presets[name], **options}


def _options(cls: type[Any]) -> tuple[dataclasses.Field[Any], ...]:
    if not dataclasses.is_dataclass(cls):
        raise GradleakError(
            f"{cls.__module__}: {cls.__name__} is no dataclass; write @dataclass(frozen=True, kw_only=True)"
        )
    return dataclasses.fields(cls)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.init and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
