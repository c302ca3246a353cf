"""Private randomness follows a secret that no attack is given."""

from __future__ import annotations

import hashlib
import json
import textwrap
from pathlib import Path
from typing import Any

import pytest

from gradleak import registry, secret, suite
from gradleak.board.bundle import open_all, publish
from gradleak.board.results import read
from gradleak.board.store import Store
from gradleak.cli.main import main
from gradleak.errors import GradleakError
from gradleak.evaluation import runner
from gradleak.evaluation.evaluate import evaluate
from gradleak.evaluation.executors import Local
from gradleak.evaluation.workshop import Resources, Workshop
from gradleak.secret import Secret
from gradleak.suite import AttackCell, Cell, unnamed
from tests.test_identity import write_suite

GUARD = [{"name": "dp-sgd", "label": "dp-sgd", "options": {"sigma": 0.5, "clip": 1.0}}]
ONE, OTHER = Secret.of("1" * 32), Secret.of("2" * 32)

RESEEDING = """
    import hashlib, json
    from dataclasses import dataclass
    from pathlib import Path

    import torch

    from gradleak.attack import Attack, Reconstruction

    GUESSES = json.loads(Path({guesses!r}).read_text())


    def derive(*parts):
        return int.from_bytes(hashlib.sha256("\\x1f".join(map(str, parts)).encode()).digest()[:8], "big") >> 1


    @dataclass(frozen=True, kw_only=True)
    class Reseeding(Attack):
        '''Draws the client's noise again from what is public, subtracts it, and divides.'''

        family = "analytic"
        reference = "test"

        def reconstruct(self, observation, generator):
            n = observation.victims
            images = torch.full((n, 1, *observation.shape), 0.5, dtype=observation.dtype)
            for guess in GUESSES:
                for victim in range(n):
                    stream = torch.Generator().manual_seed(derive("client", *guess["context"], victim))
                    noise = {{
                        name: torch.randn(tensor[victim].shape, generator=stream, dtype=torch.float64).to(tensor)
                        for name, tensor in observation.message.items()
                    }}
                    clean = {{name: tensor[victim] - guess["scale"] * noise[name]
                              for name, tensor in observation.message.items()}}
                    if sum(tensor.square().sum() for tensor in clean.values()).sqrt() <= 1.01:
                        weight, bias = clean["2.weight"], clean["2.bias"]
                        found = (weight * bias[:, None]).sum(0) / bias.square().sum()
                        layer = observation.network.module[0]
                        images[victim] = found.view(1, *observation.shape) * layer.std + layer.mean
            return Reconstruction(images=images.clamp(0, 1))
"""


def reseeding(folder: Path, guesses: list[dict[str, Any]]) -> Path:
    (folder / "guesses.json").write_text(json.dumps(guesses))
    path = folder / "reseeding.py"
    path.write_text(textwrap.dedent(RESEEDING).format(guesses=str(folder / "guesses.json")))
    return path


def public_context(cell: AttackCell) -> list[Any]:
    """Return what the suite says of a cell, in the words that seeds are derived from."""
    bare = unnamed(cell.stored())
    bare["setting"].pop("grants")
    texts = []
    for part in ("dataset", "model", "setting", "defense"):
        bare[part].pop("code", None)
        texts.append(json.dumps(bare[part], sort_keys=True))
    return [cell.seed, *texts]


@pytest.mark.parametrize(("chosen", "caught"), [(None, False), (ONE, True)], ids=["of old", "with a secret"])
def test_a_clients_noise_cannot_be_drawn_again_from_what_is_public(
    tmp_path: Path, chosen: Secret | None, caught: bool
) -> None:
    path = write_suite(tmp_path, attacks=["mean-image"], defenses=GUARD)
    (cell,) = suite.attacking(suite.expand(suite.read(path), Workshop().digest))
    defense: Any = cell.built_defense
    context = public_context(cell)
    scale = defense.sigma * defense.clip
    digest = "" if chosen is None else chosen.digest
    guesses = [{"context": each, "scale": scale} for each in (context, ["", *context], [digest, *context])]
    registry.add_file(reseeding(tmp_path, guesses))
    path = write_suite(tmp_path, attacks=["reseeding"], defenses=GUARD)
    (attacked,) = suite.attacking(suite.expand(suite.read(path), Workshop().digest, secret=chosen))
    scores = [row.psnr or 0.0 for row in evaluate(attacked, Workshop()).rows]
    # Without a secret the trick has to work, or this test would show nothing.
    assert (max(scores) < 20) if caught else (min(scores) > 40), scores


