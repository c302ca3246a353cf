"""Epsilon of what an attacker sees and of a training run, and the noise that a wanted epsilon takes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from opacus.accountants import PRVAccountant, RDPAccountant
from scipy.optimize import brentq
from scipy.stats import norm

from gradleak import suite
from gradleak.defense import Defense
from gradleak.errors import GradleakError
from gradleak.evaluation.workshop import Workshop
from gradleak.knowledge import BatchNorm, Knowledge
from gradleak.privacy import Exposure, GaussianMechanism, Guarantee, noise_for
from gradleak.suite import build_defense
from gradleak.threat import Setting


def exact(multiplier: float, delta: float) -> float:
    """Epsilon of the Gaussian mechanism in closed form (Balle and Wang, ICML 2018, arXiv:1805.06530, theorem 8)."""

    def excess(epsilon: float) -> float:
        return float(
            norm.cdf(0.5 / multiplier - epsilon * multiplier)
            - math.exp(epsilon) * norm.cdf(-0.5 / multiplier - epsilon * multiplier)
            - delta
        )

    return float(brentq(excess, 0, 200))


def known(guarantee: Guarantee | None) -> Guarantee:
    assert guarantee is not None
    return guarantee


@pytest.mark.parametrize("multiplier", [0.6, 1.0, 3.73, 7.03])
@pytest.mark.parametrize("delta", [1e-5, 1e-3])
def test_one_message_has_the_closed_forms_epsilon(multiplier: float, delta: float) -> None:
    truth = exact(multiplier, delta)
    tight = GaussianMechanism(multiplier, delta, "prv").guarantee(Exposure())
    loose = GaussianMechanism(multiplier, delta, "rdp").guarantee(Exposure())
    # Opacus' PRV accountant is within 0.01 by default; Rényi's is an upper bound that is known to be loose.
    assert truth - 0.01 <= tight.epsilon <= truth + 0.02
    assert truth <= loose.epsilon <= 1.25 * truth + 0.15
    assert tight.noise == multiplier


@pytest.mark.parametrize("sums", [1, 4, 9])
@pytest.mark.parametrize("messages", [1, 3])
def test_messages_compose_and_a_sum_has_the_noise_of_all_its_clients(sums: int, messages: int) -> None:
    # M messages with noise s tell as much as one with s / sqrt(M); a sum of n has noise s * sqrt(n).
    seen = GaussianMechanism(1.5, 1e-5).summed(sums).guarantee(Exposure(messages))
    accountant = RDPAccountant()
    accountant.history = [(1.5 * math.sqrt(sums / messages), 1.0, 1)]
    assert seen.epsilon == pytest.approx(accountant.get_epsilon(delta=1e-5), rel=1e-6)
    assert ("sum" in seen.unit) == (sums > 1)
    assert seen.unit.startswith("one example added or removed, ")


@pytest.mark.filterwarnings("ignore:divide by zero")  # Opacus' own, of log(1 - q)
@pytest.mark.parametrize(
    "wanted, delta, rate, steps, accountant",
    [
        (8.0, 1e-5, 0.01, 1000, "rdp"),
        (1.0, 1e-5, 0.1, 200, "rdp"),
        (3.0, 1e-6, 1.0, 12, "rdp"),
        (8, 1e-5, 1.0, 1, "prv"),
    ],
)
def test_the_noise_that_is_found_reaches_the_wanted_epsilon(
    wanted: float, delta: float, rate: float, steps: int, accountant: Any
) -> None:
    sigma = noise_for(wanted, delta, Exposure(steps, rate), accountant)
    assert sigma == noise_for(wanted, delta, Exposure(steps, rate), accountant)
    own = (RDPAccountant if accountant == "rdp" else PRVAccountant)()
    own.history = [(sigma, rate, steps)]
    assert wanted * 0.99 <= own.get_epsilon(delta=delta) <= wanted
    # Of a sum of n clients each adds a share: the noise of the sum is the same.
    assert noise_for(wanted, delta, Exposure(steps, rate, 4), accountant) == pytest.approx(sigma / 2, abs=1.1e-4)


@pytest.mark.parametrize("name", ["dp-sgd", "gaussian-noise", "sketch"])
def test_epsilon_in_place_of_sigma(name: str) -> None:
    defense = build_defense(name, {"epsilon": 4.0, "clip": 1.0})
    found = defense.calibrated(Setting(), Exposure(5))
    assert known(found.run_guarantee(Setting(), 1.0, 5)).epsilon == pytest.approx(4.0, rel=1e-2)
    assert found.calibrated(Setting(), Exposure(50)) == found, "noise that was found stays"
    # Without a run of a suite: the defense's own.
    assert known(defense.run_guarantee(Setting())).epsilon == pytest.approx(4.0, rel=1e-2)


@pytest.mark.parametrize("options", [{"mechanism": "laplace"}, {}])
def test_no_epsilon_can_be_asked_for_where_there_is_none(options: dict[str, Any]) -> None:
    setting = Setting() if options else Setting(local_lr=0.1)
    with pytest.raises(GradleakError, match="epsilon needs clip, Gaussian noise"):
        build_defense("dp-sgd", {"epsilon": 8.0, **options}).calibrated(setting)
    with pytest.raises(GradleakError, match="no noise is enough"):
        build_defense("gaussian-noise", {"epsilon": 1e-9, "delta": 1e-12}).calibrated(Setting())


def test_a_sum_is_what_the_server_sees() -> None:
    alone = build_defense("dp-sgd", {"sigma": 0.6})
    summed = build_defense(
        "dp-sgd + secure-aggregation", {"dp-sgd": {"sigma": 0.6}, "secure-aggregation": {"clients": 4}}
    )
    for defense, noise in ((alone, 0.6), (summed, 1.2)):
        seen, run = known(defense.guarantee(Setting())), known(defense.run_guarantee(Setting(), 1.0, 3))
        assert seen.noise == run.noise == pytest.approx(noise)
        assert seen.epsilon == known(build_defense("dp-sgd", {"sigma": noise}).guarantee(Setting())).epsilon
    wanted = build_defense(
        "dp-sgd + secure-aggregation", {"dp-sgd": {"epsilon": 8.0}, "secure-aggregation": {"clients": 4}}
    )
    found = wanted.calibrated(Setting(), Exposure(3))
    assert known(found.run_guarantee(Setting(), 1.0, 3)).epsilon == pytest.approx(8.0, rel=1e-2)
    assert known(found.guarantee(Setting())).noise == pytest.approx(noise_for(8.0, 1e-5, Exposure(3)), abs=2.1e-4)


def test_what_has_no_noise_has_no_guarantee() -> None:
    defense = build_defense("dp-sgd", {})
    shown = Setting(grants=Knowledge(batch_norm=BatchNorm.BATCH))
    assert defense.guarantee(shown) is None, "statistics of the batch are seen, and have no noise"
    assert build_defense("mixup + dp-sgd", {}).guarantee(Setting()) is None, "an example is in several gradients"
    assert build_defense("augmentation + dp-sgd", {}).guarantee(Setting()) is not None
    assert known(defense.guarantee(Setting(rounds=4))).epsilon > known(defense.guarantee(Setting())).epsilon


class Odd(Defense):
    """A defense with an accountant of its own."""

    family, reference = "noise", "none"

    def guarantee(self, setting: Setting) -> Guarantee:
        return Guarantee(0.5, 0.0, "own", "one example replaced, one message")


def test_an_accountant_of_ones_own_counts_in_a_chain() -> None:
    from gradleak.chain import Chain

    chain = Chain((build_defense("gaussian-noise", {}), Odd()))
    assert known(chain.guarantee(Setting())).accountant == "own"


def _suite(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "wanted.yaml"
    document = {
        "name": "wanted",
        "victims": 2,
        "datasets": ["digits"],
        "models": ["linear"],
        "settings": [{"name": "one", "batch_size": 1}, {"name": "four", "batch_size": 4}],
        "attacks": ["idlg"],
        "defenses": [{"dp-sgd": {"epsilon": 8.0}}],
        "utility": {"clients": 4, "rounds": 200},
        **changes,
    }
    path.write_text(yaml.safe_dump(document))
    return path


def test_a_suite_resolves_epsilon_over_its_training_run(tmp_path: Path) -> None:
    shop = Workshop()
    cells = suite.expand(suite.read(_suite(tmp_path)), shop.digest)
    images = len(shop.data(suite.Part("digits")).split.train)
    found = {}
    for cell in cells:
        options, size = cell.defense.options, cell.setting.batch_size
        assert options["epsilon"] == 8.0, "what was asked for is kept beside what it took"
        found[size] = options["sigma"]
        passes = suite.Utility(clients=4, rounds=200, batch_size=size).participations(images)
        assert options["sigma"] == noise_for(8.0, 1e-5, Exposure(passes))
        assert known(cell.built_defense.run_guarantee(cell.setting, 1.0, passes)).epsilon == pytest.approx(8, rel=1e-2)
        again = suite.Cell.of(cell.stored())
        assert again.key == cell.key and again.built_defense == cell.built_defense
    assert {type(cell) for cell in cells} == {suite.AttackCell, suite.TrainingCell}
    assert found[4] > found[1], "larger batches see an example more often"
    plain = suite.expand(suite.read(_suite(tmp_path, defenses=["dp-sgd"])), shop.digest)
    assert "epsilon" not in plain[0].defense.options, "cells that ask for no epsilon keep their keys"


def test_noise_that_was_found_makes_no_other_defense() -> None:
    from gradleak.board.labels import options_of

    def config(options: Any) -> dict[str, Any]:
        return {"defense": {"name": "dp-sgd", "options": options}}

    for wrapped in (lambda own: own, lambda own: {"dp-sgd": own}, lambda own: [{}, own]):
        one, other = (config(wrapped({"epsilon": 8.0, "sigma": sigma, "clip": 1.0})) for sigma in (0.7, 0.9))
        assert options_of(one, "defense") == options_of(other, "defense")
        given = [options_of(config(wrapped({"sigma": sigma})), "defense") for sigma in (0.7, 0.9)]
        assert given[0] != given[1]


@pytest.mark.parametrize(
    "defense", [{"dp-sgd": {"epsilon": 8, "sigma": 1}}, {"sketch + dp-sgd": {"dp-sgd": {"epsilon": 8, "sigma": 1}}}]
)
def test_sigma_or_epsilon_not_both(tmp_path: Path, defense: Any) -> None:
    with pytest.raises(GradleakError, match=r"defenses\[0\]: epsilon: .* give one of the two"):
        suite.read(_suite(tmp_path, defenses=[defense]))
