"""The documents: what they tell to type runs, what they name is there, and they name what there is."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from gradleak import registry
from gradleak.board import flags
from gradleak.board.evidence import DOUBTS
from tests.documents import PAGES, ROOT, blocks

DOCS = ROOT / "docs"


def test_every_command_that_is_shown_is_one() -> None:
    import typer.main

    from gradleak.cli.main import app

    root: Any = typer.main.get_command(app)
    for page in PAGES:
        told = re.findall("`(gradleak [a-z][^`]*)`", page.read_text(encoding="utf-8"))
        shown = "\n".join([*(block.text for block in blocks(page)), *(" ".join(each.split()) for each in told)])
        for found in re.finditer(r"^(?:\$ )?gradleak ([a-z]+)(?: ([a-z]+))?(.*)$", shown, re.MULTILINE):
            command = root.commands.get(found[1])
            assert command is not None, f"{page.name}: gradleak {found[1]}"
            if hasattr(command, "commands") and found[2]:
                assert found[2] in command.commands, f"{page.name}: {found[0]}"
                command = command.commands[found[2]]
            known = {name for each in command.params for name in (*each.opts, *each.secondary_opts)}
            asked = set(re.findall(r"(?<=\s)--[a-z][\w-]*", found[3].partition("  #")[0])) - {"--help", "--debug"}
            assert asked <= known, f"{page.name}: {found[0]}: {asked - known}"


def test_links_lead_somewhere() -> None:
    made = set(_generator().pages())
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[\w-]+)?\)", page.read_text()):
            if target.startswith("reference/"):
                assert target.removeprefix("reference/") in made, f"{page.name}: {target}"
            else:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_page_is_in_the_contents() -> None:
    listed = set(re.findall(r"^([a-z]+)$", (DOCS / "index.md").read_text(), re.MULTILINE))
    assert {page.stem for page in DOCS.glob("*.md")} - {"index"} == listed


def test_every_doubt_and_flag_has_a_remedy() -> None:
    rows = re.findall(r"^\| `([\w -]+)` \| .+ \| .+ \|$", (DOCS / "doubts.md").read_text(), re.MULTILINE)
    tree = ast.parse(Path(flags.__file__).read_text())
    raised = {
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Flag" and isinstance(node.args[0], ast.Constant)
    }
    assert len(raised) == len(flags.FLAGS)
    assert set(rows) == {*DOUBTS, *raised}


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_docs", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # What dataclasses look their annotations up in.
    import sys

    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_reference_pages_follow_from_the_code() -> None:
    import doctest

    made = _generator()
    assert doctest.testmod(made).failed == 0 and doctest.testmod(made).attempted >= 2
    pages = {name: page() for name, page in made.pages().items()}
    for group in registry.GROUPS:
        page = pages[f"{group}.md"]
        assert re.findall(r"^## ([a-z].*)$", page, re.MULTILINE)[: len(registry.built_in(group))] == registry.built_in(
            group
        )
    untold = re.findall(r"^\| (`\w+`) \|.*\|  \|$", pages["suites.md"], re.MULTILINE)
    assert not untold, f"keys of suites without a word on what they mean: {untold}"
    assert "| `tv` | number | `0.0001` | Weight of the total variation. |" in pages["attacks.md"]
    assert "| `local_lr` | number, > 0, or none | `none` |" in pages["suites.md"]
    assert "## gradleak store rescue" in pages["commands.md"] and "Attack.reconstruct" in pages["contracts.md"]
    assert "## gradleak.attack\n" in pages["api.md"] and "CREATE TABLE cells" in pages["store.md"]
