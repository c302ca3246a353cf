"""DIFF2: clients send noised differences of gradients, which are small where the model hardly moves."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor, nn
from torch.func import functional_call

from gradleak import seeds
from gradleak.defense import Message, Public
from gradleak.defenses.gaussian_noise import GaussianNoise
from gradleak.mechanisms.noise import ClippedNoise
from gradleak.update import Extended, Update, cross_entropy


@dataclass(frozen=True, kw_only=True)
class Diff2(ClippedNoise):
    """Sends the difference of the gradients at this round's and the last round's parameters, clipped and noised.

    References: Murata, Suzuki, arXiv:2302.03884. Each example's difference is clipped to norm clip * |w - w'| and
    the mean gets noise of multiplier `sigma` on that bound; a message between two restarts of the algorithm.
    The server knows both models, so matching simulates the difference.

    A single attacked round has no history: w' is w minus a random vector of length `distance`, so the size of the
    model's last step is real and its direction is not. It stands for the same client's data in both rounds.
    """

    reference = "arXiv:2302.03884"
    single_round = True
    linear = False
    has_likelihood = True

    distance: Annotated[float, Gt(0)] = 0.1
    """Length |w - w'| of the model's last step."""
    clip: Annotated[float, Gt(0)] = 1.0
    """Largest norm of one example's difference over `distance`."""
    seed: int = 0
    """Seed of the model's last step."""

    @property
    def per_example_gradients(self) -> bool:
        """Clipping needs each example's own difference."""
        return True

    def prepare_model(self, module: nn.Module) -> nn.Module:
        """Return the model with a loss whose gradient is the difference."""
        return _Difference(module, self.distance, self.seed)

    @property
    def additive(self) -> bool:
        """Clipped gradients and their noise add up."""
        return True

    def per_example(self, gradient: Update, public: Public) -> Update:
        """Scale one example's difference down to its bound."""
        return self._noise.per_example(gradient, public)

    def public(self, template: Update, batch_size: int, generator: torch.Generator) -> Public:
        """Return the noise's standard deviation."""
        return self._noise.public(template, batch_size, generator)

    def protect(self, update: Update, public: Public, generator: torch.Generator) -> Message:
        """Add the noise."""
        return self._noise.protect(update, public, generator)

    def nll(self, message: Message, simulated: Message, public: Public) -> Tensor:
        """Squared distance relative to the message's squared norm."""
        return self._noise.nll(message, simulated, public)

    def residual(self, message: Message, simulated: Message, public: Public) -> Tensor:
        """Differences over the noise's standard deviation, or relative ones without noise."""
        return self._noise.residual(message, simulated, public)

    def noise_floor(self, message: Message, public: Public) -> Tensor:
        """One an entry, if there is noise."""
        return self._noise.noise_floor(message, public)

    @property
    def _noise(self) -> GaussianNoise:
        return GaussianNoise(sigma=self.multiplier, clip=self.clip * self.distance, delta=self.delta)


class _Difference(Extended):
    """Loss L(w) - L(w - step): its gradient is the difference of gradients at w and w - step."""

    def __init__(self, model: nn.Module, distance: float, seed: int):
        super().__init__()
        self.model = copy.deepcopy(model)
        drawn = {
            name: torch.randn(weight.shape, generator=seeds.generator("diff2", seed, name), dtype=torch.float64)
            for name, weight in model.named_parameters()
        }
        length = math.sqrt(sum(float(step.square().sum()) for step in drawn.values()))
        # Buffers cannot have dots in their names; they follow the parameters' order.
        for index, (name, weight) in enumerate(model.named_parameters()):
            self.register_buffer(f"step{index}", (drawn[name] * distance / length).to(weight), persistent=False)

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        scores: Tensor = self.model(images)
        if targets is None:
            return scores
        last = {
            name: weight - self.get_buffer(f"step{index}")
            for index, (name, weight) in enumerate(self.model.named_parameters())
        }
        return scores, -cross_entropy(functional_call(self.model, last, (images,)), targets)
