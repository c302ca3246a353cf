"""Every attack of the registry, on a small case of its own that it can run on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap

from gradleak import batch_statistics, client, registry
from gradleak.attack import Attack, Reconstruction
from gradleak.dataset import Data
from gradleak.defense import Defense, View
from gradleak.errors import GradleakError
from gradleak.model import initialise
from gradleak.seeds import Generators
from gradleak.threat import Labels, Level, Observation, Setting, rank
from gradleak.update import LocalTraining

VICTIMS = 3
CHEAP = {"restarts": 1, "trials": 512, "rounds": 20}
"""Options that make a run short, where an attack has them and its case says nothing else."""


@dataclass(frozen=True)
class Case:
    model: str
    model_options: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    defense: str = "none"
    defense_options: dict[str, Any] = field(default_factory=dict)
    dataset: str = "digits"
    batch_size: int = 1
    local_lr: float | None = None
    """Rate of one local step of FedAvg."""
    undefended: bool = True
    """Whether nothing stands in its way, so that it must beat the mean image."""


CASES = {
    "spear": Case("mlp", {"widths": (64, 64)}, batch_size=2),
    "linear-leakage": Case("mlp", {"widths": (32,)}),
    "cocktail-party": Case("mlp", {"widths": (64,)}, dataset="photos", batch_size=2),
    "april": Case("vit", {"dim": 16, "depth": 1, "heads": 2}),
    "r-gap": Case("cnn6", {"width": 6}),
    "dlg": Case("lenet", options={"iterations": 30}),
    "idlg": Case("lenet", options={"iterations": 30}),
    "quantum-relaxation": Case(
        "mlp", {"widths": (32,)}, {"restarts": 2, "iterations": 20}, "quantum-encoding", undefended=False
    ),
    "bottleneck-inversion": Case("lenet", {}, {"iterations": 30}, "vib", {"width": 4}, undefended=False),
    "gradinversion": Case("convnet", {"width": 2}, {"iterations": 20}, undefended=False),
    "sme": Case("lenet", {}, {"iterations": 30}, local_lr=0.1, undefended=False),
    "encoding-inversion": Case("lenet", {}, {"iterations": 30}, "augmentation", undefended=False),
}
"""Cases of attacks that need a certain model; all others run on the first of `USUAL` that suits them."""

USUAL = (Case("mlp", {"widths": (32,)}, {"iterations": 150}), Case("lenet", options={"iterations": 150}))


@dataclass(frozen=True)
class Scene:
    attack: Attack
    observation: Observation
    images: Tensor
    mean: Tensor
    undefended: bool


def scene(name: str) -> Scene:
    """The attack, what it sees, and what it should find; skips an attack that needs a generator."""
    last = ""
    for case in [CASES[name]] if name in CASES else USUAL:
        fields = {item.name for item in dataclasses.fields(registry.load("attacks", name))}
        options = {key: value for key, value in {**CHEAP, **case.options}.items() if key in fields}
        attack: Attack = registry.build("attacks", name, options)
        if attack.needs.generator:
            pytest.skip(f"{name} needs a trained generator; tests of its own cover it")
        data = Data(registry.build("datasets", case.dataset), case.dataset)
        defense: Defense = registry.build("defenses", case.defense, case.defense_options)
        setting = Setting(batch_size=case.batch_size, precision="float64", local_lr=case.local_lr)
        module = initialise(registry.build("models", case.model, case.model_options), data.shape, data.classes, 0)
        network = client.client_network(module, defense, setting)
        reason = attack.unsuited(network.module, setting, defense)
        if reason is not None:
            last = reason
            continue
        images, labels = data.victims(VICTIMS, case.batch_size)
        images = images.double()
        sent = client.send(network, images, labels, data.classes, defense, setting, 1, list(range(VICTIMS)))
        known = rank(attack.needs.labels) >= rank(Labels.COUNTS)
        observation = Observation(
            network=network,
            message=sent.message,
            update=vmap(partial(defense.decode, public=sent.public))(sent.message),
            view=View(defense, sent.public),
            shape=data.shape,
            classes=data.classes,
            batch_size=case.batch_size,
            training=LocalTraining(),
            weight_difference=case.local_lr is not None,
            running_statistics=batch_statistics.running(network.module) or None,
            labels=labels if known else None,
            auxiliary=data.split.train if attack.needs.auxiliary or attack.family == "control" else None,
            private=sent.buffers if attack.needs.defense is Level.ORACLE else None,
        )
        return Scene(attack, observation, images, data.split.train.images.double().mean(0), case.undefended)
    raise GradleakError(f"test of attack {name!r}: no usual case suits it ({last}); give it one in CASES")


def attacked(given: Scene, rows: list[int] | None = None) -> Reconstruction:
    """Attack all victims, or some of them on their own."""
    chosen = list(range(VICTIMS)) if rows is None else rows
    seen = given.observation
    observation = replace(
        seen,
        message={name: tensor[chosen] for name, tensor in seen.message.items()},
        update={name: tensor[chosen] for name, tensor in seen.update.items()},
        labels=None if seen.labels is None else seen.labels[chosen],
        private=None if seen.private is None else {name: t[chosen] for name, t in seen.private.items()},
    )
    names = [("victim", index) for index in chosen]
    return given.attack.reconstruct(observation, Generators(names, dtype=torch.float64))


def tensors_of(observation: Observation) -> dict[str, Tensor]:
    """Copies of every tensor that an attack is handed."""
    network = observation.network
    groups = {
        "message": observation.message,
        "update": observation.update,
        "parameters": network.parameters,
        "buffers": network.buffers,
        "private": observation.private or {},
        "state": dict(network.module.state_dict()),
    }
    return {f"{group}.{name}": t.detach().clone() for group, items in groups.items() for name, t in items.items()}


@pytest.mark.parametrize("name", registry.names("attacks"))
def test_contract(name: str) -> None:
    torch.set_num_threads(1)
    given = scene(name)
    before, noise = tensors_of(given.observation), torch.get_rng_state()
    answer = attacked(given)
    after = tensors_of(given.observation)

    # What comes back.
    assert answer.images.shape == given.images.shape
    assert answer.images.dtype == torch.float64
    assert not answer.images.requires_grad
    assert ((answer.images >= 0) & (answer.images <= 1)).all()
    if answer.labels is not None:
        assert answer.labels.shape == given.images.shape[:2] and answer.labels.dtype == torch.int64
    if answer.loss is not None:
        assert answer.loss.shape == (VICTIMS,) and answer.loss.isfinite().all()
    assert answer.status in ([], ["ok"] * VICTIMS)
    assert all(column.shape == (VICTIMS,) for column in answer.details.values())

    # What it leaves alone.
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(torch.get_rng_state(), noise), "the global generator was used"

    # The same streams, the same answer; and no victim depends on its neighbours.
    alone = attacked(given, [1])
    torch.testing.assert_close(alone.images[0], answer.images[1], atol=1e-6, rtol=0)
    assert torch.equal(attacked(given, [1]).images, alone.images)

    if given.undefended and given.attack.family != "control":
        error = (answer.images - given.images).square().mean((-3, -2, -1)).mean()
        floor = (given.mean - given.images).square().mean((-3, -2, -1)).mean()
        assert error < floor, f"mean squared error {error:.4f}, the mean image has {floor:.4f}"
