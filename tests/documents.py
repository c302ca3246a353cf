"""What documents tell to type, read and run: their fenced blocks, and the marks above them.

A block is run unless a comment above it says why it cannot be: `<!-- not run: needs a GPU -->`. Of one that would take
too long less is run, as a comment states: `<!-- run with: --budget 10s instead of --budget 10m; victims: 1 instead of
victims: 16 -->`, on one line.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradleak.cli.main import main

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "RELEASE", "SECURITY")),
    ROOT / "examples" / "README.md",
    ROOT / "results" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

SHOWN = ("text", "mermaid", "{toctree}")
"""Kinds of blocks that hold nothing to run."""
_FENCE = re.compile(r"^(?:<!-- (?P<mark>[^\n]*) -->\n+)?```(?P<kind>\S+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_NAMED = re.compile(r"# ([\w/]+\.(?:yaml|py))\b")
"""First line of a block that is the content of a file."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    kind: str
    text: str
    mark: str

    @property
    def not_run(self) -> str:
        """Why it is not run; empty if it is."""
        return self.mark.removeprefix("not run: ") if self.mark.startswith("not run: ") else ""

    @property
    def file(self) -> str:
        """Whose content it is; empty if of no file."""
        found = _NAMED.match(self.text)
        return found[1] if found else ""

    @property
    def reduced(self) -> str:
        """The text with what its mark puts in place of what takes too long."""
        text = self.text
        for each in self._exchanges():
            new, _, old = each.partition(" instead of ")
            assert old and old in text, f"{self.page}: 'run with: {each}', but the block below has no {old!r}"
            text = text.replace(old, new)
        return text

    def _exchanges(self) -> list[str]:
        return self.mark.removeprefix("run with: ").split("; ") if self.mark.startswith("run with: ") else []


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    text, name = (
        page.read_text(encoding="utf-8"),
        str(page.relative_to(ROOT)) if page.is_relative_to(ROOT) else page.name,
    )
    found = [Block(name, each["kind"], each["text"], each["mark"] or "") for each in _FENCE.finditer(text)]
    assert 2 * len(found) == len(re.findall("^ *```", text, re.MULTILINE)), f"{name}: a block has no kind, or no end"
    return found


def commands(text: str) -> Iterator[list[str]]:
    """Yield the commands of a block as words, without comments; a backslash joins lines."""
    for line in text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words[1:] if words[0] == "$" else words


def run(page: Path, place: Path) -> list[str]:
    """Run every block of a page in a folder, which is the current one, in order; return what was run.

    Commands of gradleak run in this process.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    done: list[str] = []
    for block in blocks(page):
        if block.not_run or block.kind in SHOWN:
            continue
        if block.file:
            (place / block.file).write_text(block.reduced, encoding="utf-8")
            if block.reduced != block.text and block.kind == "yaml":
                _whole_suite_is_right(block, place)
        elif block.kind == "python":
            exec(compile(block.reduced, block.page, "exec"), names)
        else:
            assert block.kind in ("sh", "console"), (
                f"{block.page}: blocks of {block.kind} need a file's name, or a mark"
            )
            for words in commands(block.reduced):
                _run(words, place, block.page)
                done.append(" ".join(words))
    return done


def _whole_suite_is_right(block: Block, place: Path) -> None:
    """Check the suite that readers have, of which less is run."""
    whole = place / "whole.yaml"
    whole.write_text(block.text, encoding="utf-8")
    assert main(["run", str(whole), "--dry-run"]) == 0, f"{block.page}: {block.file}"
    whole.unlink()


def _run(words: list[str], place: Path, page: str) -> None:
    said = f"{page}: {shlex.join(words)}"
    program, *arguments = words
    if program == "gradleak":
        # One worker: a test has a core to itself.
        given = [*arguments, *(["--workers", "1"] if arguments[:1] == ["run"] else [])]
        assert main(given) == 0, said
        return
    known = {"python": [sys.executable], "pytest": [sys.executable, "-m", "pytest", "-q"]}
    assert program in known, f"{said}: cannot be run here; write above the block why, as <!-- not run: needs a GPU -->"
    path = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [*known[program], *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=place, env=path, timeout=300)
    assert ended.returncode == 0, f"{said}\n{ended.stdout}{ended.stderr}"
