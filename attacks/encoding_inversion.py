"""Encoding inversion: searches for the images behind encoded ones, through the encoding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

from torch import nn

from gradleak.attack import GradientMatching, Reconstruction
from gradleak.defense import Defense
from gradleak.engine.optimisers import Variables
from gradleak.engine.problem import Facts, Guess, Problem
from gradleak.mechanisms.encoding import Encoding
from gradleak.seeds import Generators
from gradleak.threat import Knowledge, Labels, Level, Observation, Setting
from gradleak.update import one_hot

_IMAGES = "encoded from"
"""Name under which a guess carries the images before their encoding; no model has a buffer of that name."""


@dataclass(frozen=True, kw_only=True)
class EncodingInversion(GradientMatching):
    """Minimises one minus the cosine plus total variation over images and latents of an encoding, with Adam.

    Counters mixup (arXiv:2112.00059), InstaHide (arXiv:2010.02772) and augmentation (arXiv:2011.12505): the guess goes
    through the encoding that the client used, whose mixing coefficients and signs are searched for too; the images
    before it are returned. Labels must be known. Our own attack.
    """

    tuning = "tv, lr, schedule, restarts: 11 trials on 4 tuning victims of digits (lenet, mlp), augmentation and mixup"
    reference = "gradleak, counters arXiv:2112.00059, arXiv:2011.12505"
    needs = Knowledge(labels=Labels.KNOWN, defense=Level.PARAMETERS)

    objective: str = "cosine"
    lr: float = 0.1
    iterations: int = 2000
    tv: float = 1e-6

    def unsuited(self, module: nn.Module, setting: Setting, defense: Defense) -> str | None:
        """It needs an encoding."""
        if not isinstance(defense, Encoding):
            return "needs a defense that encodes images (mixup, augmentation)"
        return super().unsuited(module, setting, defense)

    def initial(self, observation: Observation, generator: Generators) -> Variables:
        """Initial pixels, and numbers in place of the latents."""
        shapes = _encoding(observation).unknowns(observation.batch_size, observation.shape)
        numbers = {f"latent {name}": 0.1 * generator.normal(*shape) for name, shape in shapes.items()}
        return super().initial(observation, generator) | numbers

    def problem(self, observation: Observation) -> Problem:
        """One trial's loss, its guess sent through the encoding."""
        encoding, plain = _encoding(observation), super().problem(observation)

        def decode(variables: Variables, facts: Facts) -> Guess:
            guess = plain.decode(variables, facts)
            numbers = {name.removeprefix("latent "): v for name, v in variables.items() if name.startswith("latent ")}
            images, targets = encoding.apply(guess.images, guess.targets, encoding.relax(numbers))
            return Guess(images, targets, {_IMAGES: guess.images}, before=guess.images)

        return replace(plain, decode=decode)

    def facts(self, observation: Observation) -> Facts:
        """What is known of each victim; targets are labels, which the guess sends through the encoding."""
        targets = one_hot(self.labels(observation), observation.classes, observation.dtype)
        return replace(super().facts(observation), targets=targets)

    def reconstruct(self, observation: Observation, generator: Generators) -> Reconstruction:
        """Return the images before the encoding."""
        answer = super().reconstruct(observation, generator)
        images = answer.guessed.pop(_IMAGES).clamp(0, 1)
        return replace(answer, images=images, labels=self.labels(observation), candidates=None)


def _encoding(observation: Observation) -> Encoding:
    view = observation.view
    assert view is not None
    return cast(Encoding, view.defense)
