"""Digests of code: of a plugin's file and of the modules of its author's that it imports. Imports no torch.

Code is compared as what it says, not as how it is written: comments, docstrings, blank lines and brackets move nothing.
What all plugins share (engine, search, mechanisms, …) is no part of a digest: `gradleak.suite.CORE` stands for it.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib.util
import site
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import EntryPoint
from pathlib import Path

LONGEST = 255
"""Characters of a literal that may name a file."""
_ROOMS = ("attacks", "clients", "datasets", "defenses", "models", "servers")
_SHARED = frozenset(
    "PIL lpips matplotlib numpy opacus pandas pennylane safetensors scipy skimage sklearn timm torch torchmetrics"
    " torchvision".split()
)
"""What plugins share with gradleak, wherever it lies: no plugin author's."""
_LENGTH = 32


@dataclass(frozen=True)
class _Scanned:
    """What one file says."""

    digest: str
    imports: tuple[tuple[int, str, str], ...] = ()
    """Level of a relative import, module, and a name taken from it."""
    literals: tuple[str, ...] = ()
    """Strings that may name a file."""


def of_source(source: bytes) -> str:
    """Return the digest of Python source, or of its bytes if it is none."""
    return _scanned(source).digest


def of_file(path: Path, own: bytes | None = None, package: str = "") -> str:
    """Return the digest of a Python file, of the local modules that it imports, and of files that it names beside it.

    Local are modules that are neither Python's, nor installed as a package, nor gradleak's core.

    Args:
        path: of the file.
        own: its content as it was run, if that is known.
        package: dotted name of the package it is in.
    """
    found: dict[str, str] = {}
    _follow(path.stem, path, package, path.parent, found, own)
    return combined(found.items())


def local_files(path: Path, package: str = "") -> list[Path]:
    """Return the files of the local modules that a Python file imports, itself first; see `of_file`."""
    files: list[Path] = []
    _follow(path.stem, path, package, path.parent, {}, files=files)
    return files


def of_entry(entry: EntryPoint) -> str:
    """Return the digest of an installed plugin: version of its distribution, and every file of its package."""
    top = entry.value.partition(":")[0].strip().partition(".")[0]
    found = {}
    if entry.dist is not None:
        found["distribution"] = f"{entry.dist.name} {entry.dist.version}"
        for file in entry.dist.files or ():
            path = Path(str(entry.dist.locate_file(file)))
            if file.suffix == ".py" and path.is_file() and _is_installed(path):
                found[str(file)] = _scan(path).digest
    spec = _found(top, ())
    for folder in [] if spec is None else spec.submodule_search_locations or []:
        found |= {f"{top}/{name}": digest for name, digest in _of_folder(Path(folder))}
    if spec is not None and spec.origin and not spec.submodule_search_locations:
        found[top] = of_file(Path(spec.origin))
    return combined(found.items())


def of_module(name: str) -> str:
    """Return the digest of a module by its dotted name, wherever it is found; empty if nowhere."""
    spec = _found(name, ())
    return "" if spec is None or not spec.origin else of_file(Path(spec.origin), package=name.rpartition(".")[0])


def of_files_named(values: object, folders: Iterable[Path]) -> str:
    """Return the digest of the content of every file that options name; empty if they name none.

    Args:
        values: plain data.
        folders: where relative paths may start.
    """
    found: dict[str, str] = {}
    bases = list(dict.fromkeys(folders))
    for text in sorted(set(_texts(values))):
        for base in bases:
            if digest := _content(base, text):
                found[text] = digest
                break
    return combined(found.items()) if found else ""


def combined(parts: Iterable[tuple[str, str]]) -> str:
    """Return one digest of named ones."""
    text = "\n".join(f"{name}\x1f{digest}" for name, digest in sorted(parts))
    return hashlib.sha256(text.encode()).hexdigest()[:_LENGTH]


# Files


def _scan(path: Path) -> _Scanned:
    """Read a file, once as long as it stays the same."""
    state = path.stat()
    return _scan_once(path, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=4096)
def _scan_once(path: Path, changed: int, size: int) -> _Scanned:
    if path.suffix == ".py":
        return _scanned(path.read_bytes())
    with path.open("rb") as stream:
        return _Scanned(hashlib.file_digest(stream, "sha256").hexdigest())


