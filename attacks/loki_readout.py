"""The read-out of LOKI: of a sum's gradient the columns that are one client's."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from gradleak.attack import Attack, Reconstruction
from gradleak.defense import Defense
from gradleak.mechanisms.imprint import Apart
from gradleak.seeds import Generators
from gradleak.threat import Knowledge, Observation, Power, Setting

from ._bins import answer, blocks


@dataclass(frozen=True, kw_only=True)
class LokiReadout(Attack):
    """Divides the columns of the victim's channels by that of its constant channel: an image that is alone in its bin.

    Other clients of the sum have other channels and are not read here. References: Zhao et al., S&P 2024,
    arXiv:2303.12233.
    """

    family = "analytic"
    reference = "arXiv:2303.12233"
    needs = Knowledge(server=Power.ARCHITECTURE)

    def unsuited(self, module: nn.Module, setting: Setting, defense: Defense) -> str | None:
        """It needs the block."""
        found = any(blocks(module, Apart))
        return None if found else "needs a server that keeps the clients of a sum apart, and rows that are trained"

    def reconstruct(self, observation: Observation, generator: Generators) -> Reconstruction:
        """Return the victim's images that are alone in their bins."""
        ((name, block), *_) = blocks(observation.network.module, Apart)
        assert isinstance(block, Apart)
        images, weights = block.own(observation.gradient[f"{name}.rows.weight"].double())
        return answer(images, weights, f"{name}.copy", observation)
