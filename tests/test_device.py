"""Cells on another device than the CPU: no tensor is left behind (see tests.elsewhere)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from gradleak import registry

ROOT = Path(__file__).resolve().parents[1]
GRANTS = {"labels": "known", "auxiliary": True, "generator": True, "batch_norm": "running"}
FEW = {"iterations": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "bottleneck-inversion": FEW,
    "dlg": FEW,
    "dropout-inversion": FEW,
    "encoding-inversion": FEW,
    "gauss-newton": {**FEW, "restarts": 1},
    "ggl": {**FEW, "restarts": 1, "search": "adam"},
    "gias": {**FEW, "restarts": 1, "weights_iterations": 2},
    "gifd": {**FEW, "restarts": 1},
    "gradinversion": FEW,
    "idlg": FEW,
    "inverting-gradients": FEW,
    "lti": {"messages": 16, "epochs": 1},
    "quantum-relaxation": {**FEW, "restarts": 1},
    "sme": FEW,
    "wrong-gradient": FEW,
}
MIXED = ("mixup", "instahide")


def suite(**changes: Any) -> dict[str, Any]:
    attacks = [{"name": name, "options": OPTIONS.get(name, {}), "optional": True} for name in registry.names("attacks")]
    return {
        "name": "tiny",
        "victims": 2,
        "candidates": 10,
        "controls": "listed",
        "datasets": ["digits"],
        "models": [{"name": "lenet", "options": {"activation": "tanh"}}],
        "settings": [{"batch_size": 1, "grants": GRANTS}],
        "prior": {"options": {"latent": 4, "width": 4, "epochs": 1}},
        "attacks": attacks,
        "defenses": ["none"],
        "knowledge": ["public"],
    } | changes


SUITES = {
    "attacks": suite(),
    "dense layers": suite(models=[{"name": "mlp", "options": {"widths": [16]}}]),
    "defenses": suite(
        attacks=[attack for attack in suite()["attacks"] if attack["name"] == "inverting-gradients"],
        defenses=[name for name in registry.names("defenses") if name not in MIXED],
        models=[{"name": "mlp", "options": {"widths": [16]}}],
    ),
    "mixed images": suite(
        attacks=[attack for attack in suite()["attacks"] if attack["name"] == "encoding-inversion"],
        defenses=list(MIXED),
        settings=[{"batch_size": 2, "grants": GRANTS}],
    ),
    "local steps": suite(
        attacks=[attack for attack in suite()["attacks"] if attack["name"] in ("inverting-gradients", "sme")],
        settings=[{"batch_size": 2, "local_steps": 2, "local_lr": 0.1, "grants": {"local_training": True}}],
    ),
}


@pytest.mark.parametrize("name", SUITES)
def test_cells_are_the_same_elsewhere(name: str, tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump(SUITES[name]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GRADLEAK_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "tests.elsewhere", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert found
    assert {each["cell"]: each["error"] for each in found if each["error"] != each["expected"]} == {}
    # Some operations are made of others there, which round otherwise.
    far = {
        each["cell"]: (each["here"], each["there"])
        for each in found
        if not each["error"] and each["there"] != pytest.approx(each["here"], abs=1e-3)
    }
    assert far == {}
