"""What a grid leaves out: every reason is stored, with the labels of the boards, and none outlives its cause."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import yaml

from gradleak.board import results
from gradleak.board.bundle import open_all, publish
from gradleak.board.evidence import Evidence
from gradleak.board.left_out import note
from gradleak.board.store import Store
from gradleak.board.upkeep import check, prune, rescue
from gradleak.errors import GradleakError
from gradleak.evaluation import runner
from gradleak.evaluation.executors import Local
from gradleak.evaluation.workshop import Resources
from gradleak.suite import LeftOut

SUITE: dict[str, Any] = {
    "name": "tiny",
    "victims": 2,
    "candidates": 4,
    "tuning": True,
    "knowledge": ["oblivious"],
    "controls": "listed",
    "datasets": ["digits"],
    "models": [{"name": "mlp", "options": {"widths": [8]}, "label": "mlp"}],
    "settings": [{"name": "fedsgd", "grants": {"labels": "known"}}],
    "attacks": [
        {"name": "linear-leakage", "optional": True},
        {"name": "april", "optional": True},
        {"name": "lti", "optional": True},
        {"name": "ggl", "optional": True},
        {"name": "tract-inversion", "optional": True},
        {"name": "random-image", "only": {"defenses": ["none"]}},
        "mean-image",
    ],
    "defenses": ["none", "top-k"],
}


def _suite(folder: Path, **changes: Any) -> Path:
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump({**SUITE, **changes}))
    return path


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("left_out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADLEAK_CACHE", str(folder / "cache"))
        runner.run(_suite(folder), folder / "s.sqlite", Local(), Resources())
    return folder / "s.sqlite"


@pytest.fixture
def store(stored: Path, tmp_path: Path) -> Path:
    with contextlib.closing(sqlite3.connect(stored)) as database:
        database.execute("VACUUM INTO ?", (str(tmp_path / "s.sqlite"),))
    return tmp_path / "s.sqlite"


def _reasons(path: Path) -> dict[tuple[str, str], str]:
    with open_all([path]) as (opened,):
        found = opened.unsuited()
        labels = opened.cells()
    assert set(found["dataset"]) <= set(labels["dataset"]) == {"digits (tuning victims)"}
    assert set(found["model"]) <= {"mlp"} and set(found["setting"]) <= {"fedsgd"}
    return {(attack, defense): reason for attack, defense, *_, reason in found.itertuples(index=False, name=None)}


def test_every_reason_is_stored_and_a_suites_own_choice_is_none(stored: Path) -> None:
    found = _reasons(stored)
    assert {attack for attack, _ in found} == {"april", "ggl", "lti", "tract-inversion"}
    assert {defense for _, defense in found} == {"none", "top-k"}
    assert found["ggl", "none"] == "needs generator: true, which the setting does not grant"
    assert found["lti", "none"] == "needs parameters knowledge of the defense, which the suite does not give"
    assert "transformer" in found["april", "top-k"] and found["tract-inversion", "none"], found
    with Store(stored) as opened:
        chosen = opened.query("SELECT attack, defense, reason FROM left_out WHERE chosen")
    assert chosen == [("random-image", "top-k", "left out by the suite")]


def test_bundles_rescues_and_checks_keep_them(store: Path, tmp_path: Path) -> None:
    publish(store, tmp_path / "b.zip")
    rescue(store, tmp_path / "new.sqlite")
    assert _reasons(store) == _reasons(tmp_path / "b.zip") == _reasons(tmp_path / "new.sqlite")
    assert all(each.ok for each in check(tmp_path / "new.sqlite"))


def test_a_reason_ends_with_its_cause(store: Path, tmp_path: Path) -> None:
    resources, guess = Resources(), {"name": "random-image", "label": "april"}
    assert not runner.run(_suite(tmp_path), store, Local(), resources).ran
    with Store(store) as opened:
        assert len(opened.unsuited()) == 8
    runner.run(_suite(tmp_path, attacks=[guess, "linear-leakage"]), store, Local(), resources)
    assert {attack for attack, _ in _reasons(store)} == {"ggl", "lti", "tract-inversion"}


def test_pruned_cells_take_their_notes_along(store: Path) -> None:
    prune(store, lambda key, config: config["defense"]["name"] != "top-k")
    assert {defense for _, defense in _reasons(store)} == {"none"}


def test_an_older_store_has_none_and_gets_its_table(store: Path, tmp_path: Path) -> None:
    shutil.copy(store, tmp_path / "old.sqlite")
    with contextlib.closing(sqlite3.connect(tmp_path / "old.sqlite")) as database:
        database.execute("DROP TABLE left_out")
    with Store(tmp_path / "old.sqlite") as opened:
        assert not len(opened.unsuited())
        place = ("a", "none", "mlp", "digits", "fedsgd")
        note(opened, [LeftOut(*place, "", "no")], [])
        assert opened.unsuited()["reason"].tolist() == ["no"]
        note(opened, [], [place])
        assert not len(opened.unsuited())


@pytest.mark.parametrize("change", ["reason = 'a' || char(10) || 'b'", "reason = x'00'", "chosen = 7"])
def test_a_strangers_notes_are_looked_at(store: Path, change: str) -> None:
    with contextlib.closing(sqlite3.connect(store)) as database, database:
        database.execute(f"UPDATE left_out SET {change}")
    with pytest.raises(GradleakError, match="left out"), Store(store) as opened:
        opened.unsuited()
    assert not all(each.ok for each in check(store))


def test_a_defense_is_not_held_to_attacks_that_do_not_apply(stored: Path, tmp_path: Path) -> None:
    with Store(stored) as opened:
        found = Evidence(results.read(opened)).extents
    assert {place[-1]: (extent.faced, extent.expected) for place, extent in found.items()} == {
        "none": (1, 1),
        "top-k": (1, 1),
    }
