"""The honest server: it sends the agreed model as training left it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from gradleak.dataset import Images
from gradleak.knowledge import Power
from gradleak.server import Server


@dataclass(frozen=True, kw_only=True)
class Honest(Server):
    """Sends the model unchanged."""

    surface = Power.HONEST
    reference = "McMahan et al., arXiv:1602.05629"

    def tamper(
        self, module: nn.Module, auxiliary: Images | None, generator: torch.Generator, client: int = 0
    ) -> nn.Module:
        """Return the model as it is."""
        return module
