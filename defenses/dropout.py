"""Dropout: the client's gradient is that of a random sub-network nobody else knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn

from gradleak.defense import Defense
from gradleak.mechanisms import dropout


@dataclass(frozen=True, kw_only=True)
class Dropout(Defense):
    """Drops every hidden unit with probability `rate` and scales the others by 1 / (1 - rate).

    References: Srivastava et al., JMLR 15, 2014; as a defense and its inversion, Scheliga, Mäder, Seeland,
    AAAI 2023, arXiv:2208.06163. Each image has its own masks, drawn by the client. An oblivious attacker runs
    the model without dropout, as in eval mode; who knows the defense knows rate and sites, only an oracle the
    masks. One draw serves all local steps of a FedAvg client.
    """

    family = "model"
    reference = "arXiv:2208.06163"
    counter_attacks = ("dropout-inversion",)

    rate: Annotated[float, Ge(0), Lt(1)] = 0.25
    """Probability that a unit is dropped."""

    def prepare_model(self, module: nn.Module) -> nn.Module:
        """Return a copy with dropout sites; see `gradleak.mechanisms.dropout.insert`."""
        return dropout.insert(module, self.rate)

    def private_buffers(self, module: nn.Module, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw a mask for every site and image."""
        shapes = dropout.mask_shapes(module, images)
        return {
            # Drawn in float64 so that float32 and float64 runs have the same masks.
            name: dropout.bernoulli(torch.rand(shape, generator=generator, dtype=torch.float64), self.rate).to(images)
            for name, shape in shapes.items()
        }
