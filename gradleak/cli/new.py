"""`gradleak new`: a plugin to begin with, and its test."""

from __future__ import annotations

import importlib.util
import keyword
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from .. import __version__, registry
from ..errors import GradleakError, unknown
from ..paths import written_whole

TEMPLATES = Path(__file__).parent / "templates"
"""Plugins that keep their contract, to be filled with something else."""

_NAME = re.compile(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*")


def kinds() -> dict[str, str]:
    """Return the groups by the nouns of their members, of which there is a template."""
    nouns = {noun: group for group, noun in registry.GROUPS.items()}
    return {noun: nouns[noun] for noun in sorted(nouns) if (TEMPLATES / f"{noun}.py.j2").is_file()}


def new(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="attack, client, defense, model, dataset or server.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="What suites will call it, as my-attack.")],
    package: Annotated[
        bool, typer.Option("--package", help="A package to install and to publish, instead of one file.")
    ] = False,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where it is written [default: here].")] = Path(),
) -> None:
    """Write a plugin that passes `gradleak check`, and its test: a place to begin.

    NAME.py and test_NAME.py, or with --package a folder of that name with pyproject.toml, source and tests. Nothing is
    overwritten.
    """
    if kind not in kinds():
        raise unknown("kind", kind, kinds())
    # As it is with files: an underscore in a stem is a hyphen in a name.
    name = name.replace("_", "-")
    files = _files(kind, name, package)
    root = out / name if package else out
    there = [str(root / path) for path in files if (root / path).exists()]
    if there:
        raise GradleakError(f"{there[0]}: already exists; choose another name or --out")
    try:
        for path, text in files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            with written_whole(root / path) as beside:
                beside.write_text(text, encoding="utf-8")
    except OSError as error:
        raise GradleakError(f"--out {out}: cannot be written ({error.strerror})") from error
    for path in files:
        print(root / path)
    _say_how_to_go_on(kind, name, root, package)


def _files(kind: str, name: str, package: bool) -> dict[str, str]:
    """Return the content of every file by its path."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    group, stem, cls = kinds()[kind], name.replace("-", "_"), _class_of(name)
    _refuse(kind, name, stem, package)
    module = f"gradleak_{stem}"
    facts = {
        "name": name,
        "stem": stem,
        "cls": cls,
        "title": name.replace("-", " ").replace("_", " ").capitalize(),
        "group": group,
        "a": f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}",
        "package": package,
        "module": module,
        "version": __version__,
        "register": f'assert "{name}" in registry.names("{group}")' if package else "registry.add_file(PLUGIN)",
    }
    maker = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True
    )
    if re.search(rf"\b{cls}\b", maker.get_template(f"{kind}.py.j2").render({**facts, "cls": "_", "title": "_"})):
        raise GradleakError(f"NAME {name}: {cls} is the name of something that the file needs; choose another")
    wanted = _package(kind, stem, module) if package else _pair(kind, stem)
    return {path: maker.get_template(template).render(facts) for path, template in wanted.items()}


def _class_of(name: str) -> str:
    return "".join(part.capitalize() for part in re.split("[-_]", name))


def _pair(kind: str, stem: str) -> Mapping[str, str]:
    return {f"{stem}.py": f"{kind}.py.j2", f"test_{stem}.py": f"test_{kind}.py.j2"}


def _package(kind: str, stem: str, module: str) -> Mapping[str, str]:
    return {
        "pyproject.toml": "pyproject.toml.j2",
        "README.md": "README.md.j2",
        f"src/{module}/__init__.py": "init.py.j2",
        f"src/{module}/{stem}.py": f"{kind}.py.j2",
        f"tests/test_{stem}.py": f"test_{kind}.py.j2",
    }


def _refuse(kind: str, name: str, stem: str, package: bool) -> None:
    """Refuse a name that is none, that is taken, or whose file would hide a module from Python.

    Raises:
        GradleakError: see above.
    """
    if not _NAME.fullmatch(name):
        raise GradleakError(f"NAME {name}: small letters a-z and digits, a letter first, parts joined by -")
    if name.replace("_", "-") in registry.names(kinds()[kind]):
        raise GradleakError(f"NAME {name}: {kind} {name.replace('_', '-')!r} already exists; choose another")
    if keyword.iskeyword(_class_of(name)) or keyword.iskeyword(stem):
        raise GradleakError(f"NAME {name}: a reserved word of Python; choose another")
    # Beside its test the file comes first on Python's path.
    if not package and (stem in sys.stdlib_module_names or importlib.util.find_spec(stem) is not None):
        raise GradleakError(f"NAME {name}: {stem}.py would hide the module {stem!r} from Python; choose another")


def _say_how_to_go_on(kind: str, name: str, root: Path, package: bool) -> None:
    group, stem = kinds()[kind], name.replace("-", "_")
    if package:
        steps = [
            f"pip install -e '{root}[test]'",
            f"gradleak check {name} --group {group} --board",
            f"pytest {root / 'tests'}",
        ]
    else:
        steps = [f"gradleak check {root / f'{stem}.py'} --board", f"pytest {root / f'test_{stem}.py'}"]
    print("\n".join(["gradleak: next:", *(f"    {step}" for step in steps)]), file=sys.stderr)
