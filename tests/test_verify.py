"""Verification: an honest bundle passes, whatever its machine; every forgery is refused, with the reason."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from gradleak.board.bundle import open_all, publish
from gradleak.board.codec import pack, unpack
from gradleak.board.leaderboard import defense_board
from gradleak.board.results import read
from gradleak.board.store import Store
from gradleak.cli.main import main
from gradleak.evaluation import metrics
from gradleak.evaluation.verify import Extent, Finding, Verified, seconds, verify
from gradleak.evaluation.verify.again import sample
from gradleak.evaluation.verify.luck import RARE, gap_of
from gradleak.evaluation.verify.messages import Scene
from gradleak.evaluation.verify.rounding import Shaken, unexplained
from gradleak.evaluation.workshop import Resources, Workshop
from gradleak.secret import Secret
from gradleak.suite import AttackCell, Cell, key_of
from gradleak.update import one_hot

SUITE = {
    "name": "verified",
    "version": 2,
    "victims": 2,
    "candidates": 10,
    "engine": {"backend": "layerwise"},
    "knowledge": ["oblivious", "public"],
    "datasets": ["digits"],
    "models": [{"name": "mlp", "options": {"widths": [16]}, "label": "mlp"}],
    "settings": [{"name": "fedsgd", "grants": {"labels": "known"}}],
    "utility": {"clients": 5, "rounds": 3, "batch_size": 16, "lr": [0.3]},
    "attacks": [
        "linear-leakage",
        {"name": "inverting-gradients", "options": {"iterations": 20}, "label": "ig"},
        {"name": "spear", "optional": True},
    ],
    "defenses": [
        "none",
        {"name": "gaussian-noise", "options": {"sigma": 0.3, "clip": 1.0}, "label": "noise"},
        {"name": "top-k", "options": {"ratio": 0.1}, "label": "top-k"},
    ],
}
RESOURCES = Resources()
QUICK = Extent(sample=0, seed=0)

Database = sqlite3.Connection
Forgery = Callable[[Database], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `suite.yaml`, the honest `store.sqlite` that it made, and `bundle.zip`."""
    made = tmp_path_factory.mktemp("verified")
    (made / "suite.yaml").write_text(yaml.safe_dump(SUITE))
    # Computed by other instructions than this process uses, as on another machine.
    other = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "GRADLEAK_CACHE": str(made / "cache")}
    arguments = [str(made / "suite.yaml"), "--store", str(made / "store.sqlite"), "--executor", "local"]
    subprocess.run([sys.executable, "-m", "gradleak", "run", *arguments], env=other, check=True, capture_output=True)
    publish(made / "store.sqlite", made / "bundle.zip")
    return made


def checked(folder: Path, bundle: Path, extent: Extent = QUICK, **other: Any) -> Verified:
    return verify(bundle, RESOURCES, extent, [folder / "suite.yaml"], **other)


def refused(found: Verified) -> dict[str, str]:
    return {each.check: each.detail for each in found.findings if each.ok is False}


def forge(folder: Path, to: Path, *forgeries: Forgery) -> Path:
    """Publish a store after changing it: what a careful cheat would send."""
    copy = to / "forged.sqlite"
    shutil.copy(folder / "store.sqlite", copy)
    with contextlib.closing(sqlite3.connect(copy)) as database, database:
        database.execute("PRAGMA foreign_keys = ON")
        for each in forgeries:
            each(database)
    bundle = to / "forged.zip"
    bundle.unlink(missing_ok=True)
    publish(copy, bundle)
    return bundle


def cell_of(database: Database, attack: str, defense: str, level: str = "oblivious") -> tuple[int, dict[str, Any]]:
    for number, text in database.execute("SELECT id, config FROM cells"):
        config = json.loads(text)
        place = (config["attack"]["label"], config["defense"]["label"], config.get("knowledge", level))
        if place == (attack, defense, level):
            return number, config
    raise AssertionError(f"no cell {attack}, {defense}, {level}")


