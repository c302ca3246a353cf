"""No defense: the undefended update, which every other defense is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradleak.defense import Defense, Message, Public
from gradleak.update import Update


@dataclass(frozen=True, kw_only=True)
class NoDefense(Defense):
    """Sends the update as it is."""

    family = "none"
    reference = "McMahan et al., arXiv:1602.05629"

    def protect(self, update: Update, public: Public, generator: torch.Generator) -> Message:
        """Return the update."""
        return update
