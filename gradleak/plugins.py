"""Plugins of others: where in their files something went wrong, in one line. Imports no torch."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NoReturn

from .errors import GradleakError

FILE = "_gradleak_plugin_"
"""What the module names of plugin files begin with."""
IMPORT_LIMIT = 60.0
"""Seconds that the import of a plugin file may take."""
_LONGEST = 400
"""Characters of an exception's text that a line keeps."""
_NEAR = 0.8
"""Likeness from which a name counts as a misspelt one, by difflib."""

_packages: set[str] = set()
_BUILT_IN = re.compile(r"gradleak\.(attacks|clients|defenses|models|datasets|servers)\.")


class PluginError(GradleakError):
    """A plugin did something else than its contract says; the line ends with its file and line where that is known."""


class _Endless(BaseException):
    """An import that took too long; no plugin catches it by mistake."""


def adopt(module: str) -> None:
    """Take everything in the package of a module for plugin code, as entry points name it."""
    _packages.add(re.split(r"[.:]", module.strip(), maxsplit=1)[0].strip())


def is_plugin(module: str) -> bool:
    """Whether a module of that name is a plugin's: a plugin file, an installed package's, or a built-in."""
    return module.startswith(FILE) or module.partition(".")[0] in _packages or bool(_BUILT_IN.match(module))


def is_foreign(module: str) -> bool:
    """Whether a module of that name is a plugin's and not a built-in."""
    return is_plugin(module) and not _BUILT_IN.match(module)


# Where


def at(place: str) -> str:
    """Return a place as a line ends with it: " (file.py:14)", or nothing."""
    return f" ({place})" if place else ""


def place_of(error: BaseException) -> str:
    """Return `file.py:14` of the innermost plugin code that an exception passed through; empty for none."""
    found = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        if is_plugin(frame.f_globals.get("__name__") or ""):
            found = _place(frame.f_code.co_filename, line)
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        return _place(error.filename, error.lineno)
    behind = error.__cause__ or error.__context__
    return found or (place_of(behind) if behind is not None else "")


def place_of_caller() -> str:
    """Return `file.py:14` of the innermost plugin code that is running now; empty for none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if is_plugin(frame.f_globals.get("__name__") or ""):
            return _place(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back
    return ""


def place_of_hook(plugin: object, *hooks: str) -> str:
    """Return `file.py:14` of the first of some methods that a plugin brings, or else of its class.

    Args:
        plugin: an instance or a class; of a chain of defenses, the first one with such a method.
        hooks: names of methods.
    """
    parts = getattr(plugin, "defenses", (plugin,))
    classes = [part if isinstance(part, type) else type(part) for part in parts]
    for hook in hooks:
        for cls in classes:
            owner = owner_of(cls, hook)
            code = None if owner is None else _code(vars(owner)[hook])
            if owner is not None and code is not None and is_plugin(owner.__module__):
                return _place(code.co_filename, code.co_firstlineno)
    return next((place for cls in classes if (place := _place_of_class(cls))), "")


def owner_of(cls: type[Any], hook: str) -> type[Any] | None:
    """Return the class of the bases that a method comes from."""
    return next((base for base in cls.__mro__ if hook in vars(base)), None)


def _place_of_class(cls: type[Any]) -> str:
    if not is_plugin(cls.__module__):
        return ""
    try:
        return _place(inspect.getsourcefile(cls) or "", inspect.getsourcelines(cls)[1])
    except (OSError, TypeError):
        return ""


def _place(file: str, line: int) -> str:
    return f"{Path(file).name}:{line}"


def _code(member: Any) -> CodeType | None:
    for attribute in ("fget", "func", "__func__"):
        member = getattr(member, attribute, None) or member
    return getattr(inspect.unwrap(member), "__code__", None) if callable(member) else None


# What


def said(error: BaseException) -> str:
    """Return what was raised, and where in a plugin, as one line."""
    text = " ".join((error.msg if isinstance(error, SyntaxError) else str(error)).split())
    if isinstance(error, GradleakError):
        return text
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"
    return f"{type(error).__name__}{': ' if text else ''}{text}{at(place_of(error))}"


@contextlib.contextmanager
def blamed(where: str = "") -> Iterator[None]:
    """Turn what plugin code raises in the block into a `PluginError`; `where` opens its line.

    What is raised without any plugin code is a fault of ours and passes.
    """
    try:
        yield
    except GradleakError:
        raise
    except (Exception, SystemExit) as error:
        if not place_of(error):
            raise
        raise PluginError(f"{where}{': ' if where else ''}{said(error)}") from error


def importing(origin: str, action: Callable[[], Any]) -> Any:
    """Import a plugin, whatever its top level does.

    Raises:
        GradleakError: it raised, wanted to end the process, or took longer than `IMPORT_LIMIT`.
    """
    try:
        with _kept_alive(), _limited():
            return action()
    except GradleakError:
        raise
    except _Endless as error:
        raise PluginError(f"{origin}: importing it took longer than {IMPORT_LIMIT:g} s{at(place_of(error))}") from error
    except (Exception, SystemExit) as error:
        if isinstance(error, TypeError) and "non-frozen dataclass" in str(error):
            line = f"a plugin is frozen; write @dataclass(frozen=True, kw_only=True){at(place_of(error))}"
            raise PluginError(f"{origin}: {line}") from error
        raise PluginError(f"{origin}: importing it raised {said(error)}") from error


@contextlib.contextmanager
def _kept_alive() -> Iterator[None]:
    """Let `os._exit` in the block raise SystemExit: a process that is gone can say nothing."""

    def leave(status: int) -> NoReturn:
        raise SystemExit(f"os._exit({status})")

    before, os._exit = os._exit, leave
    try:
        yield
    finally:
        os._exit = before


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Raise `_Endless` in the block after `IMPORT_LIMIT` seconds, where signals can."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(number: int, frame: FrameType | None) -> NoReturn:
        raise _Endless

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, IMPORT_LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def near_misses(cls: type[Any]) -> list[str]:
    """Return a line for each public member of a plugin that overrides nothing, but nearly has the name of a hook."""
    bases = [base for base in cls.__mro__ if base.__module__.partition(".")[0] == "gradleak"]
    known = {name for base in bases if base is not cls for name in (*vars(base), *getattr(base, "__annotations__", ()))}
    hooks = sorted(name for name in known if not name.startswith("_"))
    found = []
    for name, member in vars(cls).items():
        if name.startswith("_") or name in known or name in getattr(cls, "__dataclass_fields__", {}):
            continue
        near = difflib.get_close_matches(name, hooks, n=1, cutoff=_NEAR)
        if near:
            kind = "method" if _code(member) else "attribute"
            found.append(
                f"{kind} {name!r} overrides nothing; is it meant to be {near[0]!r}?{at(place_of_hook(cls, name))}"
            )
    return found
