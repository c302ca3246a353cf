"""Annealed gradient noise: made for optimisation, often taken for privacy."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from gradleak.defense import Defense, Message, Public
from gradleak.defenses.gaussian_noise import GaussianNoise
from gradleak.update import Update, flatten


@dataclass(frozen=True, kw_only=True)
class GradientNoise(Defense):
    """Adds N(0, eta / (1 + t)^gamma) to the gradient of round t.

    References: Neelakantan et al., arXiv:1511.06807. Nothing is clipped, so there is no guarantee. The noise is
    additive, white and public in scale, so there is nothing more to know than that: the adaptive answer is the
    squared distance, the likelihood of Gaussian noise.
    """

    family = "noise"
    reference = "arXiv:1511.06807"
    linear = False
    has_likelihood = True

    eta: Annotated[float, Ge(0)] = 0.01
    """Variance of the noise in round 0."""
    gamma: Annotated[float, Ge(0)] = 0.55
    """How fast the variance falls."""
    round: Annotated[int, Ge(0)] = 0
    """Round t of the attacked message."""

    @property
    def deviation(self) -> float:
        """Standard deviation of the noise in this round."""
        return math.sqrt(self.eta / (1 + self.round) ** self.gamma)

    @property
    def additive(self) -> bool:
        """Noise adds up."""
        return True

    def at_round(self, index: int, epoch: int) -> GradientNoise:
        """Return the defense of that round."""
        return replace(self, round=index)

    def protect(self, update: Update, public: Public, generator: torch.Generator) -> Message:
        """Add the noise."""
        return self._noise.protect(update, self._scale(update), generator)

    def nll(self, message: Message, simulated: Message, public: Public) -> Tensor:
        """Squared distance relative to the message's squared norm."""
        return self._noise.nll(message, simulated, public)

    def residual(self, message: Message, simulated: Message, public: Public) -> Tensor:
        """Differences over the noise's standard deviation."""
        return self._noise.residual(message, simulated, self._scale(message))

    def noise_floor(self, message: Message, public: Public) -> Tensor:
        """One an entry."""
        return self._noise.noise_floor(message, public)

    def _scale(self, like: Message) -> Public:
        """What `GaussianNoise` publishes; here it follows from the options, so nothing is published."""
        return {"deviation": flatten(like).new_tensor(self.deviation)}

    @property
    def _noise(self) -> GaussianNoise:
        return GaussianNoise(sigma=self.deviation, clip=None)
