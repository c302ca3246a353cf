"""Inverting gradients: the direction of the gradient, total variation, signed Adam."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gradleak.attack import GradientMatching


@dataclass(frozen=True, kw_only=True)
class InvertingGradients(GradientMatching):
    """Minimises one minus the cosine plus total variation with signed Adam in the box.

    References: Geiping, Bauermeister, Dröge, Moeller, NeurIPS 2020, arXiv:2003.14053. Restarts are picked by
    the cosine alone. Deviation: the best iterate by the attack's own loss is returned, not the last.
    """

    reference = "arXiv:2003.14053"
    ensembles = ("auto-v1", "auto-v2")

    objective: str = "cosine"
    signed: bool | Literal["soft"] = True
    lr: float = 0.1
    iterations: int = 4800
    tv: float = 1e-4
