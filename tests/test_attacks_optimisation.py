"""Optimisation and learned attacks beyond the basic ones, and the options of the template."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from gradleak import registry, suite
from gradleak.attack import Reconstruction
from gradleak.attacks.gradinversion import _orders, _registered
from gradleak.dataset import Data
from gradleak.defenses.censor import _is_gradient
from gradleak.engine.objectives import angular, masked_cosine, weigh
from gradleak.engine.optimisers import Adam
from gradleak.errors import GradleakError
from gradleak.evaluation import check, workshop
from gradleak.mechanisms import batch_statistics
from gradleak.model import initialise
from gradleak.search import parametrisations
from gradleak.search.presets import PRESETS
from gradleak.seeds import Generators
from gradleak.testing import Scene
from gradleak.threat import BatchNorm, Compute, Knowledge, Observation, Setting
from gradleak.update import one_hot

DIGITS = Data(registry.build("datasets", "digits"), "digits")


class Case:
    """Tuning victims of digits, and what is seen of them."""

    def __init__(
        self,
        setting: Setting | None = None,
        victims: int = 2,
        model: str = "lenet",
        options: dict[str, Any] | None = None,
        defense: str = "none",
        defense_options: dict[str, Any] | None = None,
        view: bool = False,
    ):
        """Let them send their messages."""
        self.setting = setting or Setting()
        images, self.labels = DIGITS.victims(victims, self.setting.batch_size, tuning=True)
        self.images = images.to(self.setting.dtype)
        self.defense = registry.build("defenses", defense, defense_options)
        self.module = initialise(registry.build("models", model, options), DIGITS.shape, 10, 0)
        scene = Scene.of(self.module, self.images, self.labels, self.defense, self.setting)
        self.network, self.sent = scene.network, scene.sent
        self.observation = scene.observe(
            "public" if view else "oblivious",
            batch_norm=BatchNorm.BATCH if self.sent.statistics else BatchNorm.RUNNING,
            local_training=self.setting.grants.local_training,
            running=batch_statistics.running(self.module),
            auxiliary=DIGITS.split.train,
            compute=Compute(width=8),
        )

    def attack(
        self, name: str, observation: Observation | None = None, only: list[int] | None = None, **options: Any
    ) -> Reconstruction:
        """Let an attack answer, for some victims only if said so."""
        chosen = observation or self.observation
        names = [("victim", index) for index in (range(len(self.images)) if only is None else only)]
        answer: Reconstruction = registry.build("attacks", name, options).reconstruct(
            chosen, Generators(names, dtype=self.setting.dtype)
        )
        return answer


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Of every victim, in the given order, dB."""
    return -10 * (images - truth).square().flatten(1).mean(1).clamp(min=1e-10).log10()


LEAKED = Setting(batch_size=3, precision="float64", grants=Knowledge(batch_norm=BatchNorm.BATCH))


def test_statistics_of_a_batch_are_what_its_layers_see() -> None:
    case = Case(LEAKED, model="resnet20", options={"width": 2})
    first = next(iter(batch_statistics.layers(case.network.module)))
    convolution = next(m for m in case.network.module.modules() if isinstance(m, torch.nn.Conv2d))
    normalise = next(iter(case.network.module.children()))
    seen = convolution(normalise(case.images[0]))
    assert torch.allclose(case.sent.statistics[f"{first}.mean"][0], seen.mean((0, 2, 3)), atol=1e-12)
    assert torch.allclose(case.sent.statistics[f"{first}.var"][0], seen.var((0, 2, 3), correction=0), atol=1e-12)
    known = {name: rows[0] for name, rows in case.sent.statistics.items()}
    assert batch_statistics.distance(known, known) < 1e-4
    zeros = {name: torch.zeros_like(row) for name, row in known.items()}
    assert float(batch_statistics.distance(zeros, known)) == pytest.approx(1, abs=1e-4)
    assert set(batch_statistics.running(case.module)) == set(known)


def test_statistics_stay_with_clients_unless_granted() -> None:
    case = Case(Setting(batch_size=2), model="resnet20", options={"width": 2})
    assert case.sent.statistics == {}


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_gradinversion_matches_the_leaked_statistics(mode: Literal["eval", "train"]) -> None:
    case = Case(replace(LEAKED, mode=mode), model="convnet", options={"width": 2})
    assert case.observation.batch_statistics is not None

    def gap(statistics: str) -> Tensor:
        answer = case.attack("gradinversion", statistics=statistics, iterations=60, restarts=1, statistics_weight=1.0)
        found = [batch_statistics.of_batch(case.network, images) for images in answer.images]
        known = [{n: rows[i] for n, rows in case.sent.statistics.items()} for i in range(len(found))]
        return torch.stack([batch_statistics.distance(a, b) for a, b in zip(found, known, strict=True)])

    assert gap("batch").mean() < 0.8 * gap("none").mean()


