"""Who may import whom: arrows run downwards, plugins see no truth, tables need no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from gradleak.contract.imports import core, graph, imports, keeps_away_from_the_truth, owner_of, reachable

ROOT = Path(__file__).parents[1]

HALL = {"", "__main__"}
"""What opens the package; it has no layer."""

LAYERS = [
    {
        "code",
        "secret",
        "errors",
        "options",
        "plugins",
        "renamed",
        "paths",
        "seeds",
        "scales",
        "state",
        "status",
        "process",
        "pictures",
        "board.statistics",
    },
    {"registry", "structure"},
    {"declared", "installation"},
    {"dataset", "datasets", "model", "models", "sources"},
    {"client", "clients"},
    {"update"},
    {"knowledge", "intake", "engine.residuals", "privacy"},
    {"defense"},
    {"threat", "mechanisms"},
    {"engine"},
    {"channel", "reconstruction", "server"},
    {"search"},
    {"captured"},
    {"attack"},
    {"chain", "repeated", "training"},
    {
        "suite",
        "board.provenance",
        "board.schema",
        "board.codec",
        "board.file",
        "board.finished",
        "board.trust",
        "board.record",
        "board.store",
        "board.left_out",
        "board.claims",
    },
    {"board.newest", "board.labels", "board.results"},
    {"board.evidence", "board.cost", "board.tables"},
    {"board.attack_board", "board.leaderboard", "board.flags", "board.malicious"},
    {"board.bundle", "board.compare", "board"},
    {"federation"},
    {"contract", "report"},
    {"reading"},
    {"evaluation"},
    {"auditing"},
    {"cli", "testing"},
]
"""Lowest first. A room, or a module of its own; it imports its own layer and those below, through whatever others."""

TORCH_FREE = ["errors", "registry", "scales", "suite", "board.bundle", "board.compare", "report", "reading", "cli.main"]


def _plugins(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).glob("*.py") if path.stem != "__init__")


def test_the_reader_of_imports_sees_every_spelling(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text(
        "import gradleak.client\nfrom gradleak import evaluate\nfrom gradleak.store import Store\nimport torch\n"
        "def f():\n    from . import metrics\n    from .suite import read\n"
        "if TYPE_CHECKING:\n    from .runner import run\n"
    )
    assert imports(file, ()) == {"client", "evaluate", "store.Store", "metrics", "suite.read"}


def _level(module: str) -> int:
    """Layer of a module: its own line, or else its room's."""
    place = owner_of(module, dict.fromkeys(set().union(*LAYERS)))
    (level,) = [number for number, layer in enumerate(LAYERS) if place in layer]
    return level


def test_arrows_run_downwards() -> None:
    known = {name: targets for name, targets in graph().items() if name not in HALL}
    for name in known:
        above = {target for target in reachable(known[name], known) - HALL if _level(target) > _level(name)}
        assert not above, f"{name} reaches {above}"


def test_no_circle_hides_behind_the_type_checker() -> None:
    known = graph(types=True)
    for name in known.keys() - HALL:
        circle = {other for other in reachable(known[name] - {name}, known) if name in reachable(known[other], known)}
        assert not circle - HALL, f"{name} is in a circle with {circle - HALL}"


def test_the_core_knows_no_attack_and_no_defense() -> None:
    for name, path in core().items():
        package = tuple(name.split("."))[:-1]
        found = {
            target for target in imports(path, package) if target.split(".")[0] in ("attacks", "defenses", "servers")
        }
        assert not found, f"{name} imports {found}"


@pytest.mark.parametrize("folder", ["attacks", "defenses", "servers"])
def test_plugins_cannot_reach_the_truth(folder: str) -> None:
    for path in _plugins(folder):
        parts = ("attacks", "defenses", "servers")
        siblings = {target for target in imports(path, (folder,)) if target.split(".")[0] in parts}
        assert all(target.split(".")[0] == folder for target in siblings), f"{path.name} imports {siblings}"
        keeps_away_from_the_truth(path, (folder,))


def test_only_the_evaluator_and_tests_ask_for_victims() -> None:
    asking = set()
    for name, path in core().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "victims":
                asking.add(name)
    assert asking == {"evaluation.workshop", "testing"}, "the second asks for tuning victims only"


def test_tables_and_help_need_no_torch() -> None:
    code = (
        "import importlib, sys\n"
        f"for name in {TORCH_FREE!r}: importlib.import_module(f'gradleak.{{name}}')\n"
        "from gradleak.cli.main import main\n"
        "codes = [main(['--version']), main(['list', '--help']), main(['leaderboard', 'absent.sqlite'])]\n"
        "assert codes == [0, 0, 2], codes\n"
        "assert 'torch' not in sys.modules\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
