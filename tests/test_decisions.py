"""What a defense decides does not hang on rounding, and what it makes of labels reaches the attacks."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from gradleak import registry
from gradleak.attacks.inverting_gradients import InvertingGradients
from gradleak.contract.defenses import DefenseCase, defense_decides_by_more_than_rounding
from gradleak.contract.findings import Broken
from gradleak.dataset import Data
from gradleak.defense import Defense, Loss, Message, Public, View
from gradleak.defenses.censor import Censor
from gradleak.federation import client
from gradleak.model import initialise
from gradleak.seeds import Generators
from gradleak.testing import Scene
from gradleak.threat import Setting
from gradleak.update import Update

CHOICES = """
import sys, torch
from tests.test_decisions import choices
torch.set_num_threads(1)
torch.save(choices(), sys.argv[1])
"""


def choices() -> dict[str, Message]:
    """Messages of defenses that choose, for 6 digits."""
    data = Data(registry.build("datasets", "digits"), "digits")
    images, labels = data.victims(6, 2, tuning=True)
    found = {}
    for name in ("censor", "soteria", "outpost", "top-k", "dgc"):
        defense: Defense = registry.build("defenses", name)
        setting = Setting(batch_size=2)
        module = initialise(registry.build("models", "lenet"), data.shape, 10, 0)
        network = client.client_network(module, defense, setting)
        found[name] = client.send(network, images, labels, 10, defense, setting, 1, list(range(6))).message
    return found


def test_another_instruction_set_decides_alike(tmp_path: Path) -> None:
    here = choices()
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "PYTHONPATH": root}
    subprocess.run([sys.executable, "-c", CHOICES, str(tmp_path / "there")], check=True, env=environment, cwd=root)
    there: dict[str, Message] = torch.load(tmp_path / "there")
    for name, message in here.items():
        for each, tensor in message.items():
            gap, size = (tensor - there[name][each]).norm(), tensor.norm()
            assert float(gap) <= 1e-4 * float(size) + 1e-12, f"{name}: {each}"


@dataclass(frozen=True, kw_only=True)
class _Hasty(Censor):
    """Compares losses as float32 holds them."""

    def release(self, update: Update, public: Public, generator: torch.Generator, loss: Loss) -> Message:
        kind = next(iter(update.values())).dtype
        return super().release(update, public, generator, lambda step: loss(step).to(kind))


def test_the_check_finds_a_decision_in_float32() -> None:
    defense_decides_by_more_than_rounding(DefenseCase(Censor()))
    with pytest.raises(Broken, match="decide in float64"):
        defense_decides_by_more_than_rounding(DefenseCase(_Hasty()))


@dataclass(frozen=True, kw_only=True)
class _Smoothing(Defense):
    """The client trains on (1 - s) y + s / K, written with `encode` alone."""

    family = "data"
    reference = "test"
    s: float = 0.5

    def encode(
        self, images: torch.Tensor, targets: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return images, (1 - self.s) * targets + self.s / targets.shape[-1]


def test_smoothed_labels_protect_nobody_who_is_told_of_them() -> None:
    data = Data(registry.build("datasets", "digits"), "digits")
    images, labels = data.victims(3, 1, tuning=True)
    model = registry.build("models", "mlp", {"widths": (64,), "activation": "sigmoid"})
    defense = _Smoothing()
    scene = Scene.of(initialise(model, data.shape, 10, 0), images, labels, defense, Setting())
    sent, seen = scene.sent, scene.observe()
    found = {}
    for view in (None, View(defense, None), View(defense, sent.public)):
        observation = replace(seen, view=view)
        streams = Generators([1, 2, 3], "cpu", torch.float32, 0)
        answer = InvertingGradients(iterations=200).reconstruct(observation, streams)
        assert answer.labels is not None and torch.equal(answer.labels, labels)
        mse = (answer.images - images).square().flatten(1).mean(1)
        found[None if view is None else view.complete] = float((-10 * mse.log10()).mean())
    assert found[None] < 40 and found[False] >= 60 and found[True] >= 60, found