def test_seeds_are_registered_by_whole_pixels_and_ordered_within_labels() -> None:
    stream = torch.Generator().manual_seed(0)
    images = torch.rand(4, 2, 3, 1, 12, 10, generator=stream)
    for down, right in ((0, 0), (2, -1), (-2, 2)):
        moved = images.roll((down, right), (-2, -1))
        assert torch.equal(_registered(moved, images, 2), images)
    swapped = images[:1].repeat(2, 1, 1, 1, 1, 1)
    swapped[1] = swapped[1][:, [1, 0, 2]]
    best = torch.zeros(2, dtype=torch.int64)
    same = one_hot(torch.zeros(2, 2, 3, dtype=torch.int64), 4, torch.float32)
    assert _orders(swapped, same, best)[1].tolist() == [[1, 0, 2]] * 2
    distinct = one_hot(torch.tensor([0, 1, 1]).expand(2, 2, 3), 4, torch.float32)
    assert _orders(swapped, distinct, best)[1].tolist() == [[0, 1, 2]] * 2


def test_gradinversion_counts_every_round_and_treats_victims_alone() -> None:
    case = Case(LEAKED, model="convnet", options={"width": 2})
    options: dict[str, Any] = {"statistics": "batch", "iterations": 24, "restarts": 2, "group_every": 6, "warm_up": 4}
    both = case.attack("gradinversion", **options)
    assert both.iterations is not None and both.candidates is not None
    assert both.candidates.shape[1] == 2
    assert (both.iterations >= 48).all()
    second = {name: tensor[1:] for name, tensor in case.observation.message.items()}
    statistics = {name: tensor[1:] for name, tensor in case.sent.statistics.items()}
    alone = replace(
        case.observation, message=second, update=second, labels=case.labels[1:], batch_statistics=statistics
    )
    assert torch.allclose(case.attack("gradinversion", alone, [1], **options).images[0], both.images[1], atol=1e-6)


def test_a_group_pulls_seeds_together() -> None:
    case = Case(Setting(precision="float64"), victims=2, model="convnet", options={"width": 2})
    options: dict[str, Any] = {
        "statistics": "none",
        "iterations": 80,
        "restarts": 3,
        "group_every": 20,
        "noise": 0.0,
        "tv": 0.0,
    }

    def spread(group: float) -> Tensor:
        answer = case.attack("gradinversion", group=group, **options)
        assert answer.candidates is not None
        return answer.candidates.std(1).flatten(1).mean(1)

    assert (spread(1.0) < 0.7 * spread(1e-9)).all()


def test_gradinversion_needs_batch_normalisation_and_its_grant() -> None:
    attack = registry.build("attacks", "gradinversion", {"statistics": "batch"})
    assert attack.needs.batch_norm is BatchNorm.BATCH
    assert "batch normalisation" in attack.unsuited(Case().module, Setting(), Case().defense)
    assert registry.build("attacks", "gradinversion", {"statistics": "none"}).needs.missing(Knowledge()) == []


FEDAVG = Setting(batch_size=2, local_steps=5, local_lr=0.1)


def test_the_surrogate_is_between_one_gradient_and_all_steps() -> None:
    case = Case(FEDAVG)
    told = Case(replace(FEDAVG, grants=Knowledge(local_training=True)))
    single = psnr(case.attack("inverting-gradients", iterations=150).images, case.images).mean()
    surrogate = psnr(case.attack("sme", iterations=150).images, case.images).mean()
    unrolled = psnr(told.attack("inverting-gradients", iterations=120).images, told.images).mean()
    assert single + 5 < surrogate < unrolled - 5


def test_a_weight_difference_is_matched_with_the_sign_of_a_gradient() -> None:
    for view in (False, True):
        case = Case(replace(FEDAVG, local_steps=1, precision="float64"), view=view)
        plugin = registry.build("attacks", "inverting-gradients")
        targets = one_hot(case.labels, 10, torch.float64)
        assert plugin.loss(case.observation, case.images, targets, {}).abs().max() < 1e-12


def test_a_surrogate_at_the_old_weights_is_exact_for_one_step() -> None:
    for view in (False, True):
        case = Case(replace(FEDAVG, local_steps=1, precision="float64"), view=view)
        plugin = registry.build("attacks", "sme", {"surrogate": 1.0})
        targets = one_hot(case.labels, 10, torch.float64)
        assert plugin.loss(case.observation, case.images, targets, {}).abs().max() < 1e-12
    assert "weight difference" in plugin.unsuited(case.module, Setting(), case.defense)


