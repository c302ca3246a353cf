"""Where attacks and defenses were published, as links; plugin files are read as text and not run."""

from __future__ import annotations

import ast
import functools
import re
from importlib.util import find_spec
from pathlib import Path

_ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


@functools.cache
def reference(group: str, name: str) -> str:
    """Return the `reference` of a plugin that comes along (group: attacks or defenses), empty for any other.

    Of a chain `a + b` those of its members, joined.
    """
    if "+" in name:
        return " + ".join(filter(None, (reference(group, part.strip()) for part in name.split("+"))))
    spec = find_spec(f"gradleak.{group}")
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    paths = [Path(folder) / f"{name.replace('-', '_')}.py" for folder in folders]
    return next((_declared(path) for path in paths if path.is_file()), "")


def link(text: str) -> str:
    """Return the address of the first paper that a reference names, empty where it names no address."""
    found = _ARXIV.search(text)
    return f"https://arxiv.org/abs/{found[1]}" if found else ""


def _declared(path: Path) -> str:
    """Return the text that a class of a file gives to `reference`."""
    for part in ast.parse(path.read_text(encoding="utf-8")).body:
        for line in part.body if isinstance(part, ast.ClassDef) else ():
            named = isinstance(line, ast.Assign) and any(
                getattr(each, "id", "") == "reference" for each in line.targets
            )
            if named and isinstance(line.value, ast.Constant):  # type: ignore[attr-defined]
                return str(line.value.value)  # type: ignore[attr-defined]
    return ""