def tell(database: Database, cell: int, column: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a cell's JSON text."""
    text = json.loads(database.execute(f"SELECT {column} FROM cells WHERE id = ?", (cell,)).fetchone()[0])
    change(text)
    database.execute(f"UPDATE cells SET {column} = ? WHERE id = ?", (json.dumps(text, sort_keys=True), cell))


def answer_with(images: Callable[[Any], Any], attack: str = "ig", defense: str = "none") -> Forgery:
    """Replace an attack's images by others, with metrics, loss and trace to match: only running again shows it."""

    def change(database: Database) -> None:
        number, config = cell_of(database, attack, defense)
        (kept,) = database.execute("SELECT value FROM meta WHERE name = 'secret'").fetchone()
        cell, workshop = Cell.of(config, secret=Secret.of(kept)), Workshop(RESOURCES)
        assert isinstance(cell, AttackCell)
        data = workshop.data(cell.dataset)
        truth, labels = data.victims(config["victims"], 1, False)
        fakes = torch.as_tensor(np.asarray(images(truth.numpy()), dtype=np.float32))
        scored = metrics.score(fakes, None, truth, labels, data.candidates(config["candidates"], False))
        (here,) = Scene(cell, workshop).heard()
        targets = torch.stack([one_hot(each, data.classes, truth.dtype) for each in labels])
        loss = cell.built_attack.loss(here.observation, fakes, targets, {})
        assert loss is not None
        for row in scored:
            shape, kind, content = pack(fakes[row["victim"]].numpy())
            database.execute(
                "UPDATE blobs SET shape = ?, dtype = ?, data = ? WHERE cell = ? AND victim = ? AND"
                " kind = 'reconstruction'",
                (shape, kind, content, number, row["victim"]),
            )
            names = ("mse", "psnr", "ssim", "lpips_64", "reidentified")
            database.execute(
                f"UPDATE rows SET {', '.join(f'{name} = ?' for name in names)}, loss = ? WHERE cell = ? AND victim = ?",
                (*(float(row[name]) for name in names), float(loss[row["victim"]]), number, row["victim"]),
            )

    return change


def in_rows(statement: str, attack: str = "ig", defense: str = "none") -> Forgery:
    return lambda database: _change(
        database, f"UPDATE rows SET {statement} WHERE cell = ?", cell_of(database, attack, defense)[0]
    )


def _change(database: Database, statement: str, *values: object) -> None:
    assert database.execute(statement, values).rowcount > 0


def in_facts(attack: str, defense: str, level: str = "oblivious", **facts: object) -> Forgery:
    def change(database: Database) -> None:
        number, _ = cell_of(database, attack, defense, level)

        def put(told: dict[str, Any]) -> None:
            for name, value in facts.items():
                if isinstance(value, Mapping) and isinstance(told.get(name), dict):
                    told[name].update(value)
                else:
                    told[name] = value

        tell(database, number, "provenance", put)

    return change


def in_config(attack: str, defense: str, change: Callable[[dict[str, Any]], None]) -> Forgery:
    return lambda database: tell(database, cell_of(database, attack, defense)[0], "config", change)


def everywhere(change: Callable[[dict[str, Any]], None]) -> Forgery:
    def changed(database: Database) -> None:
        for (number,) in database.execute("SELECT id FROM cells").fetchall():
            tell(database, number, "config", change)

    return changed


def fail(database: Database) -> None:
    number, _ = cell_of(database, "linear-leakage", "none")
    _change(database, "UPDATE cells SET status = 'failed', error = 'RuntimeError: CUDA error' WHERE id = ?", number)
    for table in ("rows", "blobs"):
        _change(database, f"DELETE FROM {table} WHERE cell = ?", number)


def time_out(database: Database) -> None:
    number, _ = cell_of(database, "ig", "none")
    names = ("mse", "psnr", "ssim", "lpips_64", "reidentified", "matched", "finite")
    cleared = ", ".join(f"{name} = NULL" for name in names)
    _change(database, f"UPDATE rows SET status = 'timeout', {cleared} WHERE cell = ?", number)
    _change(database, "DELETE FROM blobs WHERE cell = ?", number)


def drop(database: Database) -> None:
    number, _ = cell_of(database, "linear-leakage", "none")
    for table, column in (("rows", "cell"), ("blobs", "cell"), ("cells", "id")):
        _change(database, f"DELETE FROM {table} WHERE {column} = ?", number)


def without_image(database: Database) -> None:
    number, _ = cell_of(database, "ig", "noise")
    _change(database, "DELETE FROM blobs WHERE kind = 'reconstruction' AND victim = 1 AND cell = ?", number)


def without_row(database: Database) -> None:
    number, _ = cell_of(database, "ig", "top-k")
    _change(database, "DELETE FROM rows WHERE victim = 1 AND cell = ?", number)


def leave_nothing(database: Database) -> None:
    """All is done by `leave_out`."""


def leave_out(database: Database) -> None:
    drop(database)
    place = ("linear-leakage", "none", "mlp", "digits", "fedsgd", "")
    _change(database, "INSERT INTO left_out VALUES (?, ?, ?, ?, ?, ?, 'does not apply', 0)", *place)


def add(database: Database) -> None:
    """A cell of another seed: a lucky draw among many."""
    number, config = cell_of(database, "ig", "none")
    other = {**config, "seed": 7}
    columns = "status, error, started, seconds, device, versions, provenance"
    _change(
        database,
        f"INSERT INTO cells (key, config, {columns}) SELECT ?, ?, {columns} FROM cells WHERE id = ?",
        key_of(other),
        json.dumps(other, sort_keys=True),
        number,
    )
    (new,) = database.execute("SELECT max(id) FROM cells").fetchone()
    names = [name for _, name, *_ in database.execute("PRAGMA table_info(rows)") if name != "cell"]
    _change(
        database,
        f"INSERT INTO rows SELECT ?, {', '.join(names)} FROM rows WHERE cell = ? ORDER BY victim, image",
        new,
        number,
    )


def choose_seed(database: Database) -> None:
    """The same cell under another seed, instead of the suite's."""
    number, config = cell_of(database, "ig", "none")
    other = {**config, "seed": 7}
    values = (key_of(other), json.dumps(other, sort_keys=True), number)
    _change(database, "UPDATE cells SET key = ?, config = ? WHERE id = ?", *values)


def easier_victims(database: Database) -> None:
    found = database.execute("SELECT list, victim, shape, dtype, data FROM victims WHERE victim = 0").fetchone()
    image = unpack(*found[2:])
    _change(database, "UPDATE victims SET data = ? WHERE victim = 0", pack(np.zeros_like(image))[2])


def swap_reconstructions(database: Database) -> None:
    number, _ = cell_of(database, "ig", "none")
    query = "SELECT victim, data FROM blobs WHERE cell = ? AND kind = 'reconstruction'"
    images = dict(database.execute(query, (number,)))
    for victim, other in ((0, 1), (1, 0)):
        _change(
            database,
            "UPDATE blobs SET data = ? WHERE cell = ? AND victim = ? AND kind = 'reconstruction'",
            images[other],
            number,
            victim,
        )


def cheap(database: Database) -> None:
    """A defense whose clients take no time."""
    for number, text in database.execute("SELECT id, config FROM cells").fetchall():
        config = json.loads(text)
        if config["defense"]["label"] == "top-k" and "knowledge" in config:
            tell(database, number, "provenance", lambda told: told.update(client_seconds=1e-9))


def version(config: dict[str, Any]) -> None:
    config["attack"]["version"] = "0"


def budget(config: dict[str, Any]) -> None:
    config["attack"]["options"]["iterations"] = 20000


def label(config: dict[str, Any]) -> None:
    if config["defense"]["name"] == "top-k":
        config["defense"]["label"] = "my new defense"


def other_suite(config: dict[str, Any]) -> None:
    config["suite"] = {"name": "standard", "version": 1}


def new_version(config: dict[str, Any]) -> None:
    config["suite"]["version"] = 3


FORGERIES: dict[str, dict[str, tuple[str, str, Forgery]]] = {
    "scores": {
        "a metric that nobody looks at": ("metrics", "ssim", in_rows("ssim = ssim + 0.001", "spear", "none")),
        "reconstructions swapped": ("metrics", "mse", swap_reconstructions),
        "a closed form that did worse": (
            "closed forms and controls",
            "psnr",
            answer_with(lambda truth: 1 - truth, "linear-leakage"),
        ),
        "a truth that fits no better": ("losses", "loss at truth", in_rows("loss_at_truth = loss", "ig", "noise")),
        "a mean image that fits no better": ("losses", "loss at mean", in_rows("loss_at_mean = 0", "spear")),
        "an update that tells much": ("losses", "contrast", in_rows("contrast = 1", "linear-leakage", "top-k")),
        "a message of another size": ("messages", "norm", in_rows("message_norm = message_norm / 2")),
        "a loss that fits": ("losses in doubt", "loss", in_rows("loss = 1e-9", "ig", "top-k")),
        "a loss that had settled": ("traces", "late progress", in_rows("late_progress = 0")),
    },
    "absence": {
        "no reconstruction": ("metrics", "no reconstruction", without_image),
        "rows deleted": ("rows", "missing", without_row),
        "marked failed": ("failed cells", "runs here", fail),
        "marked timed out": ("failed cells", "status", time_out),
        "easier victims": ("victims", "not the images", easier_victims),
    },
    "grid": {
        "cells deleted with an excuse": ("left out", "does not apply", leave_out),
        "cells deleted": ("cells", "missing: linear-leakage", leave_nothing),
        "cells added": ("cells", "seed 7", add),
        "another defense's name": ("labels", "my new defense", everywhere(label)),
    },
    "choice": {
        "another seed": ("cells", "seed 7", choose_seed),
        "more iterations claimed": ("keys", "", in_config("ig", "top-k", budget)),
        "another suite's version": ("suite", "here is version 2", everywhere(new_version)),
    },
    "name": {
        "another version": ("keys", "", in_config("ig", "none", version)),
        "another suite's name": ("suite", "standard", everywhere(other_suite)),
    },
    "facts": {
        "better metrics": ("metrics", "psnr", in_rows("psnr = psnr + 0.01", "mean-image")),
        "a lower epsilon": ("facts", "epsilon", in_facts("ig", "noise", epsilon={"epsilon": 0.1})),
        "a lower epsilon of training": (
            "recipes",
            "epsilon",
            in_facts("utility", "noise", training_epsilon={"epsilon": 1.0}),
        ),
        "fewer bytes": ("facts", "bytes", in_facts("ig", "top-k", bytes=1.0)),
        "a control that is none": ("facts", "attack_family", in_facts("ig", "none", attack_family="control")),
    },
    "more facts": {
        "an epsilon out of nothing": (
            "facts",
            "epsilon",
            in_facts("ig", "top-k", epsilon={"epsilon": 1.0, "delta": 1e-5, "accountant": "mine", "unit": "mine"}),
        ),
        "an accuracy where none is": ("facts", "test_accuracy", in_facts("ig", "noise", test_accuracy=1.0)),
        "an attack that adapts": ("facts", "adaptive", in_facts("ig", "none", adaptive=True)),
    },
    "details": {
        "a cheap defense": ("seconds", "defense 'top-k'", cheap),
        "a model that knows more": ("facts", "model_accuracy", in_facts("ig", "none", model_accuracy=0.5)),
        "a detail of the attack": (
            "closed forms and controls",
            "self check",
            in_rows("""extras = '{"rank": 1, "self_check": 0.5}'""", "spear"),
        ),
    },
}
"""Kinds of cheating: which check refuses each, a word of the reason, and how it is done. Those of a group together."""

SAMPLED: dict[str, dict[str, tuple[str, str, Forgery]]] = {
    "attacks": {
        "a stronger attack": ("sample", "ig · none", answer_with(lambda truth: truth * 0.999)),
        "labels that were found": ("sample", "label correct", in_rows("label_correct = 0", "ig", "top-k")),
        "a higher accuracy": ("sample", "test accuracy", in_facts("utility", "none", test_accuracy=0.99)),
    },
    "defenses": {
        "a weaker attack": ("sample", "psnr", answer_with(lambda truth: 1 - truth)),
        "an attack in one step": ("sample", "iterations", in_rows("iterations = 1", "ig", "top-k")),
        "fewer bytes in training": ("sample", "bytes", in_facts("utility", "top-k", bytes=10.0)),
    },
    "rates": {
        "a rate that did better": (
            "sample",
            "validation accuracy",
            in_facts("utility", "noise", validation_accuracy={"0.3": 1.0}),
        ),
    },
}
"""Kinds of cheating that only running again shows."""


def test_an_honest_bundle_of_another_machine_is_verified(folder: Path) -> None:
    told, came = list[str](), list[Finding]()
    found = checked(folder, folder / "bundle.zip", Extent(sample=100), say=told.append, tell=came.append)
    assert not refused(found) and found.ok
    assert all(each.ok for each in found.findings), found.findings
    assert set(found.cells.values()) == {"re-run"} and len(found.cells) == 17
    assert any(line.startswith("sample: cell 1 of") for line in told)
    assert came == found.findings, "each is told"
    (luck,) = (each.detail for each in found.findings if each.check == "luck")
    assert "cells drawn anew" in luck and ("'noise'" in luck or "attack" in luck)


@pytest.mark.parametrize("group", FORGERIES)
def test_forgeries_are_refused_each_with_its_reason(folder: Path, tmp_path: Path, group: str) -> None:
    found = refused(checked(folder, forge(folder, tmp_path, *(change for *_, change in FORGERIES[group].values()))))
    for kind, (check, reason, _) in FORGERIES[group].items():
        assert reason in found.get(check, "nothing"), f"{kind}: {found}"


@pytest.mark.parametrize("group", SAMPLED)
def test_what_only_running_shows_is_refused_by_the_sample(folder: Path, tmp_path: Path, group: str) -> None:
    bundle = forge(folder, tmp_path, *(change for *_, change in SAMPLED[group].values()))
    assert checked(folder, bundle).ok
    found = refused(checked(folder, bundle, Extent(sample=100)))
    for kind, (check, reason, _) in SAMPLED[group].items():
        assert reason in found.get(check, "nothing"), f"{kind}: {found}"


def test_a_sample_has_every_attack_defense_and_training(folder: Path) -> None:
    with Store(folder / "store.sqlite") as store:
        cells = {line["key"]: Cell.of(line["config"]) for line in store.cells().to_dict("records")}
    drawn = [cells[key] for key in sample(cells, 1, seed=3)]
    named = {(getattr(cell, "attack", cell.model).label, cell.defense.label) for cell in drawn}
    assert {defense for _, defense in named} == {"none", "noise", "top-k"}
    assert {attack for attack, _ in named} >= {"linear-leakage", "ig", "spear", "mean-image", "mlp"}
    assert sample(cells, 1, seed=3) == sample(cells, 1, seed=3) != sample(cells, 1, seed=4)
    assert not sample(cells, 0, seed=3) and len(sample(cells, 100, seed=3)) == len(cells)


def test_rounding_is_measured_and_explains_no_more() -> None:
    draws = np.random.default_rng(0)
    centre = np.linspace(10, 30, 32)
    runs = [centre + draws.normal(0, 1, 32) for _ in range(20)]

    def own(number: int) -> Any:
        return runs[number + 1]

    assert unexplained(runs[0], own, 0.01) is None
    assert unexplained(runs[0] + 2, own, 0.01) and unexplained(runs[0] - 2, own, 0.01)
    still = [centre] * 20
    assert unexplained(centre + 0.005, still.__getitem__, 0.01) is None
    assert unexplained(centre + 0.02, still.__getitem__, 0.01)
    odd = centre.copy()
    odd[0] += 20
    assert unexplained(odd, still.__getitem__, 0.01), "one of 32 is no rounding where nothing tips over"
    tipped = [*still[:9], *(centre + 20 * (np.arange(32) == 0) * (number % 2) for number in range(8))]
    assert unexplained(odd, tipped.__getitem__, 0.01) is None, "too rare for the twins to show, but for the loud ones"
    odd[1] += 20
    assert unexplained(odd, tipped.__getitem__, 0.01), "the second never tips over"
    heavy = [centre + np.where(np.arange(32) == 0, 5.0 * (number % 3), 0.0) for number in range(9)]
    assert unexplained(centre + np.where(np.arange(32) == 0, 12.0, 0.0), heavy.__getitem__, 0.01) is None
    gone = centre.copy()
    gone[:5] = np.nan
    assert unexplained(gone, still.__getitem__, 0.01) and unexplained(centre[:5], still.__getitem__, 0.01)
    assert unexplained(np.zeros(2), lambda number: np.ones(2), 0.5)


def test_luck_is_measured_victim_by_victim_and_refused_beyond_chance() -> None:
    draws = np.random.default_rng(0)
    victims: list[tuple[object, ...]] = [(victim,) for victim in range(16)]

    def gaps(shift: float) -> Any:
        noise = draws.normal(shift, 1, 16)  # Of two attacks on one defense: they share its noise.
        found = gap_of("defense 'x'", [dict(zip(victims, noise.tolist(), strict=True)) for _ in range(2)])
        assert found is not None
        return found

    honest = [gaps(0) for _ in range(400)]
    assert 0.02 < np.mean([gap.chance < 0.05 for gap in honest]) < 0.08, "one in twenty, though two cells say the same"
    assert 0.9 < np.mean([abs(gap.mean) < 2 * gap.error for gap in honest]) < 0.98
    assert gaps(3).chance < 1 / RARE and gaps(-3).chance < 1 / RARE
    assert gap_of("x", [{victims[0]: 1.0}]) is None and gap_of("x", [dict.fromkeys(victims, 1e-3)]) is None


def test_seconds_are_compared_as_to_their_order_of_magnitude() -> None:
    here = {"a": 1e-3, "b": 2e-3, "c": 5.0}

    def told(factor: float, **other: float) -> Finding:
        times = {name: [(factor * own * other.get(name, 1.0), own)] * 3 for name, own in here.items()}
        return seconds.check(times)

    assert told(1).ok and told(0.02).ok and told(50).ok, "another machine, or a loaded one"
    assert told(0.02, a=30, b=1 / 30).ok
    assert not told(1e-3).ok and not told(1, a=1e-3).ok and "a: " in told(1, a=1e-3).detail
    assert seconds.check({}).ok is None and seconds.check({"a": [(1.0, 0.0)]}).ok is None


def test_twins_have_weights_moved_in_the_last_place(folder: Path) -> None:
    with Store(folder / "store.sqlite") as store:
        cell = Cell.of(store.cells()["config"].iloc[0])
    plain, _ = Workshop(RESOURCES).network(cell)
    one, other = (Shaken(RESOURCES, number).network(cell)[0] for number in (1, 2))
    for weight, moved, again in zip(plain.parameters(), one.parameters(), other.parameters(), strict=True):
        gap = (weight - moved).abs()
        assert gap.max() > 0 and (gap <= 2.5e-7 * weight.abs()).all()
        assert not torch.equal(moved, again)


def test_verify_prints_what_it_found_and_keeps_a_record(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle.zip"
    shutil.copy(folder / "bundle.zip", bundle)
    command = ["verify", str(bundle), "--suite", str(folder / "suite.yaml"), "--sample", "0"]
    assert main(command) == 0
    assert "ok           metrics: " in (said := capsys.readouterr()).out and "luck" not in said.out
    assert main([*command, "--record", "--json"]) == 0
    said = capsys.readouterr()
    told = json.loads(said.out)
    assert told["ok"] and len(told["cells"]) == 17 and f"--seed {told['seed']}" in said.err
    with open_all([bundle]) as stores:
        table = defense_board(read(*stores)).table
    assert set(table["checked"]) == {"recomputed"}
    with open_all([folder / "bundle.zip"]) as stores:
        assert set(defense_board(read(*stores)).table["checked"]) == {"as submitted"}
    publish(folder / "store.sqlite", tmp_path / "other.zip")
    other = forge(folder, tmp_path, in_rows("psnr = psnr + 1"))
    shutil.copy(f"{bundle}.verified.json", f"{other}.verified.json")
    assert main(["leaderboard", str(other)]) == 2
    assert "is of another bundle" in capsys.readouterr().err
    assert main(["verify", str(other), *command[2:], "--record"]) == 1
    assert "refused: metrics" in capsys.readouterr().err
    with open_all([other]) as stores:
        assert set(defense_board(read(*stores)).table["checked"]) == {"as submitted"}


def test_a_suite_that_is_not_here_is_asked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(folder / "bundle.zip")]) == 1
    assert "give its file with --suite" in capsys.readouterr().out
