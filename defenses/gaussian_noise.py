"""Differentially private noise: per-example clipping and the Gaussian mechanism."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.defense import Message, Public
from gradleak.engine.closed_forms import ClosedForm, Compared
from gradleak.engine.objectives import relative_squared
from gradleak.engine.residuals import difference, entries
from gradleak.mechanisms.noise import ClippedNoise
from gradleak.update import Update, flatten, squared_norm


@dataclass(frozen=True, kw_only=True)
class GaussianNoise(ClippedNoise):
    """Clips each example's gradient to norm `clip` and adds N(0, (sigma * clip / B)^2) to their mean.

    References: Abadi et al., CCS 2016, arXiv:1607.00133. Without `clip` the noise has standard deviation
    `sigma` on the raw update, as in Zhu et al., arXiv:1906.08935, and no guarantee. The adaptive answer clips
    its guess too and matches by squared distance, the likelihood of Gaussian noise.
    """

    reference = "arXiv:1607.00133"
    linear = False
    has_likelihood = True

    @property
    def per_example_gradients(self) -> bool:
        """Clipping needs each example's own gradient."""
        return self.clip is not None

    @property
    def additive(self) -> bool:
        """Clipped gradients and their noise add up."""
        return True

    def per_example(self, gradient: Update, public: Public) -> Update:
        """Scale one example's gradient down to norm `clip`."""
        if self.clip is None:
            return gradient
        factor = (self.clip / (squared_norm(gradient) + 1e-30).sqrt()).clamp(max=1)
        return {name: factor * tensor for name, tensor in gradient.items()}

    def public(self, template: Update, batch_size: int, generator: torch.Generator) -> Public:
        """Return the noise's standard deviation, which every party can compute."""
        deviation = self.multiplier if self.clip is None else self.multiplier * self.clip / batch_size
        return {"deviation": flatten(template).new_tensor(deviation)}

    def protect(self, update: Update, public: Public, generator: torch.Generator) -> Message:
        """Add the noise."""
        if self.multiplier == 0:
            return update
        noise = {
            name: torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
            for name, tensor in update.items()
        }
        return {name: tensor + public["deviation"] * noise[name] for name, tensor in update.items()}

    def nll(self, message: Message, simulated: Message, public: Public) -> Tensor:
        """Squared distance relative to the message's squared norm."""
        return relative_squared(simulated, message)

    def closed_form(self, public: Public) -> ClosedForm:
        """Clipped gradients, compared by their squared distance."""
        noise = 0.0 if self.clip is None else float(public["deviation"]) / self.clip
        return Compared(clip=self.clip, objective="relative-squared", noise=noise)

    def residual(self, message: Message, simulated: Message, public: Public) -> Tensor:
        """Differences over the noise's standard deviation."""
        if self.multiplier == 0:
            return super().residual(message, simulated, public)
        return difference(simulated, message) / public["deviation"]

    def noise_floor(self, message: Message, public: Public) -> Tensor:
        """One an entry."""
        return entries(message) if self.multiplier else super().noise_floor(message, public)
