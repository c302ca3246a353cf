"""Deep gradient compression: very sparse updates whose unsent part waits at the client."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from gradleak.defense import Defense, Loss, Memory, Message, Public
from gradleak.defenses.top_k import TopK
from gradleak.update import Update, squared_norm

_Memory = tuple[Update, Update]
"""Momentum and accumulated update of a client, both without what was sent."""


@dataclass(frozen=True, kw_only=True)
class DGC(Defense):
    """Sends the largest entries of each tensor of the clipped, momentum-corrected, accumulated update.

    References: Lin, Han, Mao, Wang, Dally, ICLR 2018, arXiv:1712.01887. A client's first message, the one that is
    attacked, has empty memory: there momentum has no effect, and it is `top-k` within tensors of the clipped update.
    `compress` carries the memory over rounds. Deviation: exact order statistics in place of a sampled threshold.
    """

    family = "compression"
    reference = "arXiv:1712.01887"
    linear = False
    simulates = True
    has_likelihood = True

    ratio: Annotated[float, Gt(0), Le(1)] = 0.001
    """Share of entries that are sent once warm."""
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Factor of the local momentum; acts from a client's second message on."""
    clip: Annotated[float, Gt(0)] | None = None
    """Largest norm of a client's update (in the paper a threshold over the root of the number of clients)."""
    warm_up: Annotated[int, Ge(0)] = 0
    """Epochs over which the share falls to `ratio`."""
    epoch: Annotated[int, Ge(0)] = 0
    """Epoch of the message: its share is ratio^((epoch + 1) / (warm_up + 1)) while it is below `warm_up`."""

    @property
    def share(self) -> float:
        """Share of entries that are sent in this epoch."""
        return float(self.ratio ** min(1.0, (self.epoch + 1) / (self.warm_up + 1)))

    def protect(self, update: Update, public: Public, generator: torch.Generator) -> Message:
        """Return a client's first message."""
        return self.compress(update, public, generator)[0]

    def compress(
        self, update: Update, public: Public, generator: torch.Generator, memory: _Memory | None = None
    ) -> tuple[Message, _Memory]:
        """Return a message and the memory (momentum, accumulated update) for the next; None is empty."""
        clipped = self.simulate(update, public)
        momentum, waiting = memory or (_zeros(update), _zeros(update))
        momentum = {name: self.momentum * momentum[name] + tensor for name, tensor in clipped.items()}
        waiting = {name: waiting[name] + tensor for name, tensor in momentum.items()}
        message = self._top_k.protect(waiting, public, generator)
        # What was sent is forgotten in both: momentum factor masking.
        return message, (_unsent(momentum, message), _unsent(waiting, message))

    def release_next(
        self, update: Update, public: Public, generator: torch.Generator, loss: Loss, memory: Memory
    ) -> tuple[Message, Memory]:
        """As `compress`."""
        return self.compress(update, public, generator, memory)

    def at_round(self, index: int, epoch: int) -> DGC:
        """Return the defense with the share of the epoch."""
        return replace(self, epoch=epoch)

    def simulate(self, update: Update, public: Public) -> Message:
        """Scale an update down to norm `clip`."""
        if self.clip is None:
            return update
        factor = (self.clip / (squared_norm(update) + 1e-30).sqrt()).clamp(max=1)
        return {name: factor * tensor for name, tensor in update.items()}

    def nll(self, message: Message, simulated: Message, public: Public) -> Tensor:
        """As of `top-k`."""
        return self._top_k.nll(message, simulated, public)

    def residual(self, message: Message, simulated: Message, public: Public) -> Tensor:
        """As of `top-k`."""
        return self._top_k.residual(message, simulated, public)

    def pack(self, message: Message, public: Public) -> bytes:
        """As of `top-k`."""
        return self._top_k.pack(message, public)

    @property
    def _top_k(self) -> TopK:
        return TopK(ratio=self.share, scope="tensor")


def _zeros(update: Update) -> Update:
    return {name: torch.zeros_like(tensor) for name, tensor in update.items()}


def _unsent(memory: Update, message: Message) -> Update:
    return {name: torch.where(message[name] != 0, 0.0, tensor) for name, tensor in memory.items()}
