"""Who may import whom: arrows run downwards, plugins see no truth, tables need no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = ROOT / "gradleak"

LAYERS = [
    {"errors", "seeds", "scales", "statistics"},
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
    {"evaluate", "results"},
    {"executors", "leaderboard"},
    {"publish", "compare"},
    {"runner", "report", "verify"},
    {"cli"},
]
"""Lowest first. A module imports its own layer and those below, through whatever other modules."""

TRUTH = {
    "client",
    "utility",
    "evaluate",
    "metrics",
    "store",
    "results",
    "suite",
    "executors",
    "runner",
    "leaderboard",
    "publish",
    "compare",
    "verify",
    "cli",
}
"""What a plugin must not reach, not even through another module."""

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


def _module(path: Path) -> str:
    """Name below gradleak: "store", "models.mlp"; a package is its own name."""
    parts = list(path.relative_to(CORE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _core() -> dict[str, Path]:
    files = [path for path in CORE.rglob("*.py") if not {"attacks", "defenses"} & set(path.relative_to(CORE).parts)]
    return {_module(path): path for path in files}


def imports(path: Path, package: tuple[str, ...]) -> set[str]:
    """Dotted modules below gradleak that a file imports, also inside functions, but not for type checkers only.

    `package` is the file's own package below gradleak, () for the core itself.
    """
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name.removeprefix("gradleak.") for alias in node.names if "gradleak." in alias.name)
        if isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            if node.level:
                base = [*package[: len(package) - node.level + 1], *base]
            elif base[:1] == ["gradleak"]:
                base = base[1:]
            else:
                base = ["", *base]  # another library
            if base[:1] != [""]:
                stem = ".".join(base)
                found.update(f"{stem}.{alias.name}".lstrip(".") for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def _graph() -> dict[str, set[str]]:
    """Core modules, and the core modules that each imports."""
    core = _core()
    graph: dict[str, set[str]] = {}
    for name, path in core.items():
        package = tuple(name.split(".")) if path.stem == "__init__" else tuple(name.split("."))[:-1]
        package = tuple(part for part in package if part)
        graph[name] = {owner for target in imports(path, package) if (owner := _owner(target, set(core)))}
    return graph


def _owner(target: str, known: set[str]) -> str:
    """The module that a dotted name is, or is in."""
    while target and target not in known:
        target = target.rpartition(".")[0]
    return target


def _reachable(start: set[str], graph: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = list(start)
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += graph.get(name, set())
    return seen


def test_the_reader_of_imports_sees_every_spelling(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text(
        "import gradleak.client\nfrom gradleak import evaluate\nfrom gradleak.store import Store\nimport torch\n"
        "def f():\n    from . import metrics\n    from .suite import read\n"
        "if TYPE_CHECKING:\n    from .runner import run\n"
    )
    assert imports(file, ()) == {"client", "evaluate", "store.Store", "metrics", "suite.read"}


def test_layers_name_modules_that_exist() -> None:
    assert set().union(*LAYERS) <= set(_graph())


def test_arrows_run_downwards() -> None:
    graph = _graph()
    for level, layer in enumerate(LAYERS):
        above = set().union(*LAYERS[level + 1 :])
        for name in layer:
            assert not _reachable(graph[name], graph) & above, f"{name} reaches a layer above"


def test_the_core_knows_no_attack_and_no_defense() -> None:
    for name, path in _core().items():
        package = tuple(name.split("."))[:-1]
        found = {target for target in imports(path, package) if target.split(".")[0] in ("attacks", "defenses")}
        assert not found, f"{name} imports {found}"


@pytest.mark.parametrize("folder", ["attacks", "defenses"])
def test_plugins_cannot_reach_the_truth(folder: str) -> None:
    graph = _graph()
    for path in _plugins(folder):
        targets = imports(path, (folder,))
        siblings = {target for target in targets if target.split(".")[0] in ("attacks", "defenses")}
        assert all(target.split(".")[0] == folder for target in siblings), f"{path.name} imports {siblings}"
        core = {owner for target in targets - siblings if (owner := _owner(target, set(graph)))}
        assert not any(name.split(".")[0] == "datasets" for name in core), f"{path.name} reads a dataset"
        reached = _reachable(core, graph) & TRUTH
        assert not reached, f"{path.name} reaches {reached}"


def test_only_the_evaluator_asks_for_victims() -> None:
    asking = set()
    for name, path in _core().items():
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
