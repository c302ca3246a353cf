"""QSGD: stochastic rounding to few levels of a bucket's norm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn.functional import pad

from gradleak.defense import Defense, Message, Public
from gradleak.engine.objectives import minus_log
from gradleak.engine.residuals import entries
from gradleak.mechanisms.packing import pack_bits, pack_floats
from gradleak.update import Update

_NORMS = " norms"


@dataclass(frozen=True, kw_only=True)
class QSGD(Defense):
    """Rounds each entry at random to one of the two multiples of norm / `levels` around it, without bias.

    References: Alistarh, Grubic, Li, Tomioka, Vojnovic, NeurIPS 2017, arXiv:1610.02132. The message is integer
    levels, one tensor a parameter, and the norms of that tensor's buckets. A level has the triangular likelihood
    of stochastic rounding, which is the adaptive answer.
    """

    family = "compression"
    reference = "arXiv:1610.02132"
    linear = False
    has_likelihood = True

    levels: Annotated[int, Ge(1)] = 15
    """Levels above zero."""
    bucket: Annotated[int, Ge(1)] = 512
    """Consecutive entries of a tensor that share a norm."""
    norm: Literal["l2", "max"] = "l2"

    def protect(self, update: Update, public: Public, generator: torch.Generator) -> Message:
        """Draw the levels."""
        message = {}
        for name, tensor in update.items():
            norms = self._norms(tensor)
            scaled = self._scaled(tensor, norms)
            # floor(x + U) is x rounded up with probability x - floor(x), for either sign.
            drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
            message[name] = (scaled + drawn).floor().clamp(-self.levels, self.levels)
            message[name + _NORMS] = norms
        return message

    def decode(self, message: Message, public: Public) -> Update:
        """Return levels times norms."""
        return {
            name: level * self._spread(message[name + _NORMS], level) / self.levels
            for name, level in message.items()
            if not name.endswith(_NORMS)
        }

    def nll(self, message: Message, simulated: Message, public: Public) -> Tensor:
        """Minus the log-likelihood of the levels, relative to that of a guess of zero."""
        losses, of_zero = [], []
        for name, guess in simulated.items():
            level = message[name]
            losses.append(minus_log(1 - (self._scaled(guess, message[name + _NORMS]) - level).abs()).sum())
            of_zero.append(minus_log(1 - level.abs()).sum())
        return torch.stack(losses).sum() / (torch.stack(of_zero).sum() + 1e-30)

    def residual(self, message: Message, simulated: Message, public: Public) -> Tensor:
        """Differences in levels over the deviation of stochastic rounding: p (1 - p), on average a sixth."""
        rows = [self._scaled(guess, message[name + _NORMS]) - message[name] for name, guess in simulated.items()]
        return torch.cat([row.flatten() for row in rows]) * 6**0.5

    def noise_floor(self, message: Message, public: Public) -> Tensor:
        """One an entry."""
        return entries({name: sent for name, sent in message.items() if not name.endswith(_NORMS)})

    def pack(self, message: Message, public: Public) -> bytes:
        """One float32 a bucket, then one sign and magnitude of ceil(log2(levels + 1)) bits an entry."""
        norms = torch.cat([tensor for name, tensor in message.items() if name.endswith(_NORMS)])
        levels = torch.cat([tensor.flatten() for name, tensor in message.items() if not name.endswith(_NORMS)])
        return pack_floats(norms) + pack_bits(levels + self.levels, 1 + math.ceil(math.log2(self.levels + 1)))

    def _norms(self, tensor: Tensor) -> Tensor:
        """One norm a bucket; one where the bucket is all zeros."""
        rows = pad(tensor.flatten(), (0, -tensor.numel() % self.bucket)).view(-1, self.bucket)
        norms = rows.norm(dim=1) if self.norm == "l2" else rows.abs().amax(1)
        return torch.where(norms > 0, norms, torch.ones_like(norms))

    def _scaled(self, tensor: Tensor, norms: Tensor) -> Tensor:
        """Entries in levels of their bucket."""
        return tensor * self.levels / self._spread(norms, tensor)

    def _spread(self, norms: Tensor, like: Tensor) -> Tensor:
        return norms.repeat_interleave(self.bucket)[: like.numel()].view_as(like)
