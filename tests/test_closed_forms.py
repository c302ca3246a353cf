"""Forms that defenses give of their matching losses: equal to the hooks up to rounding, whoever the neighbours are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gradleak import registry, testing
from gradleak.defense import Message, Public
from gradleak.defenses.top_k import TopK
from gradleak.engine.backends import BACKENDS
from gradleak.engine.choice import choose, kind_of
from gradleak.engine.layerwise import Layerwise
from gradleak.engine.layerwise.matching import Anyhow
from gradleak.engine.optimisers import Variables
from gradleak.engine.problem import Described, Facts, Problem, Values, take
from gradleak.threat import Setting
from gradleak.update import Update

MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"widths": (64,)},
    "lenet": {"activation": "tanh"},
    "convnet": {"width": 2},
    "vit": {"dim": 12, "depth": 1, "heads": 2},
}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "clipped": ("gaussian-noise", {"sigma": 0.1, "clip": 0.5}),
    "hardly noisy": ("gaussian-noise", {"sigma": 1e-5, "clip": 0.5}),
    "noiseless": ("gaussian-noise", {"sigma": 0.0, "clip": 0.5}),
    "never clipped": ("gaussian-noise", {"sigma": 0.1, "clip": 100.0}),
    "noisy": ("gaussian-noise", {"sigma": 0.01, "clip": None}),
    "dp-sgd": ("dp-sgd", {"sigma": 0.01, "clip": 0.5}),
    "top-k": ("top-k", {"ratio": 0.1}),
    "top-k by tensor": ("top-k", {"ratio": 0.3, "scope": "tensor"}),
    "random-k": ("random-k", {"ratio": 0.05}),
    "random-k, many": ("random-k", {"ratio": 0.7, "unbiased": False}),
    "sketch": ("sketch", {"ratio": 0.1}),
    "clipped sketch": ("sketch", {"ratio": 0.1, "clip": 0.3, "sigma": 0.01}),
    "srht": ("sketch", {"ratio": 0.1, "kind": "srht"}),
    "ams": ("sketch", {"size": 40, "kind": "ams"}),
}
SEVERAL = ["clipped", "hardly noisy", "noiseless", "never clipped", "noisy", "dp-sgd"]
SEVERAL += ["top-k", "random-k", "sketch", "srht"]


def trials(
    model: str, form: str, attack: str = "inverting-gradients", batch: int = 1, victims: int = 3, **options: Any
) -> tuple[Problem, Variables, Facts]:
    """A problem of an attacker who knows the defense, a guess for each of its victims, and what is known of them."""
    name, defense = FORMS[form]
    images, labels = testing.digits(victims, batch)
    scene = testing.Scene.of(
        testing.model(model, **MODELS[model]),
        images,
        labels,
        registry.build("defenses", name, defense),
        Setting(batch_size=batch, precision=options.pop("precision", "float64")),
    )
    observation = scene.observe("public")
    built = registry.build("attacks", attack, options)
    stream = torch.Generator().manual_seed(0)
    noise = torch.randn(images.shape, generator=stream, dtype=torch.float64).to(observation.dtype)
    # Near the truth, so that both parts of a loss matter.
    start = {"pixels": scene.images + 0.3 * noise}
    return built.problem(observation), start, built.facts(observation)


def answer(name: str, problem: Problem, start: Variables, facts: Facts) -> Values:
    backend = BACKENDS[name]()
    assert backend.refusal(problem, start, facts) is None
    return backend(problem, start, backend.prepare(problem, facts))


def agree(found: Values, truth: Values, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found.matching, truth.matching, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.total, truth.total, rtol=tolerance, atol=tolerance)
    for name, expected in truth.gradients.items():
        for row, other in zip(found.gradients[name], expected, strict=True):
            assert other.norm() > 0 and (row - other).norm() <= tolerance * other.norm()


def has_form(problem: Problem, start: Variables, facts: Facts) -> bool:
    backend = Layerwise()
    assert backend.refusal(problem, start, facts) is None
    return not isinstance(backend._matcher, Anyhow)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", MODELS)
def test_forms_are_the_hooks(model: str, form: str) -> None:
    given = trials(model, form)
    assert has_form(*given)
    agree(answer("layerwise", *given), answer("sequential", *given))


@pytest.mark.parametrize("form", SEVERAL)
@pytest.mark.parametrize("model", MODELS)
def test_forms_of_several_images(model: str, form: str) -> None:
    given = trials(model, form, batch=3)
    if model == "vit" and FORMS[form][1].get("clip"):
        # Its position embedding has a gradient a victim, not one an image.
        assert "tell them apart" in str(Layerwise().refusal(*given))
        return
    assert has_form(*given)
    agree(answer("layerwise", *given), answer("sequential", *given))


@pytest.mark.parametrize("objective", ["squared", "relative-squared", "absolute"])
@pytest.mark.parametrize("form", ["random-k", "sketch"])
def test_forms_under_any_distance(form: str, objective: str) -> None:
    given = trials("mlp", form, objective=objective)
    agree(answer("layerwise", *given), answer("sequential", *given))


def test_a_victim_that_sent_fewer_entries_than_others() -> None:
    problem, start, facts = trials("mlp", "top-k")
    for name, tensor in facts.message.items():
        tensor[1] *= tensor[1].abs() > tensor[1].abs().mean() * 8
        if tensor.ndim == 2:
            tensor[2] = 0
        assert name in facts.message
    given = problem, start, facts
    agree(answer("layerwise", *given), answer("sequential", *given))


# A product with a dense sketch is one of matrices, which round by the place of a row in them.
@pytest.mark.parametrize("form", [form for form in FORMS if form != "ams"])
@pytest.mark.parametrize("model", ["mlp", "lenet"])
def test_neighbours_change_no_bit_at_equal_width(model: str, form: str) -> None:
    problem, start, facts = trials(model, form, victims=6, precision="float32")
    backend = Layerwise()
    assert backend.refusal(problem, start, facts) is None

    def alone(rows: list[int]) -> Values:
        index = torch.tensor(rows)
        known = backend.prepare(problem, take(facts, index))
        return backend(problem, {name: tensor[index] for name, tensor in start.items()}, known)

    first = alone([0, 1, 2])
    for others in ([2, 0, 1], [0, 4, 5], [5, 3, 0]):
        again = alone(others)
        for place, victim in enumerate(others):
            if victim < 3:
                assert torch.equal(again.gradients["pixels"][place], first.gradients["pixels"][victim])
                assert torch.equal(again.total[place], first.total[victim])


def test_several_clipped_sketches_are_left_to_vmap() -> None:
    problem, start, facts = trials("lenet", "clipped sketch", batch=2)
    assert Layerwise().refusal(problem, start, facts) is not None


@dataclass(frozen=True, kw_only=True)
class Doubled(TopK):
    """A likelihood of its own."""

    def nll(self, message: Message, simulated: Message, public: Public) -> Tensor:
        """Twice as much."""
        return 2 * super().nll(message, simulated, public)


def test_who_changes_a_hook_has_no_form_unless_he_gives_one() -> None:
    assert TopK().closed_form({}) is not None
    assert Doubled().closed_form({}) is None


def test_remembered_choices_tell_defenses_and_versions_apart() -> None:
    kinds = set()
    for form in FORMS:
        problem, start, facts = trials("mlp", form)
        kinds.add(kind_of(problem, start, facts))
        assert kind_of(*trials("mlp", form)) in kinds
    assert len(kinds) == len(FORMS)


def changed(update: Update, by: float) -> Update:
    return {name: tensor * by for name, tensor in update.items()}


def test_a_wrong_form_is_not_believed(caplog: pytest.LogCaptureFixture) -> None:
    problem, start, facts = trials("mlp", "top-k")
    match = problem.match
    assert isinstance(match, Described)
    wrong = replace(problem, match=replace(match, whole=lambda u, f: match(changed(u, 1.1), f)))
    found = choose("layerwise", wrong, start, facts, 10)
    assert found.name == "vmap" and "off" in found.reason
