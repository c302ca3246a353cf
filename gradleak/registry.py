"""Names to plugin classes: the files of the six folders, entry points of other packages, and single files.

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
import logging
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, distributions
from pathlib import Path
from types import ModuleType
from typing import Any

from . import code, plugins
from .errors import GradleakError, unknown
from .options import check
from .plugins import at, place_of_hook
from .renamed import current

log = logging.getLogger(__name__)

GROUPS = {
    "attacks": "attack",
    "clients": "client",
    "datasets": "dataset",
    "defenses": "defense",
    "models": "model",
    "servers": "server",
}
"""Registry groups and the noun of one member."""

_files: dict[tuple[str, str], Path] = {}
_SOURCE = "__source__"
"""Attribute of a plugin file's module: its content as it was run."""
_NAME = re.compile(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*")


def names(group: str) -> list[str]:
    """Return every known name of a group, sorted. Imports no plugin.

    >>> "top-k" in names("defenses")
    True
    """
    return sorted(_sources(group))


def built_in(group: str) -> list[str]:
    """Return the names of a group that come with gradleak, sorted. Imports no plugin."""
    return sorted(_name(module) for module in _modules(group))


def folders(group: str) -> list[str]:
    """Return the folders that hold the files of a group's built-ins."""
    return list(importlib.import_module(f"gradleak.{group}").__path__)


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
    return list(dict.fromkeys(attack for attack, _, _ in members(name)))


def members(name: str) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Return the members of an ensemble, sorted by attack: its name, a label and options that differ from defaults."""
    if not name.startswith("auto-"):
        return []
    found: list[tuple[str, str, Mapping[str, Any]]] = []
    for attack in names("attacks"):
        declared = vars(load("attacks", attack)).get("ensembles", ())
        if name in declared:
            variants = declared[name] if isinstance(declared, Mapping) else {attack: {}}
            found += [(attack, label, options) for label, options in variants.items()]
    return found


def build(group: str, name: str, options: Mapping[str, Any] | None = None, where: str = "") -> Any:
    """Return an instance with validated hyper-parameters.

    Raises:
        GradleakError: as `load`, or an option has a wrong name, type or range; `where` opens the line.

    >>> build("defenses", "top-k", {"ratio": 0.1}).ratio
    0.1
    >>> build("attacks", "dlg", {"lr": -1})
    Traceback (most recent call last):
    gradleak.errors.GradleakError: attack 'dlg': lr = -1: Input should be greater than 0
    """
    cls = load(group, name, where)
    options = _with_preset(cls, dict(options or {}), where)
    place = f"{where}: " if where else ""
    options = current(options, getattr(cls, "renamed", {}), f"{place}{GROUPS[group]} {name!r}")
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
        text = plugins.said(error)
        said = "" if text.startswith(itself) else f"{itself}: "
        raise GradleakError(f"{place}{said}{text}") from error


def options_of(plugin: Any) -> dict[str, Any]:
    """Return every hyper-parameter of an instance as plain data, defaults included.

    >>> options_of(build("models", "mlp", {"widths": [8]}))["widths"]
    (8,)
    """
    return {field.name: getattr(plugin, field.name) for field in dataclasses.fields(plugin)}


def describe(group: str, name: str) -> dict[str, Any]:
    """Return what `gradleak list` shows of a plugin, as plain data; of a broken one its `error`.

    >>> describe("defenses", "sign")["family"]
    'compression'
    """
    facts: dict[str, Any] = {"name": name, "error": ""}
    try:
        cls = load(group, name)
        # Of an option without a default there is no instance to ask.
        required = [field.name for field in _options(cls) if _is_required(field)]
        plugin = cls if required else build(group, name)
    except Exception as error:
        # Of whatever kind: one broken plugin must not hide the others.
        return {**facts, "error": plugins.said(error)}
    facts["summary"] = (inspect.getdoc(cls) or "").partition("\n")[0]
    for fact in ("family", "threat_model", "surface", "adaptive", "counter_attacks", "queries", "reference", "version"):
        # Of a class without an instance a property has no value.
        if hasattr(plugin, fact) and not isinstance(getattr(plugin, fact), property):
            facts[fact] = getattr(plugin, fact)
    if declared := vars(cls).get("ensembles"):
        facts["ensembles"] = declared
    if hasattr(plugin, "needs"):
        needs, unneeded = options_of(plugin.needs), options_of(type(plugin.needs)())
        facts["needs"] = {key: value for key, value in needs.items() if value != unneeded[key]}
    facts["defaults"] = dict.fromkeys(required, "required") if required else options_of(plugin)
    return facts


def add_file(path: Path) -> list[tuple[str, str]]:
    """Add the plugin of one file on disk; return its (group, name).

    Raises:
        GradleakError: the file is missing, its stem is no name, it raises on import, holds no plugin, or one that
            lacks what its contract asks for, or its name is taken.
    """
    origin = f"--plugin {path}"
    if not path.is_file():
        raise GradleakError(f"{origin}: no such file")
    if not _NAME.fullmatch(path.stem):
        raise GradleakError(
            f"{origin}: {path.stem!r} is not a name for a plugin; rename the file "
            "(small letters a-z and digits, a letter first, parts joined by _)"
        )
    cls = _public_class(_import_path(path), origin)
    group = _group_of(cls, origin)
    name = _name(path.stem)
    known = _files.get((group, name))
    if known is not None and known.resolve() == path.resolve():
        return [(group, name)]
    if name in _sources(group):
        place = at(place_of_hook(cls))
        raise GradleakError(f"{origin}: {GROUPS[group]} {name!r} already exists; rename the file{place}")
    _files[group, name] = path
    return [(group, name)]


def groups_of(name: str) -> list[str]:
    """Return the groups that have a plugin of a name, sorted.

    >>> groups_of("mlp")
    ['models']
    """
    return [group for group in sorted(GROUPS) if name in _sources(group)]


def fingerprint(group: str, name: str) -> str:
    """Return the digest of the code of a plugin (`gradleak.code`); empty for a name that nothing brings.

    It imports nothing but plugin files, which are digested as they were run.
    """
    if (path := _files.get((group, name))) is not None:
        return code.of_file(path, own=getattr(_import_path(path), _SOURCE))
    if (path := _built_in(group, name)) is not None:
        return code.of_file(path, package=f"gradleak.{group}")
    entry = _entries(group, frozenset()).get(name)
    return code.of_entry(entry) if isinstance(entry, EntryPoint) else ""


def folder_of(group: str, name: str) -> Path | None:
    """Return the folder of a plugin file that `add_file` added; None for every other plugin."""
    path = _files.get((group, name))
    return None if path is None else path.absolute().parent


def file_of(group: str, name: str) -> Path | None:
    """Return the file of a plugin that comes with gradleak; None for every other."""
    return None if (group, name) in _files else _built_in(group, name)


def added_files() -> list[Path]:
    """Return every plugin file that `add_file` added."""
    return [path.absolute() for path in _files.values()]


@functools.cache
def _built_in(group: str, name: str) -> Path | None:
    for folder in importlib.import_module(f"gradleak.{group}").__path__:
        path = Path(folder) / f"{name.replace('-', '_')}.py"
        if _NAME.fullmatch(name) and path.is_file():
            return path
    return None


_Source = Callable[[], type[Any]]


def _sources(group: str) -> dict[str, _Source]:
    if group not in GROUPS:
        raise unknown("registry", group, GROUPS)
    found = dict(_shipped(group, tuple(sys.path)))
    for (owner, name), path in _files.items():
        if owner == group and name not in found:
            found[name] = lambda path=path: _public_class(_import_path(path), str(path))  # type: ignore[misc]
    return found


@functools.lru_cache(maxsize=10)
def _shipped(group: str, path: tuple[str, ...]) -> Mapping[str, _Source]:
    """Built-ins and what is installed on the path; a suite asks for names thousands of times."""
    found: dict[str, _Source] = {}
    for module in _modules(group):
        full = f"gradleak.{group}.{module}"
        found[_name(module)] = lambda full=full: _import_module(full)  # type: ignore[misc]
    for name, entry in _entries(group, frozenset(found)).items():
        found[name] = lambda entry=entry: _import_entry(group, entry)  # type: ignore[misc]
    return found


def _modules(group: str) -> list[str]:
    return [module.name for module in pkgutil.iter_modules(folders(group)) if not module.name.startswith("_")]


def _entries(group: str, taken: frozenset[str]) -> dict[str, EntryPoint | str]:
    """Entry points by the names they get, and why one cannot be used; `taken` are the names of built-ins.

    One package with a clash stops nothing: its plugin is listed under a longer name, with what is wrong.
    """
    named: dict[str, list[EntryPoint]] = {}
    for entry in _installed(group, tuple(sys.path)):
        named.setdefault(entry.name, []).append(entry)
    found: dict[str, EntryPoint | str] = {}
    for name, entries in named.items():
        reason = ""
        if not _NAME.fullmatch(name):
            reason = "is not a name (small letters a-z and digits, a letter first, parts joined by -)"
        elif name in taken:
            reason = "is the name of a built-in"
        elif len(entries) > 1:
            reason = "is brought by several packages"
        if not reason:
            found[name] = entries[0]
            continue
        for entry in entries:
            line = f"{_origin(entry)}: {name!r} {reason}; it cannot be used until it is renamed"
            found[f"{name} ({_package(entry)})"] = line
            _warn(line)
    return found


@functools.cache
def _warn(line: str) -> None:
    log.warning("%s", line)


@functools.cache
def _installed(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Entry points of what is installed on the path; reading them takes as long as all else."""
    return tuple(_read_entries(f"gradleak.{group}")) if _any_entries() else ()


def _any_entries() -> bool:
    """Whether any package on the path may bring a plugin: told from one small file of each."""
    for package in distributions():
        try:
            if "gradleak." in (package.read_text("entry_points.txt") or ""):
                return True
        except Exception:
            return True  # What is wrong with it is said by what reads it.
    return False


def _read_entries(group: str) -> Iterator[EntryPoint]:
    seen: set[str] = set()
    for package in distributions():
        try:
            name = package.metadata["Name"] or ""
            # The first of a name on the path is the one that is imported.
            found = () if name in seen else package.entry_points.select(group=group)
        except Exception as error:
            _warn(f"a package's entry points cannot be read: {plugins.said(error)}")
            continue
        seen.add(name)
        yield from found


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "unknown package"


def _origin(entry: EntryPoint) -> str:
    return f"package {_package(entry)}, entry point {entry.name} = {entry.value}"


def _name(stem: str) -> str:
    return stem.replace("_", "-")


@functools.cache
def _import_module(full: str) -> type[Any]:
    return _public_class(plugins.importing(full, lambda: importlib.import_module(full)), full)


def _import_entry(group: str, entry: EntryPoint | str) -> type[Any]:
    if isinstance(entry, str):
        raise GradleakError(entry)
    origin = _origin(entry)
    plugins.adopt(entry.value)
    loaded = plugins.importing(origin, entry.load)
    cls = _public_class(loaded, origin) if isinstance(loaded, ModuleType) else _complete(loaded, origin)
    if (actual := _group_of(cls, origin)) != group:
        raise GradleakError(
            f"{origin}: {cls.__name__} belongs in the group gradleak.{actual}, not gradleak.{group}"
            f"{at(place_of_hook(cls))}"
        )
    return cls


def _import_path(path: Path) -> ModuleType:
    # The resolved path keeps two files of the same stem apart in sys.modules.
    # Of every process the same name, which what is sent from one to another goes by.
    full = f"{plugins.FILE}{path.stem}_{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]}"
    if full in sys.modules:
        return sys.modules[full]
    spec = importlib.util.spec_from_file_location(full, path)
    if spec is None or spec.loader is None:
        raise GradleakError(f"--plugin {path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[full] = module
    # Run from the bytes that are hashed, and not from a cache of compiled code, which may be older.
    content = path.read_bytes()
    setattr(module, _SOURCE, content)
    try:
        run = lambda: exec(compile(content, str(path), "exec", dont_inherit=True), module.__dict__)  # noqa: E731
        plugins.importing(f"--plugin {path}", run)
    except GradleakError:
        del sys.modules[full]
        raise
    return module


def _public_class(module: ModuleType, origin: str) -> type[Any]:
    classes = [
        cls
        for name, cls in inspect.getmembers(module, inspect.isclass)
        if not name.startswith("_") and cls.__module__ == module.__name__
    ]
    if len(classes) != 1:
        found = ", ".join(f"{cls.__name__}{at(place_of_hook(cls))}" for cls in classes)
        found = found or f"none ({Path(module.__file__ or '').name}:1)"
        raise GradleakError(f"{origin}: a plugin file holds exactly one public class, found {found}")
    return _complete(classes[0], origin)


def _complete(cls: Any, origin: str) -> type[Any]:
    """Return a class that declares what every plugin must; its hooks are looked at by what calls them."""
    if not isinstance(cls, type):
        raise GradleakError(f"{origin}: a plugin is a class or a module with one, found {type(cls).__name__}")
    _group_of(cls, origin)
    lacks, parameters = "", vars(cls).get("__dataclass_params__")
    if parameters is None:
        lacks = "is not a dataclass of its own; write @dataclass(frozen=True, kw_only=True) above it"
    elif not parameters.frozen:
        lacks = "is not frozen; write @dataclass(frozen=True, kw_only=True)"
    elif abstract := sorted(getattr(cls, "__abstractmethods__", ())):
        lacks = f"lacks the method {' and '.join(abstract)}"
    elif missing := _undeclared(cls):
        lacks = f"does not declare {' and '.join(missing)}"
    if lacks:
        raise GradleakError(f"{origin}: {cls.__name__} {lacks}{at(place_of_hook(cls))}")
    return cls


def _undeclared(cls: type[Any]) -> list[str]:
    """Class attributes that a contract names and a plugin gives no value, such as `reference`."""
    named = {name: kind for base in cls.__mro__ for name, kind in vars(base).get("__annotations__", {}).items()}
    return sorted(name for name, kind in named.items() if "ClassVar" in str(kind) and not hasattr(cls, name))


def _group_of(cls: type[Any], origin: str) -> str:
    for group, noun in GROUPS.items():
        contract = getattr(importlib.import_module(f"gradleak.{noun}"), noun.capitalize())
        if issubclass(cls, contract):
            return group
    allowed = ", ".join(f"gradleak.{noun}.{noun.capitalize()}" for noun in GROUPS.values())
    place = at(place_of_hook(cls))
    raise GradleakError(f"{origin}: {cls.__name__} inherits from none of {allowed}{place}")


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
            f"{cls.__module__}: {cls.__name__} is not a dataclass; write @dataclass(frozen=True, kw_only=True)"
        )
    return dataclasses.fields(cls)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.init and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
