"""The contract of servers: who sends the model, and what it does to it first.

An honest server sends the model as training left it. A malicious one chooses parameters, or adds layers, so that the
client's message holds its images; what reads them is an attack (`needs = Knowledge(server=...)`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from .dataset import Images
from .defense import Defense
from .knowledge import Knowledge, Power, Setting
from .options import Options
from .threat import Observation
from .update import Update


@dataclass(frozen=True)
class Query:
    """One model that a client was sent, and the update that the server decoded from its message."""

    module: nn.Module
    update: Update
    """One tensor a parameter, of one victim (of a sum: of all its clients, the mean)."""
    images: int
    """Images that the update is the mean over."""


@dataclass(frozen=True, kw_only=True)
class Server(Options, ABC):
    """A server; a plugin implements `tamper`."""

    surface: ClassVar[Power]
    """What it changes: parameters, or the architecture too; honest for nothing."""
    reference: ClassVar[str]
    version: ClassVar[str] = "1"
    """Raised whenever models change, so that old cells are not taken for new ones."""
    needs: ClassVar[Knowledge] = Knowledge()
    """Knowledge without which it cannot make its model, such as public images."""
    counts: ClassVar[str] = "exact"
    """What its board counts: `exact` images, or those `alike` (PSNR above 18 dB) where a decoder draws them."""

    @property
    def queries(self) -> int:
        """How many models one client is sent at most, for one batch."""
        return 1

    @property
    def per_client(self) -> bool:
        """Whether the clients of a sum are sent different models."""
        return False

    @abstractmethod
    def tamper(
        self, module: nn.Module, auxiliary: Images | None, generator: torch.Generator, client: int = 0
    ) -> nn.Module:
        """Return the model that a client is sent, a changed copy of the one that training left.

        Args:
            module: as the clients' defense has prepared it, trained, in eval mode.
            auxiliary: public images, where the setting grants them.
            generator: the server's randomness; of every client of a sum the same.
            client: which of a sum, from 0, the victim.

        Raises:
            GradleakError: the model has no place for it.
        """

    def next_query(self, queries: Sequence[Query], auxiliary: Images | None) -> nn.Module | None:
        """Return what to send next, having seen all answers so far; None when nothing more is asked."""
        return None

    def isolate(self, observation: Observation, queries: Sequence[Query]) -> Observation | None:
        """Return what one image alone would have sent, N = 1 and a batch of one, for any attack on single images.

        None where the server isolates nothing, or did not get so far.
        """
        return None

    @property
    def isolates(self) -> bool:
        """Whether it prepares messages for attacks on single images."""
        return type(self).isolate is not Server.isolate

    def unsuited(self, module: nn.Module, setting: Setting, defense: Defense) -> str | None:
        """Say why it cannot work on such clients at all, or None; asked before anything runs."""
        return None

    def expected(self, setting: Setting, clients: int) -> float | None:
        """Return how many images of a client are expected to come back exactly, by the formula; None without one.

        Args:
            setting: how the client trains.
            clients: in a sum.
        """
        return None

    @property
    def adapts(self) -> bool:
        """Whether what it sends next depends on a client's answer, so that every client is sent models of its own."""
        return type(self).next_query is not Server.next_query
