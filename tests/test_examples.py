"""The notebook and the examples do what they say."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gradleak.cli.main import main
from tests.documents import blocks

ROOT = Path(__file__).parents[1]


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cells() -> list[str]:
    found: list[dict[str, Any]] = json.loads((ROOT / "docs" / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]


def test_the_notebook_runs_and_shows_what_it_promises(tmp_path: Path) -> None:
    """Every code cell in order, the last line of each shown as a notebook shows it."""
    show = (
        "import ast, json, sys\n"
        "names, shown = {'__name__': '__main__'}, []\n"
        "for source in json.load(open(sys.argv[1])):\n"
        "    tree = ast.parse(source)\n"
        "    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None\n"
        "    exec(compile(tree, 'cell', 'exec'), names)\n"
        "    value = None if last is None else eval(compile(ast.Expression(last.value), 'cell', 'eval'), names)\n"
        "    shown.append(value._repr_html_() if hasattr(value, '_repr_html_') else repr(value))\n"
        "json.dump(shown, open(sys.argv[2], 'w'))\n"
    )
    (tmp_path / "cells.json").write_text(json.dumps(cells()))
    command = [sys.executable, "-c", show, str(tmp_path / "cells.json"), str(tmp_path / "shown.json")]
    path = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=path)
    assert done.returncode == 0, done.stderr
    shown = json.loads((tmp_path / "shown.json").read_text())
    assert "<img" in shown[1] and "unexplained" in shown[1]
    mismatch, error = (float(part) for part in shown[2].strip("()").split(","))
    assert mismatch < 1e-4 and error < 1e-3, "what is left unexplained tells of the truth"
    assert "weight_difference=True" in done.stdout and "their change" in done.stdout
    assert "<img" in shown[4] and 'class="verdict leaks"' in shown[5]
    assert "Leaks: 100 %" in done.stdout and "<table>" in shown[7] and "linear-leakage" in shown[8]


def test_a_client_of_plain_torch_is_attacked(tmp_path: Path) -> None:
    assert example("plain_torch").main(tmp_path) > 30
    assert {each.name for each in tmp_path.iterdir()} == {"weights.safetensors", "update.safetensors"}
    (block,) = blocks(ROOT / "examples" / "README.md")
    command = block.text.partition("gradleak attack")[2].replace("\\\n", " ")
    given = shlex.split(command.replace("captured/", f"{tmp_path}/").replace("examples/", f"{ROOT}/examples/"))
    given[-1] = str(tmp_path / "out")
    assert main(["attack", *given, "--attack", "gauss-newton", "--options", "restarts=2", "--budget", "60s"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["mismatch"][0] < 1e-6, "it is told the optimiser"


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_opacus_with_much_noise_holds_and_with_little_does_not() -> None:
    found = example("opacus_client").main()
    assert found[1e-4] > 30 and found[1.0] < 10


@pytest.mark.slow
def test_a_recorded_flower_update_is_attacked() -> None:
    if importlib.util.find_spec("flwr") is None:
        pytest.skip("flwr is not installed: pip install 'gradleak[flower]'")
    path = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples" / "flower_run.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=path)
    assert done.returncode == 0, done.stderr
    decibels = float(done.stdout.rpartition("came back with ")[2].split()[0])
    assert decibels > 30
