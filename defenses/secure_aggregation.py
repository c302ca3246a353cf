"""Secure aggregation: the server learns the sum over several clients only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Le

from gradleak.defense import Defense, Message, Public
from gradleak.errors import GradleakError
from gradleak.update import Update, flatten

_LIMIT = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class SecureAggregation(Defense):
    """Reveals the mean over `clients`, in fixed point; a setting's batch is that of all clients together.

    References: Bonawitz et al., CCS 2017, arXiv:1611.04482. Masks cancel in the sum, so of the protocol only the
    sum and its fixed-point numbers are left here: a FedSGD round of n clients with B images each leaks what one
    client with n * B images does. It is no guarantee by itself. With local steps clients would have to be
    simulated one by one, which this does not do. Matching a batch of all images is the adaptive answer already.
    """

    family = "aggregation"
    reference = "arXiv:1611.04482"
    counter_attacks = ("cocktail-party",)

    clients: Annotated[int, Ge(1)] = 2
    """Clients in a sum; divides the setting's batch_size."""
    fraction: Annotated[int, Ge(1), Le(30)] = 20
    """Bits behind the binary point of a 32-bit number."""

    def public(self, template: Update, batch_size: int, generator: torch.Generator) -> Public:
        """Check the batch; nothing is drawn.

        Raises:
            GradleakError: `clients` does not divide the batch.
        """
        if batch_size % self.clients:
            raise GradleakError(
                f"defense 'secure-aggregation': batch_size = {batch_size} is that of all clients together; "
                f"it must be a multiple of clients = {self.clients}"
            )
        return {}

    def protect(self, update: Update, public: Public, generator: torch.Generator) -> Message:
        """Return the mean with the sum rounded to fixed point, saturating."""
        unit = self.clients * 2.0**self.fraction
        return {name: (tensor * unit).round().clamp(-_LIMIT, _LIMIT) / unit for name, tensor in update.items()}

    def pack(self, message: Message, public: Public) -> bytes:
        """One int32 an entry, as each client sends its masked share."""
        whole = (flatten(message).double() * self.clients * 2.0**self.fraction).round()
        return whole.to("cpu", torch.int32).numpy().tobytes()