def test_equal_secrets_give_equal_tables_and_others_do_not(tmp_path: Path) -> None:
    path = write_suite(tmp_path, defenses=[*GUARD, "sketch"], attacks=["mean-image"])
    found = {}
    for name, chosen in (("a", ONE), ("b", ONE), ("c", OTHER)):
        runner.run(path, tmp_path / f"{name}.sqlite", Local(), Resources(), secret=chosen)
        with Store(tmp_path / f"{name}.sqlite") as store:
            assert store.secret == chosen and store.secret.value == chosen.value
            rows = store.rows().sort_values(["defense", "victim"])
        found[name] = {guard: part["message_norm"].tolist() for guard, part in rows.groupby("defense")}
    assert found["a"] == found["b"] and found["a"]["dp-sgd"] != found["c"]["dp-sgd"]
    assert found["a"]["sketch"] == found["c"]["sketch"], "public randomness follows the suite's seed"


def test_stores_of_different_secrets_are_kept_apart_on_a_board(tmp_path: Path) -> None:
    path, stores = write_suite(tmp_path, defenses=GUARD), [tmp_path / "a.sqlite", tmp_path / "b.sqlite"]
    for store, chosen in zip(stores, (ONE, OTHER), strict=True):
        runner.run(path, store, Local(), Resources(), secret=chosen)
    with open_all(stores) as opened:
        merged = read(*opened)
    assert {setting for _, _, setting in merged.contexts} == {
        f"fedsgd (secret={each.digest[:8]})" for each in (ONE, OTHER)
    }


def test_a_store_keeps_its_secret_and_hands_it_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, first, second = write_suite(tmp_path, defenses=GUARD), tmp_path / "a.sqlite", tmp_path / "b.sqlite"
    run = ["run", str(path), "--executor", "local", "--store"]
    assert main([*run, str(first), "--secret", "3" * 32]) == 0 and main([*run, str(first)]) == 0
    publish(first, tmp_path / "b.zip")
    assert main([*run, str(second), "--secret", str(tmp_path / "b.zip")]) == 0
    capsys.readouterr()
    with Store(first) as one, Store(second) as two:
        assert one.secret == two.secret and one.statuses() == two.statuses()
    for given, says in (
        ("4" * 32, "has the secret"),
        ("short", "32 hexadecimal digits"),
        (str(path), "is not a SQLite file"),
    ):
        assert main([*run, str(first), "--secret", given]) == 2
        assert says in capsys.readouterr().err


def test_a_secret_is_drawn_for_each_store_and_stays_out_of_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    drawn = {secret.draw().value for _ in range(100)}
    assert len(drawn) == 100
    cell = next(iter(drawn))
    known = Secret.of(cell)
    assert cell not in repr(known) and known.digest not in cell
    assert known.digest == hashlib.sha256(f"gradleak secret {cell}".encode()).hexdigest()[:16]
    with pytest.raises(GradleakError, match="is not here"):
        _ = Secret(known.digest).value


def test_a_cell_without_its_secret_can_be_read_and_not_computed(tmp_path: Path) -> None:
    path = write_suite(tmp_path, defenses=GUARD)
    (cell,) = suite.attacking(suite.expand(suite.read(path), Workshop().digest, secret=ONE))
    assert ONE.value not in json.dumps(cell.stored())
    stranger = Cell.of(cell.stored())
    assert stranger.key == cell.key
    assert "is not here" in evaluate(stranger, Workshop()).error
    again, found = (evaluate(each, Workshop()) for each in (Cell.of(cell.stored(), secret=ONE), cell))
    assert [row.message_norm for row in again.rows] == [row.message_norm for row in found.rows]
