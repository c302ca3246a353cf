"""Pages that follow from the code: what there is, with options and sources; every key, column, command and contract.

`python docs/generate.py FOLDER` writes them; `make docs` does so before it builds the site. None of them is committed.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradleak
from gradleak import registry

ROOT = Path(__file__).parents[1]

_BOUNDS = {"Ge": "≥", "Gt": ">", "Le": "≤", "Lt": "<"}
_WORDS = {
    "Positive": "integer, ≥ 1",
    "Whole": "integer",
    "Rate": "number, > 0",
    "Seeds": "list of integers, ≥ 0",
    "Plugins": "list of plugins",
    "Values": "keys and values",
    "Victims": "integer, ≥ 1",
    "Plugin": "plugin",
    "Label": "text",
    "RelativePath": "path below the data root",
    "RelativeFile": "path below the data root",
    "StrictBool": "true or false",
    "bool": "true or false",
    "int": "integer",
    "float": "number",
    "str": "text",
}


@dataclasses.dataclass(frozen=True)
class Key:
    """One field of a class, as its source has it."""

    name: str
    kind: str
    default: str
    meaning: str
    owner: type[Any]


# Reading


def fields_of(cls: type[Any]) -> list[Key]:
    """Return the fields of a dataclass or pydantic model with the text that stands below each; inherited ones first."""
    found: dict[str, Key] = {}
    names = getattr(cls, "model_fields", None) or getattr(cls, "__dataclass_fields__", {})
    for base in reversed(cls.__mro__):
        for key in _declared(base):
            if key.name in names:
                inherited = found.get(key.name)
                meaning = key.meaning or (inherited.meaning if inherited else "")
                found[key.name] = dataclasses.replace(key, meaning=meaning)
    return list(found.values())


@functools.cache
def _declared(cls: type[Any]) -> tuple[Key, ...]:
    try:
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    except (OSError, TypeError):
        return ()
    body = node.body if isinstance(node, ast.ClassDef) else []
    found = []
    for part, below in zip(body, [*body[1:], None], strict=True):
        if not isinstance(part, ast.AnnAssign) or not isinstance(part.target, ast.Name):
            continue
        if "ClassVar" in ast.unparse(part.annotation):
            continue
        text = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else ""
        found.append(Key(part.target.id, kind_of(part.annotation), _default(part.value), _line(str(text)), cls))
    return tuple(found)


def kind_of(node: ast.expr) -> str:
    """Return a type in words: bounds behind it, literals as they are written.

    >>> kind_of(ast.parse("Annotated[float, Gt(0), Lt(1)] | None", mode="eval").body)
    'number, > 0, < 1, or none'
    """
    if isinstance(node, ast.BinOp):
        return f"{kind_of(node.left)}, or {kind_of(node.right)}"
    if isinstance(node, ast.Constant):
        return "none" if node.value is None else str(node.value)
    if isinstance(node, ast.Subscript):
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        head = ast.unparse(node.value)
        if head == "Annotated":
            bounds = [
                f"{_BOUNDS[mark.func.id]} {ast.unparse(mark.args[0])}"
                for mark in inner[1:]
                if isinstance(mark, ast.Call) and isinstance(mark.func, ast.Name) and mark.func.id in _BOUNDS
            ]
            return ", ".join([kind_of(inner[0]), *bounds])
        if head == "Literal":
            return " or ".join(f"`{ast.literal_eval(each)}`" for each in inner)
        if head in ("tuple", "list"):
            return f"list of {kind_of(inner[0])}"
        if head in ("dict", "Mapping"):
            return "keys and values"
    text = ast.unparse(node)
    return _WORDS.get(text, text)


def _default(node: ast.expr | None) -> str:
    if node is None:
        return "required"
    if isinstance(node, ast.Call) and ast.unparse(node.func).lower() == "field":
        given = {word.arg: word.value for word in node.keywords}
        if "default" in given:
            return _default(given["default"])
        return {"dict": "{}", "list": "[]"}.get(ast.unparse(given.get("default_factory", node)), "its defaults")
    text = ast.unparse(node)
    return {"None": "none", "True": "true", "False": "false"}.get(text, text)


def _line(text: str) -> str:
    return " ".join(text.split())


# Writing


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(_cell(each) for each in row) + " |" for row in rows) + "\n"


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|").replace("*", "\\*")


def linked(text: str) -> str:
    """Return text whose arXiv ids are links.

    >>> linked("see arXiv:1906.08935")
    'see [arXiv:1906.08935](https://arxiv.org/abs/1906.08935)'
    """
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def prose(text: str | None) -> str:
    """Return a docstring as Markdown: what begins a list of arguments or errors is emphasised."""
    text = inspect.cleandoc(text or "")
    text = re.sub(r"^(Args|Raises|Returns):$", r"**\1**\n", text, flags=re.MULTILINE)
    lines = [f"- {line.strip()}" if re.match(r" {4}\w[\w ]*:", line) else line.strip() for line in text.splitlines()]
    return linked("\n".join(lines)).replace("|", "\\|").replace("$", "\\$").replace("*args", "\\*args")


def plugins(group: str) -> str:
    """Return the page of a group: every member with what it does, needs and takes, and where its code is."""
    noun = registry.GROUPS[group]
    contract = getattr(__import__(f"gradleak.{noun}", fromlist=["x"]), noun.capitalize())
    parts = [f"# {group.capitalize()}\n", f"Drawn from the registry; `gradleak list {group}` prints the same.\n"]
    shared: dict[type[Any], list[Key]] = {}
    for name in registry.built_in(group):
        cls = registry.load(group, name)
        parts += [f"## {name}\n", prose(cls.__doc__) + "\n", table(("", ""), _facts(group, name, cls))]
        keys = fields_of(cls)
        own = [key for key in keys if not _is_shared(key.owner, contract)]
        for key in keys:
            if key not in own:
                shared.setdefault(key.owner, []).append(key)
        if own:
            parts.append(table(("option", "type", "default", "meaning"), _rows(own)))
        if len(own) < len(keys):
            bases = dict.fromkeys(key.owner.__name__ for key in keys if key not in own)
            parts.append(f"Besides, the options of {' and '.join(f'`{base}`' for base in bases)}, below.\n")
    for owner, found in shared.items():
        unique = list({key.name: key for key in found}.values())
        parts += [f"## Options of {owner.__name__}\n", prose(owner.__doc__) + "\n"]
        parts.append(table(("option", "type", "default", "meaning"), _rows(unique)))
    return "\n".join(parts)


def _is_shared(owner: type[Any], contract: type[Any]) -> bool:
    folders = tuple(f"gradleak.{group}." for group in registry.GROUPS)
    return not owner.__module__.startswith(folders) and issubclass(owner, contract)


def _rows(keys: Iterable[Key]) -> Iterator[tuple[str, ...]]:
    for key in keys:
        yield f"`{key.name}`", key.kind, f"`{key.default}`", key.meaning


def _facts(group: str, name: str, cls: type[Any]) -> Iterator[tuple[str, str]]:
    facts = registry.describe(group, name)
    yield "reference", linked(str(facts["reference"]))
    for title in ("family", "threat_model", "surface", "counter_attacks"):
        if facts.get(title):
            value = facts[title]
            yield title.replace("_", " "), ", ".join(value) if isinstance(value, tuple) else str(value)
    if facts.get("needs"):
        yield "needs", ", ".join(f"{key}: {str(value).lower()}" for key, value in facts["needs"].items())
    if isinstance(tuning := getattr(cls, "tuning", None), str):
        yield "tuning", tuning
    source = inspect.getsourcefile(cls)
    if source is not None and Path(source).resolve().is_relative_to(ROOT):
        yield "code", f"`{Path(source).resolve().relative_to(ROOT)}`"


def suites() -> str:
    """Return the page of every key of a suite."""
    from gradleak.knowledge import Knowledge, Setting
    from gradleak.suite import fields, schema

    parts = ["# Suite reference\n", "Every key, its type and default, drawn from the schema.\n"]
    for title, cls in {
        "Top level": schema.Suite,
        "A context": schema.Context,
        "A plugin of an axis": fields.Entry,
        "`settings`": Setting,
        "`grants` of a setting": Knowledge,
        "`engine`": schema.Engine,
        "`prior`": schema.Prior,
        "`utility`": schema.Utility,
    }.items():
        # What the server may do and what is known of the defense are said elsewhere, and refused here.
        keys = [key for key in fields_of(cls) if cls is not Knowledge or key.name not in ("server", "defense")]
        parts += [f"## {title}\n", prose(cls.__doc__) + "\n", table(("key", "type", "default", "meaning"), _rows(keys))]
    return "\n".join(parts)


def store() -> str:
    """Return the page of a store's tables and of the columns of reports."""
    from gradleak.board import schema
    from gradleak.report import dictionary
    from gradleak.scales import METRICS

    parts = ["# Store and columns\n", f"Schema {schema.SCHEMA}, drawn from the code.\n", "## Tables of a store\n"]
    made = "\n\n".join([*(each + ";" for each in schema.STATEMENTS), schema.CLAIMS + ";", schema.LEFT_OUT + ";"])
    parts.append(f"```sql\n{made}\n```\n")
    for title, cls in {"A row: one true image": schema.ImageRow, "A cell": schema.CellResult}.items():
        parts += [f"## {title}\n", table(("name", "type", "default", "meaning"), _rows(fields_of(cls)))]
    columns = dict.fromkeys([*schema.ROW_COLUMNS, *schema.DESCRIBED, *dictionary._FACTS, *METRICS])
    described = [(name, *dictionary.describe(name)) for name in columns]
    known = [(f"`{name}`", unit, meaning) for name, unit, meaning in described if meaning]
    parts += ["## Columns of the tables of a report\n", "`schema.json` beside them says the same.\n"]
    return "\n".join([*parts, table(("column", "unit", "meaning"), known)])


