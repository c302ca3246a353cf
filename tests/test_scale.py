"""Total variation in units of the objective's range: what the unit is, and that it makes a weight free of scale."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from gradleak import registry
from gradleak.attacks.inverting_gradients import InvertingGradients
from gradleak.dataset import Data, Images
from gradleak.defense import View
from gradleak.engine.backends import BACKENDS
from gradleak.errors import GradleakError
from gradleak.model import initialise
from gradleak.seeds import Generators
from gradleak.testing import Scene, reconstruct
from gradleak.threat import Compute, Observation, Setting
from gradleak.update import Update, one_hot

FACTOR = 1024.0  # a power of two, so that it moves no digit


@dataclass(frozen=True, kw_only=True)
class Louder(InvertingGradients):
    """The same objective in other units."""

    def distance(self, guess: Update, observed: Update) -> Tensor:
        """So many times the cosine distance."""
        return FACTOR * super().distance(guess, observed)


def seen(
    defense: str = "none", public: bool = True, options: dict[str, float] | None = None
) -> tuple[Observation, Data]:
    data = Data(registry.build("datasets", "digits"), "digits")
    images, labels = data.victims(3, 1, tuning=True)
    guard = registry.build("defenses", defense, options or {})
    model = registry.build("models", "lenet", {"activation": "tanh", "initialisation": "default"})
    setting = Setting(precision="float64")
    module = initialise(model, data.shape, data.classes, 0)
    scene = Scene.of(module, images.double(), labels, guard, setting, data.classes)
    observation = replace(scene.observe(), view=View(guard, scene.sent.public))
    return replace(observation, auxiliary=data.split.train if public else None), data


def range_of(observation: Observation, attack: InvertingGradients) -> Tensor:
    """The unit [N] that an attack finds."""
    from gradleak.search import scale

    facts, problem = attack.facts(observation), attack.problem(observation)
    row = attack.begin(observation, Generators(["a", "b", "c"], dtype=torch.float64))
    return scale.ranges(observation, problem, facts, row, observation.view)


@pytest.mark.parametrize(
    ("defense", "options"), [("none", {}), ("sketch", {"ratio": 0.2}), ("gaussian-noise", {"sigma": 1e-4, "clip": 1.0})]
)
def test_the_unit_is_what_the_mean_image_loses_to_the_truth(defense: str, options: dict[str, float]) -> None:
    observation, data = seen(defense, options=options)
    attack = InvertingGradients(tv_unit="range")
    found = range_of(observation, attack)
    truth, labels = data.victims(3, 1, tuning=True)
    targets = one_hot(labels, data.classes, torch.float64)
    mean = data.split.train.images.mean(0).double().expand_as(truth)
    apart = attack.loss(observation, mean, targets, {}) - attack.loss(observation, truth.double(), targets, {})
    assert ((found / apart).log().abs() < 1.2).all(), (found, apart)


def test_the_unit_is_of_that_size_without_public_images_too() -> None:
    known, blind = (range_of(seen(public=public)[0], InvertingGradients(tv_unit="range")) for public in (True, False))
    assert ((known / blind).log().abs() < 1.2).all(), (known, blind)


@pytest.mark.parametrize("unit", ("loss", "range"))
@pytest.mark.parametrize("defense", ("none", "gaussian-noise"))
def test_every_backend_weighs_variation_alike(unit: str, defense: str) -> None:
    observation, _ = seen(defense, options={} if defense == "none" else {"sigma": 1e-4, "clip": 1.0})
    attack = registry.build("attacks", "inverting-gradients", {"tv": 3.0, "tv_unit": unit, "iterations": 2})
    for backend in BACKENDS:
        found = reconstruct(attack, replace(observation, compute=Compute(backend=backend)))
        assert (found.backend, found.backend_reason) == (backend, "")


def test_the_unit_does_not_depend_on_the_message() -> None:
    observation, _ = seen()
    attack = InvertingGradients(tv_unit="range")
    other = {name: torch.randn_like(tensor) for name, tensor in observation.update.items()}
    assert torch.equal(
        range_of(observation, attack), range_of(replace(observation, update=other, message=other), attack)
    )


def test_one_weight_serves_an_objective_in_any_units() -> None:
    observation, _ = seen()
    names = ["a", "b", "c"]

    def images(attack: InvertingGradients) -> Tensor:
        return attack.reconstruct(observation, Generators(names, dtype=torch.float64)).images

    options = {"iterations": 12, "tv": 0.3}
    plain = images(InvertingGradients(tv_unit="range", **options))  # type: ignore[arg-type]
    assert torch.allclose(images(Louder(tv_unit="range", **options)), plain, atol=1e-9)  # type: ignore[arg-type]
    assert not torch.allclose(images(Louder(**options)), images(InvertingGradients(**options)), atol=1e-2)  # type: ignore[arg-type]


def test_a_network_that_does_not_look_at_images_leaves_no_prior() -> None:
    observation, _ = seen()
    same = torch.full((4, 1, 8, 8), 0.25)
    blank = replace(observation, auxiliary=Images(same, torch.zeros(4, dtype=torch.int64)))
    found = range_of(blank, InvertingGradients(tv_unit="range"))
    assert found.isfinite().all() and (found < 1e-12).all() and (found > 0).all()


@pytest.mark.parametrize(
    ("attack", "word"),
    [("gauss-newton", "first-order"), ("gias", "searches in its own way"), ("gradinversion", "own way")],
)
def test_attacks_that_search_otherwise_refuse_the_unit(attack: str, word: str) -> None:
    with pytest.raises(GradleakError, match=word):
        registry.build("attacks", attack, {"tv_unit": "range"})
