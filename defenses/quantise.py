"""Uniform quantisation of the update to 16, 8, 4 or 2 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gradleak.defense import Defense, Message, Public
from gradleak.engine.objectives import relative_squared
from gradleak.engine.residuals import entries
from gradleak.mechanisms.packing import pack_bits, pack_floats
from gradleak.update import Update, flatten


@dataclass(frozen=True, kw_only=True)
class Quantise(Defense):
    """Rounds every entry to half precision, or to one of 2^bits - 1 evenly spaced values of its tensor.

    References: Zhu et al., arXiv:1906.08935, as a defense. A tensor's values are multiples of its largest entry
    over 2^(bits-1) - 1, which the message shows, so the adaptive answer keeps its guess within half a step.
    """

    family = "compression"
    reference = "arXiv:1906.08935"
    linear = False
    has_likelihood = True

    bits: Literal[2, 4, 8, 16] = 8
    """Bits an entry; 16 is half precision."""

    def protect(self, update: Update, public: Public, generator: torch.Generator) -> Message:
        """Return the rounded update."""
        if self.bits == 16:
            largest = torch.finfo(torch.float16).max
            return {name: tensor.clamp(-largest, largest).half().to(tensor) for name, tensor in update.items()}
        steps = {name: self._step(tensor) for name, tensor in update.items()}
        return {name: (tensor / steps[name]).round() * steps[name] for name, tensor in update.items()}

    def nll(self, message: Message, simulated: Message, public: Public) -> Tensor:
        """Squared distance to the interval that rounds to the message, relative to a guess of zero."""
        if self.bits == 16:
            return relative_squared(simulated, message)
        half = {name: self._step(sent) / 2 for name, sent in message.items()}
        outside = [((simulated[name] - sent).abs() - half[name]).relu() for name, sent in message.items()]
        of_zero = [(sent.abs() - half[name]).relu() for name, sent in message.items()]
        return _squares(outside) / (_squares(of_zero) + 1e-30)

    def residual(self, message: Message, simulated: Message, public: Public) -> Tensor:
        """Differences over the deviation of rounding, which is that of a uniform number within a step."""
        rows = [(simulated[name] - sent) / self._deviation(sent) for name, sent in message.items()]
        return flatten(dict(zip(message, rows, strict=True)))

    def noise_floor(self, message: Message, public: Public) -> Tensor:
        """One an entry."""
        return entries(message)

    def pack(self, message: Message, public: Public) -> bytes:
        """One float32 step a tensor, then `bits` an entry; half precision has no steps."""
        if self.bits == 16:
            return flatten(message).cpu().half().numpy().tobytes()
        steps = torch.stack([self._step(sent) for sent in message.values()])
        levels = [(sent / step).round().flatten() for sent, step in zip(message.values(), steps, strict=True)]
        return pack_floats(steps) + pack_bits(torch.cat(levels) + self._top, self.bits)

    @property
    def _top(self) -> int:
        return int(2 ** (self.bits - 1)) - 1

    def _deviation(self, sent: Tensor) -> Tensor:
        if self.bits < 16:
            return self._step(sent) / 12**0.5
        # A half has eleven binary digits, down to 2^-14; the step is that of the number that was sent.
        least = torch.full_like(sent, 2.0**-14)
        return torch.exp2(torch.maximum(sent.abs(), least).log2().floor() - 10) / 12**0.5

    def _step(self, tensor: Tensor) -> Tensor:
        # The largest entry is kept exactly, so update and message have the same step.
        largest = tensor.abs().amax()
        return torch.where(largest > 0, largest, torch.ones_like(largest)) / self._top


def _squares(parts: list[Tensor]) -> Tensor:
    return torch.stack([part.square().sum() for part in parts]).sum()
