"""Reads a YAML file as plain data; loops, repeated keys and numbers that YAML readers disagree on are refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from ..errors import GradleakError

_LARGEST = 100_000
"""Most values of a suite, counting what anchors repeat: a few lines of anchors can stand for billions of values."""

_INTEGER, _FLOAT, _MERGE = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:merge"
_PLAIN = {
    _INTEGER: re.compile(r"[-+]?(0|[1-9][0-9]*)"),
    _FLOAT: re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
}
"""Numbers that every reader of YAML reads alike."""


class _Loader(yaml.SafeLoader):
    """The safe loader, which also reads 1e-3 as a number."""


_Loader.add_implicit_resolver(
    _FLOAT, re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def load(path: Path, where: str) -> Any:
    """Return what a YAML file holds.

    Raises:
        GradleakError: the file cannot be read, is not YAML, or has a value within itself, a key twice, or a number that
            readers of YAML read differently; `where` opens the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise GradleakError(f"{where}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise GradleakError(f"{where}: not a text file in UTF-8") from error
    try:
        loader = _Loader(text)
        loader.name = "this file"
        try:
            root = loader.get_single_node()
            if root is None:
                raise GradleakError(f"{where}: the file is empty; expected keys and values")
            _size(root, {}, set(), where)
            return loader.construct_document(root)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise GradleakError(f"{where}: not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise GradleakError(f"{where}: values are nested too deep") from error
    except (ValueError, OverflowError) as error:
        raise GradleakError(f"{where}: a value cannot be read: {' '.join(str(error).split())}") from error


def _size(node: yaml.Node, known: dict[yaml.Node, int], open_nodes: set[yaml.Node], where: str) -> int:
    """Return the number of values of a node, whose parts are checked on the way."""
    if node in open_nodes:
        raise GradleakError(f"{where}: {_line(node)}: a value holds itself by an anchor")
    if node not in known:
        open_nodes.add(node)
        if isinstance(node, yaml.ScalarNode):
            _check_number(node, where)
        if isinstance(node, yaml.MappingNode):
            _check_keys(node, where)
        parts = [each for pair in node.value for each in pair] if isinstance(node, yaml.MappingNode) else node.value
        nodes = [] if isinstance(node, yaml.ScalarNode) else parts
        known[node] = 1 + sum(_size(part, known, open_nodes, where) for part in nodes)
        open_nodes.discard(node)
    if known[node] > _LARGEST:
        raise GradleakError(f"{where}: {_line(node)}: more than {_LARGEST} values, counting what anchors repeat")
    return known[node]


def _check_number(node: yaml.ScalarNode, where: str) -> None:
    plain = _PLAIN.get(node.tag)
    if plain is not None and node.style is None and not plain.fullmatch(node.value):
        raise GradleakError(
            f"{where}: {_line(node)}: {node.value} is a different number, or text, to different readers of YAML; "
            "write a plain decimal number, or quotation marks around text"
        )
    if node.tag == _INTEGER and len(node.value) > 1000:
        raise GradleakError(f"{where}: {_line(node)}: a number of {len(node.value)} digits is too long")


def _check_keys(node: yaml.MappingNode, where: str) -> None:
    seen: dict[tuple[str, str], yaml.Node] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise GradleakError(f"{where}: {_line(key)}: a key must be a word, found {_noun(key)}")
        first = seen.setdefault((key.tag, key.value), key)
        if first is not key and key.tag != _MERGE:
            raise GradleakError(f"{where}: {_line(key)}: key {key.value!r} is given twice, first on {_line(first)}")


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"


def _noun(node: yaml.Node) -> str:
    return "keys and values" if isinstance(node, yaml.MappingNode) else "a list"
