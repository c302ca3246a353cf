"""No defense: the undefended update, which every other defense is compared with."""

from __future__ import annotations

from dataclasses import dataclass

from gradleak.defense import Defense


@dataclass(frozen=True, kw_only=True)
class NoDefense(Defense):
    """Sends the update as it is."""

    family = "none"
    reference = "McMahan et al., arXiv:1602.05629"
