"""Random sparsification: the entries that a shared seed picks are sent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Gt, Le

from gradleak.defense import Defense, Message, Public
from gradleak.engine.closed_forms import ClosedForm, Compared, Picked
from gradleak.mechanisms.sketching import layout, shapes_of
from gradleak.update import Update, flatten, unflatten


@dataclass(frozen=True, kw_only=True)
class RandomK(Defense):
    """Sends the k = `ratio` d entries that the round's public randomness picks, over all tensors.

    References: Stich, Cordonnier, Jaggi, NeurIPS 2018, arXiv:1809.07599; Konečný et al., arXiv:1610.05492. The
    mask is public and costs nothing to send, so the adaptive answer matches those entries alone.
    """

    family = "compression"
    reference = "arXiv:1809.07599"
    linear = True
    simulates = True

    ratio: Annotated[float, Gt(0), Le(1)] = 0.1
    """Share of entries that are sent."""
    unbiased: bool = True
    """Whether the server scales what it got by d / k, so that its expectation is the update."""

    def public(self, template: Update, batch_size: int, generator: torch.Generator) -> Public:
        """Draw the positions that are sent, int64 [k], sorted; add the parameters' shapes."""
        like = flatten(template)
        picked = torch.randperm(len(like), generator=generator)[: math.ceil(self.ratio * len(like))]
        return {"picked": picked.sort().values.to(like.device)} | layout(template)

    def protect(self, update: Update, public: Public, generator: torch.Generator) -> Message:
        """Pick the entries."""
        return self.simulate(update, public)

    def simulate(self, update: Update, public: Public) -> Message:
        """Pick the entries."""
        return {"values": flatten(update).gather(0, public["picked"])}

    def closed_form(self, public: Public) -> ClosedForm:
        """Entries of the update, compared by the attack."""
        return Compared(linear=Picked(key="values", entries=public["picked"]))

    def decode(self, message: Message, public: Public) -> Update:
        """Put the entries back, zeros elsewhere."""
        values, shapes = message["values"], shapes_of(public)
        dimension = sum(math.prod(shape) for shape in shapes.values())
        scale = dimension / len(values) if self.unbiased else 1.0
        return unflatten(values.new_zeros(dimension).scatter(0, public["picked"], scale * values), shapes)
