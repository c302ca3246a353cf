"""What an attack promises."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .. import registry
from ..attack import Attack, Reconstruction
from ..dataset import Data
from ..defense import Defense
from ..federation import client
from ..federation.observation import observe
from ..mechanisms import batch_statistics
from ..model import initialise
from ..reconstruction import complete
from ..seeds import Generators
from ..server import Server
from ..threat import BatchNorm, Knowledge, Labels, Level, Observation, Power, Setting, rank
from ..update import Network
from .findings import Unchecked, close, require
from .victims import VICTIMS, Ask, tensors_of, tuning_victims

CHEAP = {"restarts": 1, "trials": 512, "rounds": 20, "iterations": 30}
"""Options that make a run short, where an attack has them and its case says nothing else."""


ATTACKS = ("optimisation", "analytic", "generative", "learned", "control")
"""Families of attacks."""


# Attacks


@dataclass(frozen=True)
class Case:
    """What an attack is checked on."""

    model: str
    model_options: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    defense: str = "none"
    defense_options: dict[str, Any] = field(default_factory=dict)
    dataset: str = "digits"
    batch_size: int = 1
    local_lr: float | None = None
    """Rate of one local step of FedAvg."""
    server: str = "honest"
    server_options: dict[str, Any] = field(default_factory=dict)


USUAL = (
    Case("mlp", {"widths": (32,)}),
    Case("lenet"),
    Case("convnet", {"width": 4}),
    Case("vit", {"dim": 16, "depth": 1, "heads": 2}),
)
"""Tried in turn until one suits the attack."""
SERVED = (
    Case("mlp", {"widths": (32,)}, batch_size=4, server="imprint", server_options={"bins": 16}),
    Case("mlp", {"widths": (32,)}, batch_size=4, server="loki", server_options={"bins": 16, "clients": 2}),
    Case("mlp", {"widths": (64,)}, batch_size=4, server="trap-weights"),
)
"""Tried in turn with attacks that need a malicious server."""


class AttackCase:
    """An attack on a small case, and what it answers."""

    def __init__(self, name: str, cases: Sequence[Case] = USUAL, ask: Ask | None = None):
        """Take the attack of a name, and cases of which the first that suits it counts."""
        self._ask = ask or Ask()
        self.name, self._cases = name, [Case(self._ask.model)] if self._ask.model else cases
        self.attack = self._build(self._cases[0])
        if self._cases is USUAL and self.attack.needs.server is not Power.HONEST:
            self._cases = SERVED
        self.changed: list[str] = []
        """What its runs changed that is not theirs."""

    def _build(self, case: Case) -> Attack:
        fields = {item.name for item in dataclasses.fields(registry.load("attacks", self.name))}
        options = {key: value for key, value in {**CHEAP, **case.options}.items() if key in fields}
        attack: Attack = registry.build("attacks", self.name, {**options, **self._ask.options})
        return attack

    @cached_property
    def scene(self) -> tuple[Observation, Tensor]:
        """What the attack sees, and the images [N, B, C, H, W] that it should find."""
        if self.attack.needs.generator:
            raise Unchecked("needs a trained generator")
        for case in self._cases:
            self.attack = attack = self._build(case)
            data = self._ask.data(case.dataset)
            defense: Defense = registry.build("defenses", case.defense, case.defense_options)
            setting = Setting(batch_size=case.batch_size, precision="float64", local_lr=case.local_lr)
            module = initialise(registry.build("models", case.model, case.model_options), data.shape, data.classes, 0)
            server: Server = registry.build("servers", case.server, case.server_options)
            module = server.tamper(module, data.split.train, torch.Generator().manual_seed(0))
            network = client.client_network(module, defense, setting)
            reason = attack.unsuited(network.module, setting, defense)
            if reason is None:
                return _observed(attack, data, network, defense, setting)
        raise Unchecked(f"no usual case suits it: {reason}")

    def run(self, rows: Sequence[int] = tuple(range(VICTIMS))) -> Reconstruction:
        """Attack all victims, or some of them on their own."""
        seen, chosen = self.scene[0], list(rows)
        observation = replace(
            seen,
            message={name: tensor[chosen] for name, tensor in seen.message.items()},
            update={name: tensor[chosen] for name, tensor in seen.update.items()},
            labels=None if seen.labels is None else seen.labels[chosen],
            private=None if seen.private is None else {name: t[chosen] for name, t in seen.private.items()},
        )
        names = [("victim", index) for index in chosen]
        before, noise = tensors_of(observation), torch.get_rng_state()
        answer = self.attack.reconstruct(observation, Generators(names, dtype=torch.float64))
        complete(answer, self.attack, observation)
        after = tensors_of(observation)
        self.changed += [name for name in before if not torch.equal(before[name], after[name])]
        self.changed += [] if torch.equal(torch.get_rng_state(), noise) else ["the global generator"]
        return answer

    @cached_property
    def answer(self) -> Reconstruction:
        """The answer for all victims."""
        return self.run()

    @cached_property
    def alone(self) -> Reconstruction:
        """The answer for the second victim on its own."""
        return self.run([1])


def _observed(
    attack: Attack, data: Data, network: Network, defense: Defense, setting: Setting
) -> tuple[Observation, Tensor]:
    images, labels = tuning_victims(data, setting.batch_size)
    sent = client.send(network, images, labels, data.classes, defense, setting, 1, list(range(VICTIMS)))
    granted = Knowledge(
        labels=Labels.KNOWN if rank(attack.needs.labels) >= rank(Labels.COUNTS) else Labels.NONE,
        batch_norm=BatchNorm.RUNNING if batch_statistics.running(network.module) else BatchNorm.NONE,
        defense=Level.ORACLE if attack.needs.defense is Level.ORACLE else Level.PUBLIC,
        auxiliary=attack.needs.auxiliary or attack.family == "control",
    )
    public = data.split.train
    observation = observe(sent, network, defense, setting, data.shape, labels, data.classes, granted, auxiliary=public)
    return observation, images


def attack_declares_itself(case: AttackCase) -> None:
    """Declares family, reference and what it needs."""
    attack = case.attack
    require(getattr(attack, "family", None) in ATTACKS, f"family is none of {', '.join(ATTACKS)}")
    require(getattr(attack, "reference", ""), "reference is missing")
    require(registry.build("attacks", case.name, registry.options_of(attack)) == attack, "options do not rebuild it")


def attack_answers_every_victim(case: AttackCase) -> None:
    """Answers every victim with finite images in [0, 1], detached, in the precision it was given."""
    images, answer = case.scene[1], case.answer
    require(answer.images.shape == images.shape, f"images {tuple(answer.images.shape)}, not {tuple(images.shape)}")
    require(answer.images.dtype == images.dtype, f"images are {answer.images.dtype}, not {images.dtype}")
    require(not answer.images.requires_grad, "images still require a gradient")
    require(answer.images.isfinite().all(), "images are not finite")
    require(((answer.images >= 0) & (answer.images <= 1)).all(), "images are not in [0, 1]")
    if answer.labels is not None:
        fits = answer.labels.shape == images.shape[:2] and answer.labels.dtype == torch.int64
        found = f"{answer.labels.dtype} {tuple(answer.labels.shape)}"
        require(fits, f"labels are {found}, not int64 {tuple(images.shape[:2])}")
    if answer.loss is not None:
        fits = answer.loss.shape == (VICTIMS,) and bool(answer.loss.isfinite().all())
        require(fits, f"loss {tuple(answer.loss.shape)}, not {VICTIMS} finite numbers")
    require(answer.status in ([], ["ok"] * VICTIMS), f"status {answer.status}")
    wrong = [name for name, column in answer.details.items() if column.shape != (VICTIMS,)]
    require(not wrong, f"details have another shape than [{VICTIMS}]: {', '.join(wrong)}")


def attack_leaves_things_alone(case: AttackCase) -> None:
    """Changes nothing it is handed, and leaves the global generator alone."""
    require(case.answer and not case.changed, f"changed {', '.join(case.changed[:3])}")


def attack_repeats_itself(case: AttackCase) -> None:
    """Gives the same answer to the same observation and streams."""
    require(torch.equal(case.run([1]).images, case.alone.images), "two runs differ")


def attack_treats_victims_apart(case: AttackCase) -> None:
    """Answers no victim differently for its neighbours."""
    close(case.alone.images[0], case.answer.images[1], "a victim alone and among others", atol=1e-6, rtol=0)
