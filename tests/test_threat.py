"""The line between victim and attacker: no attack can reach the truth."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gradleak.attacks
from gradleak import registry
from gradleak.attack import Attack
from gradleak.dataset import Data
from gradleak.defense import View
from gradleak.evaluation.check import check
from gradleak.evaluation.evaluate import evaluate
from gradleak.evaluation.workshop import Workshop
from gradleak.federation import client
from gradleak.model import initialise
from gradleak.suite import Suite, expand
from gradleak.threat import BatchNorm, Knowledge, Labels, Level, Observation, Setting
from gradleak.update import LocalTraining


def tensors(value: Any, seen: set[int]) -> list[Tensor]:
    """Every tensor that can be reached from an object through attributes and containers."""
    if id(value) in seen:
        return []
    seen.add(id(value))
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        inner: list[Any] = list(value.values())
    elif isinstance(value, list | tuple | set | frozenset):
        inner = list(value)
    elif callable(value) and getattr(value, "__closure__", None):
        inner = [cell.cell_contents for cell in value.__closure__]
    elif hasattr(value, "__dict__"):
        inner = list(vars(value).values())
    else:
        return []
    return [tensor for item in inner for tensor in tensors(item, seen)]


def correlation(rows: Tensor, wanted: Tensor) -> Tensor:
    """Pearson correlation of every row with every wanted one."""
    rows, truth = (part.double() - part.double().mean(1, keepdim=True) for part in (rows, wanted))
    return torch.nn.functional.cosine_similarity(rows[:, None], truth[None], dim=-1)


SUITE: dict[str, Any] = {
    "name": "spy",
    "victims": 3,
    "candidates": 10,
    "controls": "listed",
    "datasets": [{"name": "faces"}],
    "models": [{"name": "mlp", "options": {"widths": [16]}}],
    "settings": [{"name": "sgd", "grants": {"labels": "known"}}],
    "attacks": [{"name": "inverting-gradients", "options": {"iterations": 1}}, {"name": "wrong-gradient"}],
    "defenses": [{"name": "none"}, {"name": "top-k"}, {"name": "gaussian-noise"}],
}


@pytest.mark.parametrize("knowledge", ["oblivious", "parameters", "public"])
def test_the_observation_of_a_real_cell_holds_no_victim_image(knowledge: str, monkeypatch: pytest.MonkeyPatch) -> None:
    workshop = Workshop()
    victims, _ = Data(registry.build("datasets", "faces"), "faces").victims(3, 1)
    wanted = victims.flatten(1)
    looked: list[int] = []

    def spy(self: Attack, observation: Observation, generator: Any) -> Any:
        # The message carries the image by right: that is the leak. Everything else must not.
        allowed = {id(tensor) for part in (observation.message, observation.update) for tensor in part.values()}
        found = [tensor for tensor in tensors(observation, set()) if id(tensor) not in allowed]
        looked.append(len(found))
        for tensor in found:
            if tensor.is_floating_point() and tensor.numel() and tensor.numel() % wanted.shape[1] == 0:
                # A victim's pixels correlate with themselves in whatever normalisation.
                rows = tensor.detach().reshape(-1, wanted.shape[1]).double()
                assert correlation(rows, wanted).abs().max() < 0.95
        assert observation.auxiliary is None
        return original(self, observation, generator)

    cls = registry.load("attacks", "inverting-gradients")
    original = cls.reconstruct
    monkeypatch.setattr(cls, "reconstruct", spy)
    suite = Suite.model_validate({**SUITE, "attacks": SUITE["attacks"][:1], "knowledge": [knowledge]})
    for cell in expand(suite, workshop.digest):
        assert evaluate(cell, workshop).status == "ok"
    assert looked and min(looked) > 5


def test_the_check_above_would_notice_a_victim() -> None:
    victims, _ = Data(registry.build("datasets", "faces"), "faces").victims(3, 1)
    hidden = Observation.__new__(Observation)
    object.__setattr__(hidden, "compute", [{"deep": (victims - 0.4) * 3}])
    (found,) = tensors(hidden, set())
    assert correlation(found.flatten(1), victims.flatten(1)).max() > 0.999


def test_auxiliary_images_are_never_a_victims() -> None:
    for name in ("digits", "faces", "photos"):
        data = Data(registry.build("datasets", name), name)
        victims, _ = data.victims(8, 1)
        distance = torch.cdist(victims.flatten(1), data.split.train.images.flatten(1))
        assert distance.min() > 0


def test_attacks_import_no_module_that_holds_victims() -> None:
    folder = Path(next(iter(gradleak.attacks.__path__)))
    forbidden = {
        "gradleak.federation.client",
        "gradleak.evaluation.evaluate",
        "gradleak.board.store",
        "gradleak.evaluation.metrics",
        "gradleak.evaluation.runner",
    }
    forbidden |= {"gradleak.dataset.Data", "gradleak.datasets", "gradleak.registry"}  # they read the victims
    files = list(folder.glob("*.py"))
    assert len(files) > 5
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
                assert node.level <= 1, f"{file.name} imports from above its folder"
            assert not forbidden & set(names), f"{file.name} imports {forbidden & set(names)}"


def test_a_need_is_covered_by_any_higher_grant() -> None:
    assert Knowledge(labels=Labels.INFERRED).missing(Knowledge()) == []
    assert Knowledge(labels=Labels.OPTIMISED).missing(Knowledge()) == []
    assert Knowledge(labels=Labels.KNOWN).missing(Knowledge(labels=Labels.COUNTS)) == ["labels: known"]
    assert Knowledge(labels=Labels.COUNTS).missing(Knowledge(labels=Labels.KNOWN)) == []
    assert Knowledge(batch_norm=BatchNorm.BATCH).missing(Knowledge(batch_norm=BatchNorm.RUNNING)) != []
    assert Knowledge(defense=Level.PUBLIC).missing(Knowledge(defense=Level.ORACLE)) == []
    assert Knowledge(generator=True, auxiliary=True).missing(Knowledge(auxiliary=True)) == ["generator: true"]


def test_labels_and_local_training_reach_the_attacker_only_when_granted(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Observation] = []
    cls = registry.load("attacks", "inverting-gradients")
    original = cls.reconstruct

    def spy(self: Attack, observation: Observation, generator: Any) -> Any:
        seen.append(observation)
        return original(self, observation, generator)

    monkeypatch.setattr(cls, "reconstruct", spy)
    fedavg = {"local_steps": 2, "local_lr": 0.1, "batch_size": 2}
    settings = [
        {"name": "blind", **fedavg},
        {"name": "told", **fedavg, "grants": {"labels": "counts", "local_training": True}},
    ]
    suite = Suite.model_validate(
        {**SUITE, "attacks": SUITE["attacks"][:1], "defenses": [{"name": "none"}], "settings": settings}
    )
    workshop = Workshop()
    for cell in expand(suite, workshop.digest):
        evaluate(cell, workshop)
    blind, told = seen
    assert blind.labels is None and blind.training == LocalTraining()
    assert told.labels is not None and torch.equal(told.labels, told.labels.sort(-1).values)
    assert told.training.steps == 2 and told.training.lr == 0.1


def test_a_knowledge_mismatch_is_refused_before_anything_runs() -> None:
    from gradleak.errors import GradleakError

    suite = Suite.model_validate({**SUITE, "attacks": [{"name": "wrong-gradient"}], "victims": 1})
    workshop = Workshop()
    with pytest.raises(GradleakError, match="at least 2 victims"):
        check(expand(suite, workshop.digest), workshop)


def test_wrong_gradient_is_shown_the_next_victims_message_and_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Observation] = {}
    for name in ("inverting-gradients", "wrong-gradient"):
        cls = registry.load("attacks", name)

        def spy(self: Attack, observation: Observation, generator: Any, name: str = name) -> Any:
            seen[name] = observation
            raise RuntimeError("seen enough")

        monkeypatch.setattr(cls, "reconstruct", spy)
    workshop = Workshop()
    suite = Suite.model_validate({**SUITE, "defenses": [{"name": "gaussian-noise"}]})
    cells = [cell for cell in expand(suite, workshop.digest) if getattr(cell, "knowledge", None) == "oblivious"]
    for cell in cells:
        result = evaluate(cell, workshop)
        assert result.status == "failed" and "seen enough" in result.error
    own, other = seen["inverting-gradients"], seen["wrong-gradient"]
    for name in own.message:
        assert torch.equal(other.message[name], own.message[name].roll(-1, 0))
    assert own.labels is not None and other.labels is not None
    assert torch.equal(other.labels, own.labels.roll(-1, 0))


def test_the_message_does_not_depend_on_the_attack_or_on_other_victims() -> None:
    data = Data(registry.build("datasets", "digits"), "digits")
    images, labels = data.victims(3, 2)
    network = initialise(registry.build("models", "lenet"), data.shape, data.classes, 0)
    defense = registry.build("defenses", "gaussian-noise")
    frozen = client.client_network(network, defense, Setting(batch_size=2))
    every = client.send(frozen, images, labels, 10, defense, Setting(batch_size=2), 1, [5, 6, 7])
    single = client.send(frozen, images[1:2], labels[1:2], 10, defense, Setting(batch_size=2), 1, [6])
    for name, tensor in every.message.items():
        assert torch.equal(tensor[1], single.message[name][0])


def test_a_view_below_public_cannot_simulate() -> None:
    defense = registry.build("defenses", "gaussian-noise")
    view = View(defense, None)
    assert not view.complete
    with pytest.raises(ValueError, match="public randomness"):
        view.simulate({})


def test_names_change_neither_keys_nor_results() -> None:
    def rows(setting: str, label: str) -> dict[str, list[float | None]]:
        plain = {**SUITE, "attacks": SUITE["attacks"][:1], "defenses": [{"name": "gaussian-noise", "label": label}]}
        suite = Suite.model_validate({**plain, "settings": [{"name": setting, "grants": {"labels": "known"}}]})
        workshop = Workshop()
        cells = expand(suite, workshop.digest)
        return {cell.key: [row.psnr for row in evaluate(cell, workshop).rows] for cell in cells}

    assert rows("one", "noise") == rows("another", "something else")
