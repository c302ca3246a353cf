"""The documents: what they tell to type runs, what they name is there, and they name what there is."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gradleak import registry
from gradleak.board import flags
from gradleak.board.evidence import DOUBTS
from gradleak.cli.main import main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NAMED = re.compile(r"# (\w+\.(?:yaml|py))\b")
"""First line of a block that is the content of a file."""


def blocks(page: Path) -> list[tuple[str, str]]:
    """Return the fenced blocks of a page: language and text."""
    return _BLOCK.findall(page.read_text(encoding="utf-8"))


RUN = [page for page in PAGES if any(kind in ("console", "python") for kind, _ in blocks(page))]


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_what_a_page_tells_to_type_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for kind, text in blocks(page):
        named = _NAMED.match(text)
        if named:
            (tmp_path / named[1]).write_text(text)
            if kind == "python":
                registry.add_file(tmp_path / named[1])
        elif kind == "python":
            exec(compile(text, page.name, "exec"), names)
        elif kind == "console":
            for command in _commands(text):
                assert main(command) == 0, (command, capsys.readouterr().err)


def _commands(text: str) -> Iterator[list[str]]:
    for line in text.splitlines():
        assert line.startswith("$ gradleak "), f"{line}: a console block holds commands that are run, and no other"
        _, *command = shlex.split(line.removeprefix("$ "), comments=True)
        # One worker: a test has a core to itself.
        yield [*command, *(["--workers", "1"] if command[0] == "run" else [])]


def test_every_command_that_is_shown_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    import typer.main

    from gradleak.cli.main import app

    root: Any = typer.main.get_command(app)
    for page in PAGES:
        shown = "\n".join([text for _, text in blocks(page)] + re.findall("^ {4}(.*)$", page.read_text(), re.MULTILINE))
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
    assert "| `tv` | number | `0.0001` | Weight of the total variation. |" in pages["attacks.md"]
    assert "| `local_lr` | number, > 0, or none | `none` |" in pages["suites.md"]
    assert "## gradleak store rescue" in pages["commands.md"] and "Attack.reconstruct" in pages["contracts.md"]
    assert "## gradleak.attack\n" in pages["api.md"] and "CREATE TABLE cells" in pages["store.md"]