def _of_folder(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            yield path.relative_to(folder).as_posix(), _scan(path).digest


def _content(base: Path, text: str) -> str:
    if not text or len(text) > LONGEST or not ("." in text or "/" in text) or not text.isprintable():
        return ""
    path = base / text
    try:
        # Not of folders: an option may name one that the plugin writes to.
        return _scan(path).digest if path.is_file() else ""
    except OSError:
        return ""


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


# What a file says


def _scanned(source: bytes) -> _Scanned:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return _Scanned(hashlib.sha256(source).hexdigest())
    hasher = hashlib.sha256()
    imports: list[tuple[int, str, str]] = []
    literals: list[str] = []
    for token in _tokens(tree, imports, literals):
        hasher.update(token.encode("utf-8", "surrogatepass") + b"\0")
    return _Scanned(hasher.hexdigest(), tuple(dict.fromkeys(imports)), tuple(dict.fromkeys(literals)))


def _tokens(node: object, imports: list[tuple[int, str, str]], literals: list[str]) -> Iterator[str]:
    """Yield a syntax tree as text that is the same for every version of Python, without statements that are strings.

    `ast.dump` and `ast.unparse` write one tree in several ways; empty fields, which come and go, are left out.
    """
    if isinstance(node, list):
        for item in node:
            if not (isinstance(item, ast.Expr) and _is_text(item.value)):
                yield from _tokens(item, imports, literals)
        yield "]"
        return
    if not isinstance(node, ast.AST):
        yield repr(node)
        return
    _note(node, imports, literals)
    yield type(node).__name__
    for name, value in ast.iter_fields(node):
        if isinstance(node, ast.JoinedStr):
            value = _joined(node.values)
        if value is not None and value != [] and name not in ("kind", "type_comment", "ctx"):
            yield name
            yield from _tokens(value, imports, literals)
    yield ")"


def _joined(parts: list[ast.expr]) -> list[object]:
    """Return the parts of an f-string with its text in as few pieces as can be, which is not so in Python 3.12."""
    found: list[object] = []
    for part in parts:
        if not _is_text(part):
            found.append(part)
        elif text := str(getattr(part, "value", "")):
            joined = found.pop() if found and isinstance(found[-1], str) else ""
            found.append(f"{joined}{text}")
    return found


def _is_text(node: object) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _note(node: ast.AST, imports: list[tuple[int, str, str]], literals: list[str]) -> None:
    if isinstance(node, ast.Import):
        imports += [(0, alias.name, "") for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        imports += [(node.level, node.module or "", alias.name) for alias in node.names]
    elif isinstance(node, ast.Call) and node.args and _is_text(node.args[0]):
        called = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if called in ("import_module", "__import__"):
            imports.append((0, str(getattr(node.args[0], "value", "")), ""))
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and 0 < len(node.value) <= LONGEST:
        literals.append(node.value)


# Modules


def _follow(
    name: str,
    path: Path,
    package: str,
    beside: Path,
    found: dict[str, str],
    own: bytes | None = None,
    files: list[Path] | None = None,
) -> None:
    """Add the digest of a file, and of what is local of what it imports."""
    if name in found:
        return
    scanned = _scan(path) if own is None else _scanned(own)
    found[name] = scanned.digest
    if files is not None:
        files.append(path)
    for text in scanned.literals:
        if digest := _content(path.parent, text):
            found[f"{name}: {text}"] = digest
    for level, module, taken in scanned.imports:
        for target in _targets(level, module, taken, package):
            spec = _local(target, beside)
            if spec is not None and spec.origin and Path(spec.origin).is_file():
                inner = target if spec.submodule_search_locations else target.rpartition(".")[0]
                _follow(target, Path(spec.origin), inner, beside, found, files=files)


def _targets(level: int, module: str, taken: str, package: str) -> list[str]:
    """Return the dotted names that an import may run, outermost first."""
    if level:
        parts = package.split(".") if package else []
        if level - 1 > len(parts) or not parts:
            return []
        module = ".".join([*parts[: len(parts) - level + 1], *filter(None, [module])])
    parts = [*module.split("."), *filter(None, [taken])]
    return [".".join(parts[: end + 1]) for end in range(len(parts)) if parts[end] != "*"]


def _local(name: str, beside: Path) -> ModuleSpec | None:
    """Return the spec of a module of a plugin author's, None for one of anybody else's; nothing is imported."""
    top, _, rest = name.partition(".")
    if top in sys.stdlib_module_names or top in _SHARED:
        return None
    if top == "gradleak" and not (rest.count(".") == 1 and rest.partition(".")[0] in _ROOMS):
        return None
    spec = _found(name, (str(beside),))
    if spec is None or not spec.origin or (top != "gradleak" and _is_installed(Path(spec.origin))):
        return None
    return spec


def _found(name: str, more: tuple[str, ...]) -> ModuleSpec | None:
    """Return the spec of a module by its dotted name, looked for in `more` folders last."""
    spec = None
    for end in range(1, name.count(".") + 2):
        part = ".".join(name.split(".")[:end])
        if end == 1:
            spec = _top(part) or PathFinder.find_spec(part, list(more))
        else:
            locations = None if spec is None else spec.submodule_search_locations
            spec = None if locations is None else PathFinder.find_spec(part, list(locations))
        if spec is None:
            return None
    return spec


_known: dict[tuple[str, tuple[str, ...]], ModuleSpec] = {}
"""Outermost modules that were found, by name and path: looking for one takes longer than reading it."""


def _top(name: str) -> ModuleSpec | None:
    place = (name, tuple(sys.path))
    if place not in _known:
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError, AttributeError):
            return None
        if spec is None:
            return None
        _known[place] = spec
    return _known[place]


def _is_installed(path: Path) -> bool:
    in_a_package = {"site-packages", "dist-packages"} & set(path.parts)
    if in_a_package or any(path.is_relative_to(folder) for folder in _installed()):
        return True
    # Packages unpacked elsewhere, as `pip install --target` does, for a folder in PYTHONPATH.
    places = (Path(folder) for folder in sys.path if folder and path.is_relative_to(folder))
    return any(path.relative_to(folder).parts[0] in _recorded(folder) for folder in places)


@functools.cache
def _recorded(folder: Path) -> frozenset[str]:
    """Names at the top of a folder that the records of distributions in it list; one in development lists none."""
    names: set[str] = set()
    for record in folder.glob("*.dist-info/RECORD"):
        with contextlib.suppress(OSError):
            lines = record.read_text(encoding="utf-8", errors="replace").splitlines()
            names.update(line.partition(",")[0].partition("/")[0] for line in lines)
    return frozenset(names)


@functools.cache
def _installed() -> tuple[Path, ...]:
    """Folders of Python and of the packages that are installed."""
    users = [site.getusersitepackages()] if site.ENABLE_USER_SITE else []
    known = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return tuple(Path(folder) for folder in dict.fromkeys([*known, *site.getsitepackages(), *users]))
