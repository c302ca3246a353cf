"""Options of built-in plugins, read from their source: a suite's spelling is checked before anything is imported."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

from . import registry

_ROOT = Path(__file__).parent
_ENDS = frozenset({"ABC", "Options"})
"""Bases without options."""


@functools.cache
def options(group: str, name: str) -> frozenset[str] | None:
    """Return the names of the options of a built-in plugin; None where the source alone does not tell.

    >>> sorted(options("defenses", "top-k"))
    ['ratio']
    """
    path = registry.file_of(group, name)
    if path is None:
        return None
    classes = [node for node in _tree(path).body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    try:
        return frozenset(_fields(path, classes[0])) if len(classes) == 1 else None
    except LookupError:
        return None


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes())


def _fields(path: Path, cls: ast.ClassDef) -> Iterator[str]:
    """Yield the options of a class and of its bases.

    Raises:
        LookupError: a base cannot be found by reading.
    """
    for base in cls.bases:
        if not isinstance(base, ast.Name):
            raise LookupError
        if base.id not in _ENDS:
            yield from _fields(*_class(path, base.id))
    for node in cls.body:
        if any(isinstance(each, ast.Name) and each.id == "renamed" for each in _targets(node)):
            raise LookupError("old names are taken too, and told of")
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if node.target.id == "presets":
                yield "preset"
            elif "ClassVar" not in ast.unparse(node.annotation) and not _is_made(node.value):
                yield node.target.id
        elif any(isinstance(each, ast.Name) and each.id == "presets" for each in _targets(node)):
            yield "preset"


def _targets(node: ast.stmt) -> list[ast.expr]:
    return [node.target] if isinstance(node, ast.AnnAssign) else node.targets if isinstance(node, ast.Assign) else []


def _is_made(value: ast.expr | None) -> bool:
    """Whether a field is filled by the class itself: `field(init=False)`."""
    return isinstance(value, ast.Call) and any(
        each.arg == "init" and isinstance(each.value, ast.Constant) and not each.value.value for each in value.keywords
    )


def _class(path: Path, name: str) -> tuple[Path, ast.ClassDef]:
    """Return the file and the definition of a class by the name that it has in a module."""
    for node in _tree(path).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return path, node
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _class(_module(path, node), alias.name)
    raise LookupError(name)


def _module(path: Path, node: ast.ImportFrom) -> Path:
    """Return the file that something is imported from."""
    parts = (node.module or "").split(".")
    if node.level:
        folder = path.parents[node.level - 1]
    elif parts[0] == "gradleak":
        folder, parts = _ROOT, parts[1:]
    else:
        raise LookupError(node.module)
    for found in (folder.joinpath(*parts).with_suffix(".py"), folder.joinpath(*parts, "__init__.py")):
        if found.is_file():
            return found
    raise LookupError(node.module)