def test_learning_beats_optimising_under_noise_and_heavy_sparsification() -> None:
    for defense, options in (("gaussian-noise", {"sigma": 0.1}), ("top-k", {"ratio": 0.003})):
        case = Case(
            victims=8, model="mlp", options={"widths": [32]}, defense=defense, defense_options=options, view=True
        )
        learned = case.attack("lti", messages=512, epochs=30, hidden=128)
        searched = case.attack("inverting-gradients", iterations=100)
        assert psnr(learned.images, case.images).median() > psnr(searched.images, case.images).median() + 1, defense


@pytest.mark.parametrize(("model", "options", "gain"), [("mlp", {"widths": [64]}, 25), ("lenet", {}, 10)])
def test_tensors_of_equal_weight_undo_what_tract_does_to_the_scale(
    model: str, options: dict[str, Any], gain: float
) -> None:
    """Without that about 16 and 49 dB, with it about 72 and 71."""
    oblivious, adaptive = (
        psnr(case.attack("inverting-gradients", iterations=300).images, case.images).median()
        for case in (
            Case(victims=4, model=model, options=options, defense="tract", view=view) for view in (False, True)
        )
    )
    assert adaptive > oblivious + gain


def test_who_knows_censor_tells_its_fallbacks_and_errs_less_on_the_rest() -> None:
    """On lenet 13 of 16 fall back to the plain gradient; the rest stay below the mean image, 11.1 dB."""
    answers = []
    for view in (False, True):
        case = Case(victims=16, defense="censor", view=view)
        gap = torch.stack([(case.sent.message[n] - t).abs().flatten(1).amax(1) for n, t in case.sent.update.items()])
        kept = (gap == 0).all(0)
        answers.append(psnr(case.attack("inverting-gradients", iterations=150).images, case.images))
    oblivious, adaptive = answers
    assert 0 < kept.sum() < 16
    assert adaptive[kept].min() > 30 and adaptive[kept].mean() > oblivious[kept].mean()
    assert adaptive[~kept].mean() > oblivious[~kept].mean() + 2
    assert adaptive[~kept].mean() < 11


@pytest.mark.parametrize("exact", [True, False])
def test_a_gradient_is_told_from_a_random_update(exact: bool) -> None:
    case = Case(victims=4, model="mlp", options={"widths": [16]}, defense="censor", defense_options={"exact": exact})
    for index in range(4):
        update = {name: tensor[index] for name, tensor in case.sent.update.items()}
        other = case.defense.protect(update, {}, torch.Generator().manual_seed(index))
        assert bool(_is_gradient(update)) and not bool(_is_gradient(other))
        assert float(case.defense.nll(update, update, {})) == 0
        distance = float(case.defense.nll(other, update, {}))
        assert distance < 1e-6 if exact else distance > 0.1
        nothing = {name: torch.zeros_like(tensor) for name, tensor in update.items()}
        assert float(case.defense.nll(update, nothing, {})) == pytest.approx(1)


def test_learning_asks_for_the_clients_loss_and_for_its_first_message() -> None:
    small: dict[str, Any] = {"messages": 64, "epochs": 2, "hidden": 16}
    for defense in ("censor", "dgc"):
        case = Case(model="mlp", options={"widths": [16]}, defense=defense, view=True)
        assert registry.build("attacks", "lti").unsuited(case.module, case.setting, case.defense) is None
        assert case.attack("lti", **small).images.isfinite().all()


def test_learning_is_repeatable_and_treats_victims_alone() -> None:
    case = Case(Setting(batch_size=2), model="mlp", options={"widths": [16]}, defense="sign", view=True)
    small: dict[str, Any] = {"messages": 64, "epochs": 3, "hidden": 32, "features": 100}
    both = case.attack("lti", **small)
    second = {name: tensor[1:] for name, tensor in case.observation.message.items()}
    alone = case.attack("lti", replace(case.observation, message=second, labels=None), [1], **small)
    assert torch.allclose(alone.images[0], both.images[1], atol=1e-6)
    # What serves all victims is drawn anew with the suite's seed, and with nothing else.
    plugin, names = registry.build("attacks", "lti", small), [("victim", 0), ("victim", 1)]
    seeded = [plugin.reconstruct(case.observation, Generators(names, context=seed)).images for seed in (0, 1, 0)]
    assert torch.equal(seeded[0], seeded[2])
    assert (seeded[0] - seeded[1]).abs().max() > 1e-3
    late = case.attack("lti", replace(case.observation, compute=Compute(deadline=0.0)), **small)
    assert late.status == ["timeout", "timeout"]


