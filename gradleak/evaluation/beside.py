"""A small board of one plugin beside the reference ones, on tuning victims of digits: what `gradleak check` shows."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from .. import registry
from ..board import leaderboard, malicious, results
from ..board.leaderboard import Board
from ..board.store import Store
from ..errors import GradleakError
from ..threat import BatchNorm, Knowledge, Power
from . import executors, runner
from .workshop import Resources

VICTIMS = 4

MODEL = {"name": "mlp", "options": {"widths": [32]}, "label": "mlp"}
CONTROLS = ("mean-image", "class-mean")
SEARCH = {"name": "inverting-gradients", "options": {"iterations": 100}, "label": "inverting-gradients"}
ATTACKS = ({"name": "linear-leakage", "optional": True}, SEARCH, *CONTROLS)
"""Beside an attack: a closed form, a search, and guesses."""
DEFENSES = (
    "none",
    {"name": "top-k", "options": {"ratio": 0.05}, "label": "top-k 5 %"},
    {"name": "gaussian-noise", "options": {"sigma": 0.3, "clip": 1.0}, "label": "gaussian-noise 0.3"},
)
"""Beside a defense: nothing, a compression, and noise that hides images of this size."""
BATCH = 4
"""Images of the clients that a malicious server asks."""

_AXES = {"models": "model", "datasets": "dataset", "clients": "setting"}
"""What differs between a plugin and those beside it, where each has a board of its own."""


def boards(group: str, name: str, options: Mapping[str, Any], resources: Resources) -> list[Board]:
    """Run a plugin of the registry beside others and return what boards say.

    Args:
        group: of the registry.
        name: its name there; of a plugin file, one that was added.
        options: of the plugin.
        resources: where data is.

    Raises:
        GradleakError: it needs what a small board does not grant, or does not suit the model; the line says which.
    """
    content = suite_of(group, name, options)
    with tempfile.TemporaryDirectory() as folder:
        path, store = Path(folder) / "beside.yaml", Path(folder) / "beside.sqlite"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        try:
            summary = runner.run(
                path,
                store,
                executors.build("local"),
                resources,
                registry.added_files(),
                console=Console(quiet=True),
            )
        except GradleakError as error:
            raise GradleakError(f"no small board: {str(error).removeprefix(f'suite {path}: ')}") from error
        if summary.failed or summary.pending:
            title, reason = next(iter({**summary.failed, **summary.pending}.items()))
            raise GradleakError(f"no small board: {title}: {reason}")
        with Store(store) as opened:
            found = results.read(opened)
    if group == "servers":
        return malicious.server_boards(found)
    if axis := _AXES.get(group):
        return [leaderboard.landing_board(found.where(**{axis: label})) for label in dict.fromkeys(found.cells[axis])]
    landing = leaderboard.landing_board(found)
    return [landing, leaderboard.attack_board(found)] if group == "attacks" else [landing]


def suite_of(group: str, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a suite with a plugin and the reference ones.

    Raises:
        GradleakError: an attack needs what a small board does not grant.
    """
    own = {"name": name, "options": dict(options), "label": name}
    setting: dict[str, Any] = {"name": "fedsgd", "batch_size": 1, "grants": {"labels": "known", "auxiliary": True}}
    content: dict[str, Any] = {
        "name": "beside",
        "tuning": True,
        "victims": VICTIMS,
        "candidates": 20,
        "knowledge": ["public"],
        "datasets": ["digits"],
        "models": [MODEL],
        "settings": [setting],
        "attacks": list(ATTACKS),
        "defenses": list(DEFENSES),
    }
    if group == "attacks":
        setting["grants"] |= _grants(name, options)
    if group in ("attacks", "defenses", "models", "datasets"):
        known = [entry if isinstance(entry, str) else entry["name"] for entry in content[group]]
        # Of one that is there already, the plugin with its options takes the place.
        others = [entry for entry, each in zip(content[group], known, strict=True) if each != name]
        content[group] = [own, *others]
    elif group == "servers":
        setting |= {"batch_size": BATCH}
        asked = {**setting, "name": name, "server": {name: dict(options)}}
        content |= {"settings": [asked, {**setting, "name": "honest"}], "defenses": ["none"]}
    else:
        steps = {"local_steps": 2, "local_lr": 0.1, "grants": {**setting["grants"], "local_training": True}}
        plain, own_client = {**setting, **steps, "name": "plain"}, {name: dict(options)}
        content |= {"settings": [{**plain, "name": name, "client": own_client}, plain], "defenses": list(DEFENSES[:1])}
    return content


def _grants(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an attack needs beyond labels and public images."""
    needs: Knowledge = registry.build("attacks", name, options).needs
    if needs.server is not Power.HONEST:
        raise GradleakError(f"no small board: attack {name!r} needs a malicious server; name one in a suite's settings")
    lacking = ["generator"] * needs.generator + ["batch_norm"] * (needs.batch_norm is not BatchNorm.NONE)
    if lacking:
        raise GradleakError(f"no small board: attack {name!r} needs {' and '.join(lacking)}; run a suite with it")
    return {"local_training": True} if needs.local_training else {}
