"""Sign compression: one bit an entry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor
from torch.nn.functional import softplus

from gradleak.defense import Defense, Message, Public
from gradleak.mechanisms.packing import pack_bits, pack_floats
from gradleak.update import Update


@dataclass(frozen=True, kw_only=True)
class Sign(Defense):
    """Sends the signs of each tensor, and their scale: the mean magnitude.

    References: Bernstein, Wang, Azizzadenesheli, Anandkumar, ICML 2018, arXiv:1802.04434; the scale as in
    Karimireddy, Rebjock, Stich, Jaggi, ICML 2019, arXiv:1901.09847. The sign of zero is plus. The adaptive answer
    is a logistic loss of every entry of the guess against its sign.
    """

    family = "compression"
    reference = "arXiv:1802.04434"
    linear = False
    has_likelihood = True

    scaled: bool = True
    """Whether signs are multiplied by the mean magnitude of their tensor; else they are ±1."""
    sharpness: Annotated[float, Gt(0)] = 8.0
    """Of the adaptive answer: slope of the logistic loss at zero, per mean magnitude of the guess."""

    def protect(self, update: Update, public: Public, generator: torch.Generator) -> Message:
        """Return signs times scale."""
        return {
            name: torch.where(tensor >= 0, 1.0, -1.0).to(tensor) * (tensor.abs().mean() if self.scaled else 1.0)
            for name, tensor in update.items()
        }

    def nll(self, message: Message, simulated: Message, public: Public) -> Tensor:
        """Logistic loss of the guess in units of its own mean magnitude, relative to a guess of zero."""
        losses = []
        for name, sent in message.items():
            guess = simulated[name]
            relative = guess / (guess.abs().mean() + 1e-30)
            losses.append(softplus(-self.sharpness * sent.sign() * relative).flatten())
        return torch.cat(losses).mean() / torch.tensor(2.0).log()

    def residual(self, message: Message, simulated: Message, public: Public) -> Tensor:
        """Entries of the wrong sign in units of their tensor's mean magnitude, and what that magnitude is off."""
        rows = []
        for name, sent in message.items():
            guess, size = simulated[name], simulated[name].abs().mean()
            rows.append((-sent.sign() * guess / (size + 1e-30)).relu().flatten() / sent.numel() ** 0.5)
            if self.scaled:
                rows.append((size / (sent.abs().mean() + 1e-30) - 1)[None])
        return torch.cat(rows)

    def pack(self, message: Message, public: Public) -> bytes:
        """One bit an entry, after one float32 a tensor if scaled."""
        signs = torch.cat([sent.flatten() > 0 for sent in message.values()])
        scales = torch.stack([sent.abs().amax() for sent in message.values()])
        return (pack_floats(scales) if self.scaled else b"") + pack_bits(signs, bits=1)
