"""Clients attacked after rounds of training under the same defense: the model is that of the utility's own training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from gradleak import suite
from gradleak.evaluation import check
from gradleak.evaluation.evaluate import evaluate
from gradleak.evaluation.workshop import Resources, Workshop
from gradleak.federation import utility
from gradleak.report.verdict import of_setting


def _shop(tmp_path: Path) -> Workshop:
    return Workshop(Resources(cache=tmp_path / "cache"))


def _cells(tmp_path: Path, notes: list[suite.LeftOut] | None = None, **changes: Any) -> list[suite.AttackCell]:
    path = tmp_path / "moments.yaml"
    document = {
        "name": "moments",
        "victims": 2,
        "datasets": ["digits"],
        "models": [{"name": "mlp", "options": {"widths": [8]}, "label": "mlp"}],
        "settings": [
            {"name": "untrained", "batch_size": 8},
            {"name": "later", "batch_size": 8, "after_rounds": 15},
        ],
        "attacks": ["mean-image"],
        "defenses": [{"name": "dp-sgd", "options": {"sigma": 0.5}}, {"name": "outpost"}],
        "utility": {"clients": 4, "rounds": 30, "lr": [0.3]},
        **changes,
    }
    path.write_text(yaml.safe_dump(document))
    shop, found = _shop(tmp_path), [] if notes is None else notes
    return suite.attacking(check.check(suite.expand(suite.read(path), shop.digest, None, found.append), shop))


def test_the_attacked_model_is_that_of_training_under_the_defense(tmp_path: Path) -> None:
    cells = {(cell.defense.name, cell.setting.name): cell for cell in _cells(tmp_path)}
    later, untrained = cells["dp-sgd", "later"], cells["dp-sgd", "untrained"]
    assert later.before is not None and later.before.recipe.rounds == 15
    assert "before" not in untrained.stored() and "after_rounds" not in untrained.stored()["setting"]
    shop = _shop(tmp_path)
    start, chance = shop.network(untrained)
    module, accuracy = shop.network(later)
    trained = utility.train(start, shop.data(later.dataset), later.built_defense, later.before.recipe, later.seed)
    for name, weight in module.named_parameters():
        assert torch.equal(weight, trained.parameters[name])
        assert not torch.equal(weight, dict(start.named_parameters())[name])
    assert accuracy == trained.accuracy != chance
    other, _ = shop.network(cells["outpost", "later"])
    assert not torch.equal(next(other.parameters()), next(module.parameters())), "each defense has its own model"
    result = evaluate(later, shop)
    assert result.status == "ok" and result.provenance["model_accuracy"] == accuracy


def test_it_is_trained_once_and_kept(tmp_path: Path) -> None:
    (*_, cell) = _cells(tmp_path)
    assert cell.setting.after_rounds
    first, accuracy = _shop(tmp_path).network(cell)
    files = sorted((tmp_path / "cache").glob("under-defense-*"))
    assert len(files) == 1
    before = files[0].stat().st_mtime_ns
    second, again = _shop(tmp_path).network(cell)
    assert again == accuracy and files[0].stat().st_mtime_ns == before
    assert all(torch.equal(*pair) for pair in zip(first.parameters(), second.parameters(), strict=True))


def test_a_cell_is_what_its_training_was(tmp_path: Path) -> None:
    cells = [cell for cell in _cells(tmp_path) if cell.setting.after_rounds]
    faster = [
        cell
        for cell in _cells(tmp_path, utility={"clients": 4, "rounds": 30, "lr": [0.1]})
        if cell.setting.after_rounds
    ]
    for cell, other in zip(cells, faster, strict=True):
        again = suite.Cell.of(cell.stored())
        assert again.key == cell.key != other.key
        assert isinstance(again, suite.AttackCell) and again.before == cell.before


def test_a_schedule_is_where_the_round_is(tmp_path: Path) -> None:
    cells = {(cell.defense.name, cell.setting.name): cell for cell in _cells(tmp_path)}
    assert cells["outpost", "later"].built_defense.round == 15  # type: ignore[attr-defined]
    assert cells["outpost", "untrained"].built_defense.round == 0  # type: ignore[attr-defined]


def test_what_cannot_be_trained_is_left_out_with_the_reason(tmp_path: Path) -> None:
    notes: list[suite.LeftOut] = []
    cells = _cells(tmp_path, notes, defenses=["none", "diff2"])
    assert {(cell.defense.name, cell.setting.name) for cell in cells} == {
        ("none", "untrained"),
        ("none", "later"),
        ("diff2", "untrained"),
    }
    assert any(note.defense == "diff2" and "no model is trained" in note.reason for note in notes)


def test_the_moment_is_said_in_words() -> None:
    text = of_setting({"batch_size": 8, "after_rounds": 15, "rounds": 4}, ())
    assert "after 15 rounds of federated training under the same defense" in text
    assert "sends the result 4 times" in text and "sees these messages" in text