def commands() -> str:
    """Return the page of the command line."""
    import typer.main

    from gradleak.cli.main import app

    parts = ["# Commands\n", "Drawn from the command line; `gradleak COMMAND --help` prints the same.\n"]
    for path, command in _leaves(typer.main.get_command(app), ("gradleak",)):
        parts += [f"## {' '.join(path)}\n", prose(command.help) + "\n"]
        lines = [
            (
                "`"
                + (", ".join(each.opts) if each.param_type_name == "option" else str(each.metavar or each.name))
                + "`",
                str(getattr(each, "help", "") or ""),
            )
            for each in command.params
            if "--help" not in each.opts
        ]
        parts.append(table(("argument", "meaning"), lines) if lines else "")
    return "\n".join(parts)


def _leaves(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, child in sorted(getattr(command, "commands", {}).items()):
        yield from _leaves(child, (*path, name)) if hasattr(child, "commands") else [((*path, name), child)]


def contracts() -> str:
    """Return the page of what a plugin of each kind declares and may override."""
    from gradleak.attack import GradientMatching

    parts = ["# Contracts\n", "What a plugin declares and overrides, drawn from the classes that it inherits from.\n"]
    classes = [
        getattr(__import__(f"gradleak.{noun}", fromlist=["x"]), noun.capitalize()) for noun in registry.GROUPS.values()
    ]
    for cls in [*classes, GradientMatching]:
        parts += [f"## {cls.__name__}\n", f"`from {_home(cls)} import {cls.__name__}`\n", prose(cls.__doc__) + "\n"]
        for name, member in vars(cls).items():
            function = member.fget if isinstance(member, property) else member
            if name.startswith("_") or not inspect.isfunction(function):
                continue
            shown = "property" if isinstance(member, property) else f"{name}{_signature(function)}"
            parts += [f"### {cls.__name__}.{name}\n", f"```python\n{shown}\n```\n", prose(function.__doc__) + "\n"]
    return "\n".join(parts)


def _home(cls: type[Any]) -> str:
    return {"gradleak.reconstruction": "gradleak.attack"}.get(cls.__module__, cls.__module__).replace(
        "gradleak.search.gradient_matching", "gradleak.attack"
    )


def _signature(function: Callable[..., Any]) -> str:
    return str(inspect.signature(function)).replace("'", "")


def api() -> str:
    """Return the page of what `import gradleak` gives."""
    parts = ["# Python\n", "What `import gradleak` gives; everything else may move between versions.\n"]
    for name in sorted(set(gradleak.__all__) - {"__version__"}):
        found = getattr(gradleak, name)
        function = getattr(found, "__wrapped__", found)
        shown = "" if inspect.isclass(found) else _signature(function)
        parts += [f"## gradleak.{name}\n", f"```python\n{name}{shown}\n```\n", prose(function.__doc__) + "\n"]
        if inspect.isclass(found) and dataclasses.is_dataclass(found):
            parts.append(table(("field", "type", "default", "meaning"), _rows(fields_of(found))))
        made = getattr(found, "of", None)
        if inspect.isclass(found) and inspect.ismethod(made):
            parts += [f"### {name}.of\n", f"```python\n{name}.of{_signature(made)}\n```\n", prose(made.__doc__) + "\n"]
    return "\n".join(parts)


def pages() -> Mapping[str, Callable[[], str]]:
    """Return what writes each page, by file name."""
    groups = {f"{group}.md": functools.partial(plugins, group) for group in registry.GROUPS}
    own = {"suites.md": suites, "store.md": store, "commands.md": commands, "contracts.md": contracts, "api.md": api}
    return {**groups, **own}


def write(folder: Path) -> list[Path]:
    """Write every page into a folder and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, page in pages().items():
        (folder / name).write_text(page(), encoding="utf-8")
    return [folder / name for name in pages()]


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "reference")
