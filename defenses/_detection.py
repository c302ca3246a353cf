"""What clients share who look at the model before they train: they send as ever, or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Lt
from torch import Tensor, nn

from gradleak.defense import Defense


@dataclass(frozen=True, kw_only=True)
class Detection(Defense):
    """Sends the update as it is, unless the model looks more suspicious than honest ones do.

    The threshold of `inspect` comes from honest models, untrained and during training, for each batch size.
    """

    family = "detection"

    allowed: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of honest rounds that the threshold may refuse where it is set."""

    @property
    def false_alarms(self) -> float:
        """The share that is allowed."""
        return self.allowed


def matrices(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a model's layers as matrices [rows, inputs], by name."""
    for name, tensor in module.named_parameters():
        if tensor.ndim >= 2 and tensor.is_floating_point():
            yield name, tensor.detach().flatten(1).double()
