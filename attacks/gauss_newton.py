"""Gauss-Newton: Levenberg-Marquardt on the pixels, from what public images suggest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from gradleak.attack import GradientMatching


@dataclass(frozen=True, kw_only=True)
class GaussNewton(GradientMatching):
    """Minimises the squared residual of the simulated message, whitened by the noise's law, with Levenberg-Marquardt.

    References: Levenberg 1944; Marquardt 1963. Our own attack. Where public images are granted it starts from the mean
    of the label's and from those of least loss, takes their Gaussian for a prior, and answers in their grey levels.
    """

    reference = "gradleak"
    ensembles = {
        "auto-v2": {
            "gauss-newton": {"initialisation": "normal", "class_prior": (), "alphabet": False},
            "gauss-newton + prior": {},
        }
    }
    tuning = "class_prior, restarts, tolerance: 4 trials on 4 to 8 tuning victims of digits (mlp), 7 defenses"

    optimiser: Literal["adam", "lbfgs", "levenberg-marquardt"] = "levenberg-marquardt"
    iterations: int = 100
    restarts: int = 12
    initialisation: Literal["normal", "uniform", "zeros", "patterned", "class-mean", "public"] = "public"
    class_prior: tuple[Annotated[float, Ge(0)], ...] = (1e-6, 1e-9, 0.0)
    alphabet: bool = True
    budget: Literal["fixed", "ceiling"] = "ceiling"
