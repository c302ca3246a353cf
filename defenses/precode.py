"""PRECODE: a variational bottleneck whose noise the gradient cannot be reproduced without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn

from gradleak.defense import Defense
from gradleak.mechanisms import bottleneck


@dataclass(frozen=True, kw_only=True)
class Precode(Defense):
    """Puts a variational bottleneck before the last layer; each image has its own noise, drawn by the client.

    References: Scheliga, Mäder, Seeland, WACV 2022, arXiv:2108.04725. The loss gets `beta` times the divergence
    from N(0, 1) in bits. Layers before the bottleneck are unprotected (Balunović et al., arXiv:2111.04706): a first
    linear layer with bias gives its input away whatever the noise was, and elsewhere the noise is `width` more
    unknowns an image, which `bottleneck-inversion` searches for. An oblivious attacker runs the mean.
    """

    family = "representation"
    reference = "arXiv:2108.04725"
    counter_attacks = ("linear-leakage", "bottleneck-inversion")

    width: Annotated[int, Ge(1)] = 256
    """Numbers in the bottleneck."""
    beta: Annotated[float, Ge(0)] = 1e-3
    """Weight of the divergence."""
    seed: int = 0
    """Seed of the new weights."""

    def prepare_model(self, module: nn.Module) -> nn.Module:
        """Return a copy with the bottleneck, a layer back to the features, and the last layer."""
        return bottleneck.insert(module, self.width, self.beta, expand=True, seed=self.seed)

    def private_buffers(self, module: nn.Module, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw the bottleneck's noise for each image."""
        return {
            # Drawn in float64 so that float32 and float64 runs have the same noise.
            name: torch.randn(shape, generator=generator, dtype=torch.float64).to(images)
            for name, shape in bottleneck.noise_shapes(module, len(images)).items()
        }
