"""Secure aggregation: the server learns the sum over several clients only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Le

from gradleak.defense import Defense, Message, Public
from gradleak.update import Update, flatten

_LIMIT = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class SecureAggregation(Defense):
    """Shows the server the mean of `clients` messages in fixed point; the victim is one of them.

    References: Bonawitz et al., CCS 2017, arXiv:1611.04482. Masks cancel in the sum, so of the protocol only the
    sum and its fixed-point numbers are left here. A setting's batch is one client's: the others have as many
    images each, which are no victim's. Every client runs what comes before in a chain, `dp-sgd + secure-aggregation`.

    A FedSGD round of n clients with B images is, up to rounding, one of a client with all n * B, so the adaptive
    answer matches a batch of these (with local steps, or batch normalisation in train mode, that is approximate).
    All guesses are assigned to all images of the sum, and the victim's own count. Labels are granted of all clients.
    The oblivious attacker takes the sum for the victim's message; closed forms and controls, which model no defense,
    are told how many images the sum holds. There is no guarantee by itself.
    """

    family = "aggregation"
    reference = "arXiv:1611.04482"
    version = "2"
    counter_attacks = ("cocktail-party",)
    linear = False

    clients: Annotated[int, Ge(1)] = 2
    """Clients in a sum."""
    fraction: Annotated[int, Ge(1), Le(30)] = 20
    """Bits behind the binary point of a 32-bit number."""

    @property
    def cohort(self) -> int:
        """All clients of a sum."""
        return self.clients

    @property
    def is_adaptive_target(self) -> bool:
        """An attacker who knows the number of clients looks for all their images."""
        return self.clients > 1

    def protect(self, update: Update, public: Public, generator: torch.Generator) -> Message:
        """Round one client's share to fixed point, saturating so that the sum cannot overflow."""
        unit, limit = 2.0**self.fraction, _LIMIT // self.clients
        return {name: (tensor * unit).round().clamp(-limit, limit) / unit for name, tensor in update.items()}

    def pack(self, message: Message, public: Public) -> bytes:
        """One int32 an entry, as each client sends its masked share."""
        whole = (flatten(message).double() * 2.0**self.fraction).round()
        return whole.to("cpu", torch.int32).numpy().tobytes()
