"""Improved deep leakage: the label from the last layer, then deep leakage with it fixed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gradleak.attack import GradientMatching


@dataclass(frozen=True, kw_only=True)
class IDLG(GradientMatching):
    """Infers labels in closed form and minimises the squared distance over images with L-BFGS.

    References: Zhao, Mopuri, Bilen, arXiv:2001.02610. Uses the bias of the last layer where there is one,
    which holds for every activation; the row sums of the paper need non-negative features.
    """

    reference = "arXiv:2001.02610"
    ensembles = ("auto-v1", "auto-v2")

    objective: str = "squared"
    optimiser: Literal["adam", "lbfgs"] = "lbfgs"
    lr: float = 1.0
    schedule: Literal["constant", "step", "cosine"] = "constant"
    iterations: int = 1200
    boxed: bool = False
    space: Literal["normalised", "raw"] = "raw"
