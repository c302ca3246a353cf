"""Variational information bottleneck: the classifier sees a noisy code of the features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn

from gradleak.defense import Defense
from gradleak.mechanisms import bottleneck


@dataclass(frozen=True, kw_only=True)
class VIB(Defense):
    """Puts a variational bottleneck in place of the features: a new last layer classifies its sample.

    References: Alemi, Fischer, Dillon, Murphy, arXiv:1612.00410. The loss gets `beta` times the divergence from
    N(0, 1) in bits; each image has its own noise, drawn by the client. Answered like PRECODE, which differs in
    that it goes back to the features and keeps the last layer. An oblivious attacker takes the mean code.
    """

    family = "representation"
    reference = "arXiv:1612.00410"
    counter_attacks = ("linear-leakage", "bottleneck-inversion")

    width: Annotated[int, Ge(1)] = 256
    """Numbers in the bottleneck."""
    beta: Annotated[float, Ge(0)] = 1e-2
    """Weight of the divergence."""
    stochastic: bool = True
    """Whether clients sample the code; otherwise they take its mean."""
    seed: int = 0
    """Seed of the new weights."""

    def prepare_model(self, module: nn.Module) -> nn.Module:
        """Return a copy with the bottleneck and a new last layer."""
        return bottleneck.insert(module, self.width, self.beta, expand=False, seed=self.seed)

    def private_buffers(self, module: nn.Module, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw the bottleneck's noise for each image."""
        if not self.stochastic:
            return {}
        return {
            # Drawn in float64 so that float32 and float64 runs have the same noise.
            name: torch.randn(shape, generator=generator, dtype=torch.float64).to(images)
            for name, shape in bottleneck.noise_shapes(module, len(images)).items()
        }
