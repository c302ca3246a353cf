"""Who imports whom, read from the source; what a plugin file may import."""

from __future__ import annotations

import ast
import functools
from collections.abc import Mapping
from pathlib import Path

from .findings import require

TRUTH = frozenset({"auditing", "board", "cli", "contract", "datasets", "evaluation", "federation", "suite"})
"""Rooms that an attack or a defense must not reach: they hold victims' images, or what became of them."""


_TYPES = {"dataset.Images", "dataset.Dataset", "dataset.Split"}
"""Names of the module that reads datasets which say only what images look like."""


# What a plugin file may import


def imports(path: Path, package: tuple[str, ...] = (), types: bool = False) -> set[str]:
    """Dotted modules below gradleak that a file imports, also inside functions.

    Args:
        path: the file.
        package: its own package below gradleak, () for the core itself.
        types: whether what it imports for type checkers only counts.
    """
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if not types and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            if any(alias.name == "gradleak" for alias in node.names):
                found.add("registry")  # with the package at hand, everything is
            found.update(alias.name.removeprefix("gradleak.") for alias in node.names if "gradleak." in alias.name)
        if isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            if node.level:
                base = [*package[: len(package) - node.level + 1], *base]
            elif base[:1] == ["gradleak"]:
                base = base[1:]
            else:
                base = ["", *base]  # another library
            if base[:1] != [""]:
                stem = ".".join(base)
                found.update(f"{stem}.{alias.name}".lstrip(".") for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


@functools.cache
def core() -> dict[str, Path]:
    """Files of the core by their names below gradleak ("store", "models.mlp"); a package is its own name."""
    home = Path(__file__).parents[1]
    found = {}
    for path in home.rglob("*.py"):
        parts = path.relative_to(home).with_suffix("").parts
        if parts[0] not in ("attacks", "defenses", "servers"):
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def graph(types: bool = False) -> dict[str, set[str]]:
    """Core modules, and the core modules that each imports; `types` as for `imports`."""
    known = core()
    found: dict[str, set[str]] = {}
    for name, path in known.items():
        package = tuple(name.split(".")) if path.stem == "__init__" else tuple(name.split("."))[:-1]
        package = tuple(part for part in package if part)
        found[name] = {owner for target in imports(path, package, types) if (owner := owner_of(target, known))}
    return found


def owner_of(target: str, known: Mapping[str, object]) -> str:
    """Return the module that a dotted name is, or is in; empty for none."""
    while target and target not in known:
        target = target.rpartition(".")[0]
    return target


def reachable(start: set[str], graph: Mapping[str, set[str]]) -> set[str]:
    """Return the modules and all that they import, through whatever other modules."""
    seen: set[str] = set()
    waiting = list(start)
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += graph.get(name, set())
    return seen


def keeps_away_from_the_truth(path: Path, package: tuple[str, ...] = ()) -> None:
    """Imports nothing that holds a victim's images, not even through another module."""
    known = graph()
    targets = imports(path, package)
    plain = {owner for target in targets if (owner := owner_of(target, known))}
    reached = {name for name in reachable(plain, known) if name.partition(".")[0] in TRUTH - {"datasets"}}
    # The core reads datasets to train models and priors; a plugin has no business with them, nor with what builds them.
    reached |= {name for name in plain if name.partition(".")[0] in ("datasets", "registry")}
    reached |= {target for target in targets if target.partition(".")[0] == "dataset"} - _TYPES
    require(not reached, f"{path.name} reaches {', '.join(sorted(reached))}")
