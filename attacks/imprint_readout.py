"""The read-out of an imprint: differences of neighbouring rows' gradients are images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradleak.attack import Attack, Reconstruction
from gradleak.defense import Defense
from gradleak.mechanisms.imprint import Imprint
from gradleak.seeds import Generators
from gradleak.threat import Knowledge, Observation, Power, Setting

from ._bins import answer, blocks


@dataclass(frozen=True, kw_only=True)
class ImprintReadout(Attack):
    """Divides what a bin adds to the weights' gradient by what it adds to the biases': an image that is alone there.

    Rows are in the order of their edges. Cumulative: a row less the next one, and the last row by itself, so that the
    top bin is not lost; one-shot: the difference of its two rows only. Sparse: every row by itself. Empty bins drop
    out; of more bins than images the strongest are answered. References: Fowl et al., ICLR 2022, arXiv:2110.13057.
    """

    family = "analytic"
    reference = "arXiv:2110.13057"
    needs = Knowledge(server=Power.ARCHITECTURE)

    def unsuited(self, module: nn.Module, setting: Setting, defense: Defense) -> str | None:
        """It needs the block."""
        found = any(blocks(module, Imprint))
        return None if found else "needs a server that puts an imprint block into the model, whose rows are trained"

    def reconstruct(self, observation: Observation, generator: Generators) -> Reconstruction:
        """Return the images that are alone in their bins."""
        ((name, block), *_) = blocks(observation.network.module, Imprint)
        assert isinstance(block, Imprint)
        weight, bias = (observation.gradient[f"{name}.rows.{part}"].double() for part in ("weight", "bias"))
        if not block.sparse:
            weight, bias = (_less_the_next(rows, block.closed) for rows in (weight, bias))
        return answer(weight, bias, f"{name}.rows", observation)


def _less_the_next(rows: Tensor, closed: bool) -> Tensor:
    """Rows [N, K, ...] less those that follow, and the last by itself unless it only ends the bin before."""
    inner = rows[:, :-1] - rows[:, 1:]
    return inner if closed else torch.cat([inner, rows[:, -1:]], dim=1)
