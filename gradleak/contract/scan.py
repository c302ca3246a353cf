"""What the source of a plugin file looks at, read and not run: findings for a reviewer, no proof of innocence."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from ..code import local_files
from .findings import require

_FRAMES = frozenset(
    "_getframe _current_frames currentframe f_back f_locals f_globals tb_frame gi_frame cr_frame "
    "get_objects get_referrers get_referents __globals__ __subclasses__ __closure__".split()
)
"""Names through which code sees what its callers hold."""
_MODULES = frozenset(
    "gc inspect ctypes importlib builtins pickle sqlite3 subprocess multiprocessing socket urllib requests http glob "
    "sklearn.datasets torchvision.datasets skimage.data torch.hub torch.utils.data".split()
)
"""Modules that an attack or a defense has no business with: they look around, fetch data or leave the process."""
_CALLS = frozenset({"open", "eval", "exec", "compile", "__import__", "globals", "vars"})
"""Built-in functions that read files or run text."""
_READERS = frozenset(
    {"load", "fromfile", "loadtxt", "memmap", "read_text", "read_bytes", "read_csv", "open", "iterdir", "listdir"}
    | {"scandir", "readlink", "rglob"}
)
"""Methods that read files."""


def looks_only_at_what_it_is_given(path: Path) -> None:
    """Looks at no frames, files, data sets or other processes, and makes no generator of its own."""
    # What a module that it brings along does counts as its own.
    files = [each for each in local_files(path) if each.suffix == ".py"]
    found = dict.fromkeys(f"{what} ({each.name}:{line})" for each in files for line, what in sorted(_suspicious(each)))
    require(not found, ", ".join([*found][:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else ""))


def names(path: Path) -> dict[str, int]:
    """Return every name that a file uses, and the line where it does so first.

    What it imports is named in full, whatever the file calls it: `numpy.random.seed`. Other names are as written:
    a field `self.seed` is none of these.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = dict(_imported(tree))
    found: dict[str, int] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            first, dot, rest = ast.unparse(node).partition(".")
            name = imported.get(first, first) + dot + rest
            found[name] = min(node.lineno, found.get(name, node.lineno))
    return found


def _imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield the names that imports bind, each with what it stands for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                yield (alias.asname, alias.name) if alias.asname else (first, first)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)


def _nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def _suspicious(path: Path) -> Iterator[tuple[int, str]]:
    for node in _nodes(path):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, f"imports {alias.name}") for alias in node.names if _barred(alias.name))
        elif isinstance(node, ast.ImportFrom) and not node.level:
            module = node.module or ""
            targets = [module, *(f"{module}.{alias.name}" for alias in node.names)]
            yield from ((node.lineno, f"imports {target}") for target in targets[:1] if _barred(target))
            yield from ((node.lineno, f"imports {t}") for t in targets[1:] if _barred(t) and not _barred(module))
        elif isinstance(node, ast.Attribute):
            yield from _of_attribute(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value in _FRAMES:
                yield node.lineno, f"names {node.value}"
            elif node.value.startswith("/proc"):
                yield node.lineno, "names /proc"
        elif isinstance(node, ast.Call):
            yield from _of_call(node)


def _of_attribute(node: ast.Attribute) -> Iterator[tuple[int, str]]:
    name = ast.unparse(node)
    if node.attr in _FRAMES:
        yield node.lineno, f"uses {node.attr}"
    elif name == "sys.modules":
        yield node.lineno, "uses sys.modules"
    elif _barred(name):
        yield node.lineno, f"uses {name}"


def _of_call(node: ast.Call) -> Iterator[tuple[int, str]]:
    name = ast.unparse(node.func)
    last = name.rpartition(".")[2]
    if name in _CALLS:
        yield node.lineno, f"calls {name}"
    elif "." in name and last in _READERS:
        yield node.lineno, f"calls {name}"
    elif name in ("torch.Generator", "Generator"):
        yield node.lineno, "makes a generator of its own"


def _barred(module: str) -> bool:
    parts = module.split(".")
    return any(".".join(parts[:length]) in _MODULES for length in range(1, len(parts) + 1))
