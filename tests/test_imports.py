"""Who may import whom: arrows run downwards, plugins see no truth, tables need no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from gradleak.contract import core, graph, imports, keeps_away_from_the_truth, reachable

ROOT = Path(__file__).parents[1]

LAYERS = [
    {"errors", "paths", "seeds", "scales", "statistics"},
    {"registry"},
    {"dataset", "model"},
    {"update"},
    {"threat", "problem"},
    {"matching", "priors", "labels"},
    {"defense"},
    {"attack"},
    {"client", "metrics", "training"},
    {"suite", "store"},
    {"utility"},
    {"contract", "evaluate", "results"},
    {"executors", "leaderboard"},
    {"publish", "compare"},
    {"runner", "report", "verify"},
    {"cli"},
]
"""Lowest first. A module imports its own layer and those below, through whatever other modules."""

TORCH_FREE = [
    "errors",
    "registry",
    "scales",
    "statistics",
    "suite",
    "store",
    "results",
    "leaderboard",
    "publish",
    "compare",
    "report",
    "cli",
]


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


def test_layers_name_modules_that_exist() -> None:
    assert set().union(*LAYERS) <= set(graph())


def test_arrows_run_downwards() -> None:
    known = graph()
    for level, layer in enumerate(LAYERS):
        above = set().union(*LAYERS[level + 1 :])
        for name in layer:
            assert not reachable(known[name], known) & above, f"{name} reaches a layer above"


def test_the_core_knows_no_attack_and_no_defense() -> None:
    for name, path in core().items():
        package = tuple(name.split("."))[:-1]
        found = {target for target in imports(path, package) if target.split(".")[0] in ("attacks", "defenses")}
        assert not found, f"{name} imports {found}"


@pytest.mark.parametrize("folder", ["attacks", "defenses"])
def test_plugins_cannot_reach_the_truth(folder: str) -> None:
    for path in _plugins(folder):
        siblings = {target for target in imports(path, (folder,)) if target.split(".")[0] in ("attacks", "defenses")}
        assert all(target.split(".")[0] == folder for target in siblings), f"{path.name} imports {siblings}"
        keeps_away_from_the_truth(path, (folder,))


def test_only_the_evaluator_asks_for_victims() -> None:
    asking = set()
    for name, path in core().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "victims":
                asking.add(name)
    assert asking == {"evaluate"}


def test_tables_and_help_need_no_torch() -> None:
    code = (
        "import importlib, sys\n"
        f"for name in {TORCH_FREE!r}: importlib.import_module(f'gradleak.{{name}}')\n"
        "from gradleak.cli import main\n"
        "codes = [main(['--version']), main(['list', '--help']), main(['leaderboard', 'absent.sqlite'])]\n"
        "assert codes == [0, 0, 2], codes\n"
        "assert 'torch' not in sys.modules\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
