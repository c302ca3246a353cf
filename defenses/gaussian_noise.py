"""Differentially private noise: per-example clipping and the Gaussian mechanism."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Lt
from opacus.accountants import RDPAccountant
from torch import Tensor

from gradleak.defense import Defense, Guarantee, Message, Public
from gradleak.engine.objectives import relative_squared
from gradleak.engine.residuals import difference, entries
from gradleak.threat import Setting
from gradleak.update import Update, flatten, squared_norm


@dataclass(frozen=True, kw_only=True)
class GaussianNoise(Defense):
    """Clips each example's gradient to norm `clip` and adds N(0, (sigma * clip / B)^2) to their mean.

    References: Abadi et al., CCS 2016, arXiv:1607.00133. Without `clip` the noise has standard deviation
    `sigma` on the raw update, as in Zhu et al., arXiv:1906.08935, and no guarantee. The adaptive answer clips
    its guess too and matches by squared distance, the likelihood of Gaussian noise.
    """

    family = "noise"
    reference = "arXiv:1607.00133"
    linear = False
    has_likelihood = True

    sigma: Annotated[float, Ge(0)] = 1.0
    """Noise multiplier; without clipping the noise's standard deviation itself."""
    clip: Annotated[float, Gt(0)] | None = 1.0
    """Largest norm of one example's gradient."""
    delta: Annotated[float, Gt(0), Lt(1)] = 1e-5

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
        deviation = self.sigma if self.clip is None else self.sigma * self.clip / batch_size
        return {"deviation": flatten(template).new_tensor(deviation)}

    def protect(self, update: Update, public: Public, generator: torch.Generator) -> Message:
        """Add the noise."""
        if self.sigma == 0:
            return update
        noise = {
            name: torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
            for name, tensor in update.items()
        }
        return {name: tensor + public["deviation"] * noise[name] for name, tensor in update.items()}

    def nll(self, message: Message, simulated: Message, public: Public) -> Tensor:
        """Squared distance relative to the message's squared norm."""
        return relative_squared(simulated, message)

    def residual(self, message: Message, simulated: Message, public: Public) -> Tensor:
        """Differences over the noise's standard deviation."""
        if self.sigma == 0:
            return super().residual(message, simulated, public)
        return difference(simulated, message) / public["deviation"]

    def noise_floor(self, message: Message, public: Public) -> Tensor:
        """One an entry."""
        return entries(message) if self.sigma else super().noise_floor(message, public)

    def guarantee(self, setting: Setting) -> Guarantee | None:
        """Return epsilon of one message with clipping, by Opacus' Rényi accountant."""
        return self._account(setting, 1.0, 1, "one example added or removed, one message")

    def run_guarantee(
        self, setting: Setting, sampling_rate: float | None = None, steps: int | None = None
    ) -> Guarantee | None:
        """As `guarantee`, of many messages."""
        rate, rounds = sampling_rate or 1.0, steps or 1
        unit = f"one example added or removed, {rounds} rounds at sampling rate {rate:g}"
        return self._account(setting, rate, rounds, unit)

    def _account(self, setting: Setting, rate: float, steps: int, unit: str) -> Guarantee | None:
        if self.clip is None or self.sigma == 0 or setting.local_lr is not None:
            return None
        accountant = RDPAccountant()
        accountant.history = [(self.sigma, rate, steps)]
        with warnings.catch_warnings():
            # Opacus says that its orders are few for such little noise; epsilon is astronomic there anyway.
            warnings.simplefilter("ignore", UserWarning)
            epsilon = float(accountant.get_epsilon(delta=self.delta))
        return Guarantee(epsilon, self.delta, "Opacus RDP", unit)
