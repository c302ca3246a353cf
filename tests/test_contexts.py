"""Suites that list their contexts: the cells they span, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from gradleak import suite
from gradleak.errors import GradleakError
from gradleak.evaluation import tuning

FIRST: dict[str, Any] = {
    "dataset": "digits",
    "model": {"name": "mlp", "options": {"widths": [16]}, "label": "mlp"},
    "setting": {"name": "fedsgd", "grants": {"labels": "known"}},
}
SECOND: dict[str, Any] = {
    "dataset": "photos",
    "model": "lenet",
    "setting": {"name": "4 images", "batch_size": 4, "grants": {"labels": "known"}},
    "victims": 3,
    "seeds": [0, 1],
    "knowledge": ["public"],
    "defenses": ["sparse", "mixup"],
    "attacks": ["dlg", {"name": "inverting-gradients", "options": {"iterations": 9}, "label": "ig"}],
    "budgets": {"dlg": 7, "ig": {"tv": 0.5}},
}
SUITE: dict[str, Any] = {
    "name": "two",
    "victims": 2,
    "controls": "listed",
    "contexts": [FIRST, SECOND],
    "attacks": [{"name": "linear-leakage", "only": {"models": ["mlp"]}}, "dlg"],
    "defenses": [
        "none",
        {"name": "top-k", "options": {"ratio": 0.1}, "label": "sparse", "only": {"settings": ["4 images"]}},
    ],
}


def _digest(name: str, options: Mapping[str, Any]) -> tuple[str, str, int]:
    return "1", f"digest of {name}", 100


def _expand(folder: Path, content: Any) -> list[suite.AttackCell]:
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(content))
    return suite.attacking(suite.expand(suite.read(path), _digest))


def _with(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(SUITE), **changes}


def test_a_context_has_what_it_says_and_the_rest_from_the_suite(tmp_path: Path) -> None:
    cells = _expand(tmp_path, SUITE)
    first, second = ([cell for cell in cells if cell.dataset.name == name] for name in ("digits", "photos"))
    assert cells == [*first, *second], "contexts run in the order of the file"
    assert {(cell.attack.name, cell.defense.label) for cell in first} == {("linear-leakage", "none"), ("dlg", "none")}
    assert {(cell.attack.label, cell.defense.label) for cell in second} == {
        (attack, defense) for attack in ("dlg", "ig") for defense in ("sparse", "mixup")
    }
    assert {(cell.victims, cell.seed) for cell in first} == {(2, 0)}
    assert {(cell.victims, cell.seed) for cell in second} == {(3, 0), (3, 1)}
    assert {cell.knowledge.value for cell in second} == {"public"}
    budgets = {cell.attack.label: cell.attack.options for cell in second}
    assert budgets["dlg"]["iterations"] == 7
    assert (budgets["ig"]["iterations"], budgets["ig"]["tv"]) == (9, 0.5)
    assert {cell.attack.options["iterations"] for cell in first if cell.attack.name == "dlg"} == {1200}


def test_a_context_and_a_grid_of_one_name_the_same_cells(tmp_path: Path) -> None:
    alone = _expand(tmp_path, _with(contexts=[FIRST], defenses=["none"]))
    axes = {"datasets": [FIRST["dataset"]], "models": [FIRST["model"]], "settings": [FIRST["setting"]]}
    grid = {key: value for key, value in _with(defenses=["none"], **axes).items() if key != "contexts"}
    assert [cell.key for cell in alone] == [cell.key for cell in _expand(tmp_path, grid)]


def test_ensembles_bring_their_members_to_every_context_and_have_budgets_there(tmp_path: Path) -> None:
    budgets = {"idlg": 5, "gauss-newton": {"restarts": 1, "iterations": 3}}
    content = _with(contexts=[FIRST, {**SECOND, "attacks": ["auto-v2"], "budgets": budgets}], attacks=["auto-v2"])
    cells = _expand(tmp_path, content)
    idlg = {cell.dataset.name: cell.attack.options["iterations"] for cell in cells if cell.attack.name == "idlg"}
    assert idlg["photos"] == 5 != idlg["digits"]
    assert {cell.attack.name for cell in cells if cell.dataset.name == "photos"} >= {"decoded-spear", "gauss-newton"}


def test_training_under_defenses_is_a_contexts_own_matter(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump(_with(contexts=[FIRST, {**SECOND, "utility": None}], utility={"rounds": 3})))
    trained = [cell for cell in suite.expand(suite.read(path), _digest) if isinstance(cell, suite.TrainingCell)]
    assert {cell.dataset.name for cell in trained} == {"digits"}


def test_tuning_is_on_all_contexts(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump(_with(tuning=True)))
    found = _expand(tmp_path, tuning._with_attack(path, "dlg", {"iterations": 4}))
    assert {cell.dataset.name for cell in found} == {"digits", "photos"}
    assert {cell.attack.options["iterations"] for cell in found} == {4}


def _second(suite_: dict[str, Any], **changes: Any) -> None:
    suite_["contexts"][1] = {**suite_["contexts"][1], **changes}


def _renamed(suite_: dict[str, Any]) -> None:
    suite_["defenses"].pop()
    _second(suite_, setting={"name": "fedsgd", "batch_size": 4}, defenses=["none"])


REFUSED: list[tuple[str, Callable[[dict[str, Any]], object], list[str]]] = [
    ("both", lambda s: s.update(datasets=["digits"]), ["datasets: every context names its own"]),
    ("neither", lambda s: s.pop("contexts"), ["datasets: field required, or contexts"]),
    ("key", lambda s: _second(s, victms=3), ["contexts[1]", "'victms'", "did you mean 'victims'"]),
    ("no dataset", lambda s: s["contexts"][1].pop("dataset"), ["contexts[1].dataset", "field required"]),
    ("unknown model", lambda s: _second(s, model="lennet"), ["contexts[1]: model: unknown", "'lenet'"]),
    ("option of a model", lambda s: _second(s, model={"lenet": {"wdth": 3}}), ["contexts[1]: model", "'wdth'"]),
    (
        "setting",
        lambda s: _second(s, setting={"name": "4 images", "batchsize": 2}),
        ["contexts[1]: setting", "'batchsize'"],
    ),
    ("label", lambda s: _second(s, defenses=["spars"]), ["contexts[1]: defenses[0]", "unknown defense 'spars'"]),
    ("victims", lambda s: _second(s, victims=0), ["contexts[1].victims", "greater than or equal to 1"]),
    ("level", lambda s: _second(s, knowledge=["all"]), ["contexts[1]: knowledge[0]", "'all'"]),
    ("budget of nothing", lambda s: _second(s, budgets={"gifd": 3}), ["contexts[1]: budgets", "'gifd'", "dlg, ig"]),
    ("budget", lambda s: _second(s, budgets={"dlg": "long"}), ["contexts[1].budgets.dlg", "dictionary", "long"]),
    ("option of a budget", lambda s: _second(s, budgets={"dlg": {"steps": 3}}), ["contexts[1]: attacks[0]", "'steps'"]),
    ("utility", lambda s: _second(s, utility={"runds": 3}), ["contexts[1].utility", "'runds'", "'rounds'"]),
    (
        "twice",
        lambda s: s["contexts"].append(FIRST),
        ["contexts[2]: has the dataset, model and setting of contexts[0]"],
    ),
    (
        "one label of two models",
        lambda s: _second(s, model={"name": "lenet", "label": "mlp"}),
        ["contexts[1]: model 'mlp' is another one in contexts[0]"],
    ),
    (
        "one name of two settings",
        _renamed,
        ["contexts[1]: setting 'fedsgd' is another one in contexts[0]"],
    ),
    (
        "only of a label that no context has",
        lambda s: s.update(attacks=[{"name": "dlg", "only": {"models": ["vit"]}}]),
        ["attacks[0].only.models", "'vit'", "lenet, mlp"],
    ),
]


@pytest.mark.parametrize(("change", "words"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refusals_say_where_what_and_what_is_allowed(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], words: list[str]
) -> None:
    content = copy.deepcopy(SUITE)
    change(content)
    with pytest.raises(GradleakError) as caught:
        _expand(tmp_path, content)
    text = str(caught.value)
    assert text.startswith(f"suite {tmp_path}") and "\n" not in text
    for word in words:
        assert word in text, text
