"""Sparsification: only the largest entries of the update are sent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Gt, Le
from torch import Tensor

from gradleak.defense import Defense, Message, Public
from gradleak.engine.closed_forms import ClosedForm, Largest
from gradleak.engine.objectives import cosine
from gradleak.mechanisms.packing import pack_bits, pack_floats
from gradleak.update import Update, flatten, squared_norm, unflatten


@dataclass(frozen=True, kw_only=True)
class TopK(Defense):
    """Sends the `ratio` largest entries by magnitude, the others as zeros.

    References: Aji and Heafield, arXiv:1704.05021; as a defense, Zhu et al., arXiv:1906.08935. The message shows
    which entries were sent, so the adaptive answer matches those, and knows that the others are smaller.
    """

    family = "compression"
    reference = "arXiv:1704.05021"
    linear = False
    has_likelihood = True

    ratio: Annotated[float, Gt(0), Le(1)] = 0.1
    """Share of entries that are sent; at least one."""
    scope: Literal["model", "tensor"] = "model"
    """Whether entries compete over the whole update or within their tensor (gradient pruning)."""

    def protect(self, update: Update, public: Public, generator: torch.Generator) -> Message:
        """Return the update with all but its largest entries set to zero."""
        sparse = torch.cat([self._largest(group) for group in self._groups(update)])
        return unflatten(sparse, {name: tensor.shape for name, tensor in update.items()})

    def nll(self, message: Message, simulated: Message, public: Public) -> Tensor:
        """Cosine on the entries that were sent, plus a hinge on the others that exceed the smallest of them."""
        seen = {name: torch.where(sent != 0, simulated[name], torch.zeros_like(sent)) for name, sent in message.items()}
        groups = zip(self._groups(message), self._groups(simulated), strict=True)
        excess = torch.stack([_excess(sent, guess) for sent, guess in groups]).sum()
        return cosine(seen, message) + excess / (squared_norm(message) + 1e-30)

    def closed_form(self, public: Public) -> ClosedForm:
        """The largest entries of the update or of each tensor."""
        return Largest(ratio=self.ratio, by_tensor=self.scope == "tensor")

    def residual(self, message: Message, simulated: Message, public: Public) -> Tensor:
        """Relative differences of the entries that were sent, and by how much others exceed the smallest of them."""
        groups = zip(self._groups(message), self._groups(simulated), strict=True)
        rows = torch.cat([torch.where(sent != 0, guess - sent, _beyond(sent, guess)) for sent, guess in groups])
        return rows / (squared_norm(message) + 1e-30).sqrt()

    def pack(self, message: Message, public: Public) -> bytes:
        """One byte (0: indices, 1: bitmap), then int32 indices or a bitmap, the shorter, then float32 values."""
        vector = flatten(message)
        kept = vector.nonzero().squeeze(1)
        indices = b"\0" + kept.to("cpu", torch.int32).numpy().tobytes()
        bitmap = b"\1" + pack_bits(vector != 0, bits=1)
        return min(indices, bitmap, key=len) + pack_floats(vector[kept])

    def _groups(self, update: Update) -> list[Tensor]:
        return [flatten(update)] if self.scope == "model" else [tensor.flatten() for tensor in update.values()]

    def _largest(self, vector: Tensor) -> Tensor:
        kept = vector.abs().topk(math.ceil(self.ratio * len(vector))).indices
        return torch.zeros_like(vector).index_put((kept,), vector[kept])


def _excess(sent: Tensor, guess: Tensor) -> Tensor:
    return _beyond(sent, guess).square().sum()


def _beyond(sent: Tensor, guess: Tensor) -> Tensor:
    """By how much each entry that was not sent exceeds the smallest that was."""
    mask = sent != 0
    smallest = torch.where(mask, sent.abs(), torch.full_like(sent, torch.inf)).amin()
    return torch.where(mask, torch.zeros_like(guess), (guess.abs() - smallest).relu())
