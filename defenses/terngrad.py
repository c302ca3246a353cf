"""Ternary gradients: every entry becomes minus, zero or plus the largest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor

from gradleak.defense import Defense, Message, Public
from gradleak.engine.objectives import minus_log
from gradleak.engine.residuals import entries
from gradleak.mechanisms.packing import pack_bits, pack_floats
from gradleak.update import Update


@dataclass(frozen=True, kw_only=True)
class TernGrad(Defense):
    """Sends s sign(g) with probability |g| / s and zero otherwise, s a tensor's largest magnitude after clipping.

    References: Wen et al., NeurIPS 2017, arXiv:1705.07878. The message shows s, so the adaptive answer is the
    likelihood of these Bernoulli draws. Deviation: the clipping deviation is taken around zero, which keeps tensors
    of one entry.
    """

    family = "compression"
    reference = "arXiv:1705.07878"
    linear = False
    simulates = True
    has_likelihood = True

    clip: Annotated[float, Gt(0)] | None = 2.5
    """Entries are clipped to so many standard deviations of their tensor."""

    def protect(self, update: Update, public: Public, generator: torch.Generator) -> Message:
        """Draw the ternary values."""
        message = {}
        for name, tensor in self.simulate(update, public).items():
            scale = tensor.abs().amax()
            drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
            message[name] = torch.where(drawn * scale <= tensor.abs(), tensor.sign() * scale, torch.zeros_like(tensor))
        return message

    def simulate(self, update: Update, public: Public) -> Message:
        """Clip each tensor."""
        if self.clip is None:
            return update
        limits = {name: self.clip * (tensor.square().mean() + 1e-30).sqrt() for name, tensor in update.items()}
        return {name: tensor.clamp(-limits[name], limits[name]) for name, tensor in update.items()}

    def nll(self, message: Message, simulated: Message, public: Public) -> Tensor:
        """Minus the log-likelihood of the draws, relative to that of a guess of zero."""
        losses: list[Tensor] = []
        of_zero: list[Tensor] = []
        for name, sent in message.items():
            scale = sent.abs().amax()
            scale = torch.where(scale > 0, scale, torch.ones_like(scale))
            for guess, parts in ((simulated[name], losses), (torch.zeros_like(sent), of_zero)):
                share = guess / scale
                probability = torch.where(sent != 0, share * sent.sign(), 1 - share.abs())
                parts.append(minus_log(probability).sum())
        return torch.stack(losses).sum() / (torch.stack(of_zero).sum() + 1e-30)

    def residual(self, message: Message, simulated: Message, public: Public) -> Tensor:
        """Differences over the root mean square of what was drawn in the tensor, which is nearly its noise."""
        rows = [(simulated[name] - sent) / (sent.square().mean() + 1e-30).sqrt() for name, sent in message.items()]
        return torch.cat([row.flatten() for row in rows])

    def noise_floor(self, message: Message, public: Public) -> Tensor:
        """One an entry."""
        return entries(message)

    def pack(self, message: Message, public: Public) -> bytes:
        """One float32 a tensor, then two bits an entry: 0 minus, 1 zero, 2 plus."""
        scales = torch.stack([sent.abs().amax() for sent in message.values()])
        return pack_floats(scales) + pack_bits(torch.cat([sent.sign().flatten() for sent in message.values()]) + 1, 2)
