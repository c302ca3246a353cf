"""Deep leakage from gradients: squared distance, labels searched for as well, L-BFGS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gradleak.attack import GradientMatching
from gradleak.threat import Knowledge, Labels


@dataclass(frozen=True, kw_only=True)
class DLG(GradientMatching):
    """Minimises the squared distance over images and soft labels with L-BFGS, without prior or box.

    References: Zhu, Liu, Han, NeurIPS 2019, arXiv:1906.08935. One iteration is one inner iteration of L-BFGS;
    the reference's 300 outer steps are up to 6,000 of them. Made for smooth networks; its outcome is bimodal.
    """

    needs = Knowledge(labels=Labels.OPTIMISED)
    reference = "arXiv:1906.08935"

    objective: str = "squared"
    optimiser: Literal["adam", "lbfgs"] = "lbfgs"
    lr: float = 1.0
    schedule: Literal["constant", "step", "cosine"] = "constant"
    iterations: int = 1200
    boxed: bool = False
    space: Literal["normalised", "raw"] = "raw"