OPTIONS: list[dict[str, Any]] = [
    {"objective": "angular"},
    {"objective": "masked-cosine"},
    {"layer_weights": "exp"},
    {"layer_weights": "linear"},
    {"signed": "soft", "schedule": "cosine", "warm_up": 5},
    {"initialisation": "patterned"},
    {"tv_form": "opponents", "tv": 1e-3},
    {"features": 0.1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_still_reconstructs(options: dict[str, Any]) -> None:
    case = Case()
    answer = case.attack("inverting-gradients", iterations=200, **options)
    assert psnr(answer.images, case.images).median() > 20


@pytest.mark.parametrize("parametrisation", ["low-resolution", "deep-prior"])
def test_other_parametrisations_learn_something_of_the_image(parametrisation: str) -> None:
    case = Case()
    start = registry.build("attacks", "inverting-gradients", {"parametrisation": parametrisation, "iterations": 1})
    options: dict[str, Any] = {"signed": False, "lr": 0.03, "iterations": 150, "parametrisation": parametrisation}
    answer = case.attack("inverting-gradients", **options)
    first = start.reconstruct(case.observation, Generators([("victim", 0), ("victim", 1)]))
    assert answer.loss is not None and first.loss is not None
    assert (answer.loss < 0.6 * first.loss).all()
    assert answer.images.shape == case.images.shape


def test_a_decoder_makes_images_of_any_size() -> None:
    for shape in ((1, 8, 8), (3, 25, 30), (1, 5, 9)):
        weights = parametrisations.decoder(Generators(["a"]), 2, shape)
        images = parametrisations.decoded({name: tensor[0] for name, tensor in weights.items()}, shape)
        assert images.shape == (2, *shape) and images.min() >= 0 and images.max() <= 1


def test_angles_masks_and_weights() -> None:
    x, y = {"a": torch.tensor([1.0, 0.0])}, {"a": torch.tensor([1.0, 1.0])}
    assert float(angular(x, y)) == pytest.approx(0.25)
    assert float(angular(x, {"a": -x["a"]})) == pytest.approx(1)
    assert float(masked_cosine(y, x)) == pytest.approx(0)
    two = {"a": torch.ones(1), "b": torch.ones(1)}
    assert [float(tensor) ** 2 for tensor in weigh(two, "linear").values()] == pytest.approx([1, 0.5])
    assert [float(tensor) ** 2 for tensor in weigh(two, "exp").values()] == pytest.approx([1, 0.36787944])


def test_a_soft_sign_turns_into_the_gradient() -> None:
    for done, expected in ((0.0, torch.tensor(2.0).tanh()), (1.0, torch.tensor(2.0))):
        optimiser = Adam(signs=frozenset({"x"}), soft=True, betas=(0.0, 0.0))
        variables, seen = {"x": torch.zeros(1, 1)}, {"x": torch.full((1, 1), 2.0)}
        optimiser.start(variables)
        optimiser.step(variables, seen, torch.ones(1), torch.full((1,), done))
        assert optimiser._mean["x"].item() == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_resolved_and_run(name: str) -> None:
    plugin = registry.build("attacks", "inverting-gradients", {"preset": name, "iterations": 3})
    options = registry.options_of(plugin)
    assert "preset" not in options and options["iterations"] == 3
    assert options["objective"] == PRESETS[name]["objective"]
    case = Case()
    assert plugin.reconstruct(case.observation, Generators(["a", "b"])).images.isfinite().all()


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(GradleakError, match="modern"):
        registry.build("attacks", "inverting-gradients", {"preset": "modrn"})


AUTO = """
name: auto
victims: 2
knowledge: [public]
controls: listed
datasets: [digits]
models: [{name: mlp, options: {widths: [16]}}, lenet]
settings: [{name: plain}, {name: rich, grants: {auxiliary: true}}]
attacks: [auto-v1, {name: idlg, options: {iterations: 7}, label: idlg}]
defenses: [none, dropout]
"""


def test_the_ensemble_is_frozen() -> None:
    assert registry.ensemble("auto-v1") == [
        "gifd",
        "gradinversion",
        "idlg",
        "inverting-gradients",
        "linear-leakage",
        "lti",
        "sme",
        "spear",
    ]


def test_auto_runs_whatever_applies_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "auto.yaml"
    path.write_text(AUTO)
    shop = workshop.Workshop(workshop.Resources(cache=tmp_path))
    cells = check.check(suite.expand(suite.read(path), shop.digest), shop)
    ran = {(c.attack.name, c.model.name, c.setting.name, c.defense.name) for c in suite.attacking(cells)}
    assert ("linear-leakage", "mlp", "plain", "none") in ran
    assert not any(row[:2] == ("linear-leakage", "lenet") for row in ran)
    assert {row[2] for row in ran if row[0] == "lti"} == {"rich"}
    assert {row[3] for row in ran if row[0] == "dropout-inversion"} == {"dropout"}
    assert not any(row[0] in ("sme", "gifd", "gradinversion") for row in ran)
    # What the suite lists itself stays as it is listed.
    assert {c.attack.options["iterations"] for c in suite.attacking(cells) if c.attack.name == "idlg"} == {7}
