"""The suites that come along: they can be read, cover what they say, and their claims name what they run."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import pytest
import yaml

from gradleak import registry, suite
from gradleak.evaluation import check
from gradleak.evaluation.workshop import Resources, Workshop
from gradleak.report.reproduction import read_reported
from gradleak.suite import AttackCell, Cell

ROOT = Path(__file__).parents[1] / "benchmarks"
SUITES = sorted(ROOT.rglob("*.yaml"))


@functools.cache
def cells(path: Path) -> list[Cell]:
    return suite.expand(suite.read(path), lambda name, options: ("1", "0"))


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_claims_name_what_the_suite_runs(path: Path) -> None:
    content = suite.read(path)
    found = [cell.stored() for cell in cells(path) if isinstance(cell, AttackCell)]
    labels = {axis: {config[axis]["label"] for config in found} for axis in ("attack", "defense", "model", "dataset")}
    labels |= {"setting": {config["setting"]["name"] for config in found}, "knowledge": set(content.knowledge)}
    for item in read_reported(path):
        for where in (item.where, {**item.where, **item.minus}):
            for axis, label in where.items():
                assert label in labels[axis], f"{item.claim}: {axis} {label}"


@pytest.mark.parametrize("name", ["field", "images", "small", "standard"])
def test_boards_cover_every_family_of_attacks_and_every_defense(name: str) -> None:
    found = [cell.stored() for cell in cells(ROOT / f"{name}.yaml") if isinstance(cell, AttackCell)]
    attacks = {config["attack"]["name"] for config in found}
    families = {registry.build("attacks", attack).family for attack in registry.names("attacks")}
    assert {registry.build("attacks", attack).family for attack in attacks} == families
    single = {part for config in found for part in config["defense"]["name"].split(" + ")}
    # Those that look at the model are the plain update where the server is honest.
    looking = {name for name in registry.names("defenses") if registry.build("defenses", name).inspectors}
    assert single == set(registry.names("defenses")) - looking


def read_outs() -> set[str]:
    """Attacks that need a malicious server."""
    return {name for name in registry.names("attacks") if registry.build("attacks", name).needs.server != "honest"}


def test_the_standard_board_runs_every_attack() -> None:
    found = {cell.attack.name for cell in cells(ROOT / "standard.yaml") if isinstance(cell, AttackCell)}
    assert set(registry.names("attacks")) - found == read_outs()


def test_the_front_pages_picture_is_of_photographs_that_no_attack_has_seen(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("picture", ROOT / "picture.py")
    assert spec is not None and spec.loader is not None
    picture = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(picture)
    picture.squares(tmp_path / "photographs")
    (tmp_path / "picture.yaml").write_text(yaml.safe_dump(picture.SUITE))
    shop = Workshop(Resources(data_root=tmp_path))
    found = suite.attacking(check.check(suite.expand(suite.read(tmp_path / "picture.yaml"), shop.digest), shop))
    assert {cell.defense.label for cell in found} >= {"none", "dp-sgd"}
    assert not any(cell.setting.grants.auxiliary for cell in found)
    images, _ = shop.victims_of(found[0])
    assert images.shape == (picture.VICTIMS, 1, 3, picture.SIDE, picture.SIDE)
    assert images.std(axis=(1, 3, 4)).min() > 0.02, "colour photographs, none of them flat"


def test_the_malicious_board_runs_every_server_read_out_and_detection() -> None:
    found = [cell for cell in cells(ROOT / "malicious.yaml") if isinstance(cell, AttackCell)]
    assert {cell.setting.server.name for cell in found} == set(registry.names("servers"))
    assert read_outs() <= {cell.attack.name for cell in found}
    looking = {name for name in registry.names("defenses") if registry.build("defenses", name).inspectors}
    assert looking <= {cell.defense.name for cell in found}
