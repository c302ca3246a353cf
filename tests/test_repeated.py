"""Several messages of one client: what they tell together is what the noise leaves, and epsilon says so."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from gradleak import registry, suite
from gradleak.chain import Chain
from gradleak.defense import Defense, Loss, Memory, Message, Public
from gradleak.evaluation import check
from gradleak.evaluation.evaluate import evaluate
from gradleak.evaluation.workshop import Workshop
from gradleak.repeated import Repeated, refusal, repeated
from gradleak.suite import build_defense
from gradleak.threat import Setting
from gradleak.update import Update, flatten

ROUNDS = 4


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def update(seed: int = 0) -> Update:
    return {"w": torch.randn(30, 20, generator=seeded(seed), dtype=torch.float64)}


def no_loss(step: Update) -> Tensor:
    return torch.zeros(())


def test_it_answers_every_public_member_of_a_defense() -> None:
    members = {name for name, _ in inspect.getmembers(Defense) if not name.startswith("_")}
    members |= {name for name in Defense.__annotations__ if not name.startswith("_")}
    # Asked of each of the `inspectors` by itself, and what concerns options before there is a defense.
    members -= {"inspect", "false_alarms", "renamed"}
    assert members - {field.name for field in fields(Defense)} <= set(vars(Repeated)), members - set(vars(Repeated))
    assert repeated(build_defense("none", {}), 1) == build_defense("none", {})


def test_every_message_has_randomness_of_its_own() -> None:
    defense = Repeated(build_defense("sketch", {"ratio": 0.2, "sigma": 0.1}), ROUNDS)
    public = defense.public(update(), 2, seeded())
    message = defense.protect(update(), public, seeded(1))
    rows = [message[f"{index} sketch"] for index in range(ROUNDS)]
    assert len({float(row.sum()) for row in rows}) == ROUNDS
    again = [
        defense.defense.nll(
            {"sketch": rows[index]},
            {"sketch": defense.simulate(update(2), public)[f"{index} sketch"]},
            {name.removeprefix(f"{index} "): each for name, each in public.items() if name.startswith(f"{index} ")},
        )
        for index in range(ROUNDS)
    ]
    torch.testing.assert_close(defense.nll(message, defense.simulate(update(2), public), public), sum(again))
    assert defense.pack(message, public) == defense.defense.pack({"sketch": rows[0]}, {})


@pytest.mark.parametrize("name", ["dp-sgd", "gaussian-noise", "dp-sgd + secure-aggregation"])
def test_noise_averages_out_as_its_deviation_over_the_root(name: str) -> None:
    options = {"sigma": 2.0, "clip": 1.0}
    defense = Repeated(build_defense(name, {"dp-sgd": options} if "+" in name else options), 16)
    clipped = defense.per_example(update(), {})
    public = defense.public(clipped, 4, seeded())
    sent = defense.protect(clipped, public, seeded(3))
    noise = flatten(defense.decode(sent, public)) - flatten(clipped)
    # 2.0 * 1.0 / 4 images over the root of 16 rounds.
    assert float(noise.std()) == pytest.approx(0.125, rel=5 / math.sqrt(2 * len(noise)))


def test_the_mean_is_sufficient_for_gaussian_noise() -> None:
    # Differences of the likelihood between guesses are those of the mean message with sigma / sqrt(R).
    once = build_defense("gaussian-noise", {"sigma": 3.0})
    defense, finer = Repeated(once, ROUNDS), build_defense("gaussian-noise", {"sigma": 3.0 / math.sqrt(ROUNDS)})
    public, single = defense.public(update(), 1, seeded()), finer.public(update(), 1, seeded())
    message = defense.protect(update(), public, seeded(1))
    mean = defense.decode(message, public)

    def square(guess: Update, sent: Message, of: Defense, known: Public) -> float:
        return float(of.residual(sent, of.simulate(guess, known), known).square().sum())

    guesses = [update(seed) for seed in range(3)]
    many = [square(guess, message, defense, public) for guess in guesses]
    one = [square(guess, mean, finer, single) for guess in guesses]
    assert [each - many[0] for each in many] == pytest.approx([each - one[0] for each in one], rel=1e-5, abs=1e-5)
    assert float(defense.noise_floor(message, public)) == ROUNDS * float(once.noise_floor(update(), {}))


@dataclass(frozen=True, kw_only=True)
class Memoised(Defense):
    """Noise that a client draws once and sends again and again (memoisation, as of RAPPOR)."""

    family, reference = "noise", "arXiv:1407.6981"

    def release_next(
        self, update: Update, public: Public, generator: torch.Generator, loss: Loss, memory: Memory
    ) -> tuple[Message, Memory]:
        noise = memory or {name: torch.randn(tensor.shape, generator=generator) for name, tensor in update.items()}
        return {name: tensor + noise[name] for name, tensor in update.items()}, noise


def test_what_a_client_remembers_goes_from_message_to_message() -> None:
    defense = Repeated(Memoised(), 16)
    message, _ = defense.release_next(update(), {}, seeded(), no_loss, None)
    alone, _ = Memoised().release_next(update(), {}, seeded(), no_loss, None)
    torch.testing.assert_close(defense.decode(message, {}), alone)


@pytest.mark.parametrize(
    "name, options, reason",
    [
        ("dropout", {}, "draws anew"),
        ("mixup", {}, "draws anew"),
        ("sketch", {"clip": 1.0, "sigma": 1.0}, "clips under each round's own"),
        ("dgc", {}, "remembers"),
        ("sketch", {}, None),
        ("dp-sgd", {}, None),
        ("soteria", {}, None),
        ("qsgd", {}, None),
        ("random-k + secure-aggregation", {}, None),
    ],
)
def test_what_is_not_modelled_is_refused(name: str, options: dict[str, Any], reason: str | None) -> None:
    from gradleak.federation import client
    from gradleak.model import initialise

    defense = build_defense(name, options)
    module = initialise(registry.build("models", "mlp", {"widths": (8,)}), (1, 8, 8), 10, 0)
    network = client.client_network(module, defense, Setting(batch_size=4))
    found = refusal(
        defense,
        network.module,
        dict(network.parameters),
        torch.rand(4, 1, 8, 8, generator=seeded()),
        torch.eye(10)[:4],
    )
    assert found is None if reason is None else reason in str(found)


def _cells(tmp_path: Path, rounds: int, sigma: float, attacks: list[Any], **changes: Any) -> list[suite.AttackCell]:
    path = tmp_path / "rounds.yaml"
    document = {
        "name": "rounds",
        "victims": 6,
        "controls": "listed",
        "datasets": ["digits"],
        "models": [{"name": "mlp", "options": {"widths": [32]}, "label": "mlp"}],
        "settings": [{"name": "several", "rounds": rounds, "grants": {"labels": "known"}}],
        "attacks": attacks,
        "defenses": [{"gaussian-noise": {"sigma": sigma, "clip": 1.0}}],
        **changes,
    }
    path.write_text(yaml.safe_dump(document))
    shop = Workshop()
    cells = suite.attacking(check.check(suite.expand(suite.read(path), shop.digest), shop))
    assert len(cells) >= len(attacks)
    return cells


def _psnr(cell: suite.AttackCell) -> float:
    result = evaluate(cell, Workshop())
    assert result.status == "ok", result.error
    return sum(row.psnr for row in result.rows if row.psnr is not None) / len(result.rows)


def test_leakage_at_r_rounds_is_that_at_sigma_over_the_root_of_r(tmp_path: Path) -> None:
    attacks = [{"inverting-gradients": {"iterations": 150, "tv": 0.0}}, {"linear-leakage": {}}]
    many = _cells(tmp_path, 16, 0.04, attacks)
    finer = _cells(tmp_path, 1, 0.01, attacks)
    alone = _cells(tmp_path, 1, 0.04, attacks)
    assert len({cell.key for cell in (*many, *finer, *alone)}) == len(many) + len(finer) + len(alone)
    for several, one, first in zip(many, finer, alone, strict=True):
        assert (several.attack.name, several.knowledge) == (one.attack.name, one.knowledge)
        leaks = [_psnr(cell) for cell in (several, one, first)]
        assert leaks[0] == pytest.approx(leaks[1], abs=1.0), several.title
        assert leaks[0] > leaks[2] + 3, several.title


def test_several_messages_are_said_and_accounted_for(tmp_path: Path) -> None:
    (cell, *_), (one, *_) = (_cells(tmp_path, rounds, 2.0, ["mean-image"]) for rounds in (9, 1))
    assert cell.stored()["setting"]["rounds"] == 9
    assert "rounds" not in one.stored()["setting"], "cells of one message keep their keys"
    result, single = evaluate(cell, Workshop()), evaluate(one, Workshop())
    seen, expected = result.provenance["epsilon"], build_defense("gaussian-noise", {"sigma": 2.0 / 3})
    guarantee = expected.guarantee(Setting())
    assert guarantee is not None and seen["epsilon"] == pytest.approx(guarantee.epsilon, rel=1e-6)
    assert "9 messages" in seen["unit"]
    assert result.provenance["bytes"] == single.provenance["bytes"]


def test_a_defense_that_cannot_be_repeated_is_left_out_with_the_reason(tmp_path: Path) -> None:
    notes: list[suite.LeftOut] = []
    path = tmp_path / "rounds.yaml"
    _cells(tmp_path, 2, 1.0, ["mean-image"])
    document = yaml.safe_load(path.read_text()) | {"defenses": ["dropout"]}
    document["attacks"] = [{"name": "inverting-gradients", "optional": True}]
    path.write_text(yaml.safe_dump(document))
    shop = Workshop()
    assert not check.check(suite.expand(suite.read(path), shop.digest), shop, notes.append)
    assert notes and all("draws anew" in note.reason for note in notes)


def test_a_chain_is_repeated_as_a_whole() -> None:
    chain = Chain((build_defense("sketch", {"ratio": 0.2}), build_defense("gaussian-noise", {"clip": None})))
    defense = Repeated(chain, 2)
    public = defense.public(update(), 1, seeded())
    message = defense.protect(update(), public, seeded())
    assert message.keys() == {"0 sketch", "1 sketch"}
    assert defense.decode(message, public)["w"].shape == (30, 20)
    assert replace(defense, rounds=3).at_round(1, 0).rounds == 3
