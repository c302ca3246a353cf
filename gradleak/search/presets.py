"""Named option sets of matching attacks, after configurations of the literature.

Weights are those published; distances are relative here and total variation is that of images in [0, 1], so they are
starting points, not reproductions. Whatever a set leaves out is the attack's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_COLOURFUL = {"tv": 0.1, "tv_form": "opponents", "features": 0.1, "signed": "soft", "schedule": "cosine"}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # Total variation in units of the objective's range, chosen on 8 tuning victims of CIFAR-10, 4 of mnist-5k and 4 of
    # photos (lenet, mlp) without defense, under noise, sparsity, sketches and signs: 45 trials. No one weight serves
    # all: `sharp` for messages that decide their image, `smooth` for those that leave much of it open.
    "sharp": {"objective": "cosine", "tv_unit": "range", "tv": 0.03},
    "smooth": {"objective": "cosine", "tv_unit": "range", "tv": 3.0},
    # Geiping's later configurations, without statistics of batch normalisation (see `gradinversion`).
    "legacy": {"objective": "cosine", "lr": 0.1, "initialisation": "zeros", **_COLOURFUL},
    "modern": {"objective": "cosine", "lr": 0.1, "initialisation": "patterned", "warm_up": 50, **_COLOURFUL},
    # Wei et al., ESORICS 2020, arXiv:2004.10397: patterned start, squared distance and the model's own loss.
    "wei": {
        "objective": "relative-squared",
        "optimiser": "lbfgs",
        "lr": 1.0,
        "schedule": "constant",
        "iterations": 300,
        "initialisation": "patterned",
        "task": 1.0,
        "tv": 0.0,
    },
    "beyond-inferring": {
        "objective": "relative-squared",
        "optimiser": "lbfgs",
        "lr": 1.0,
        "schedule": "constant",
        "iterations": 400,
        "tv": 0.2352,
        "tv_form": "isotropic",
    },
    # Deng et al., arXiv:2103.06819, made for text: squared and absolute distance, the first layers most.
    "tag": {
        "objective": "squared-absolute",
        "layer_weights": "linear",
        "signed": False,
        "lr": 0.05,
        "schedule": "cosine",
        "warm_up": 50,
        "iterations": 1000,
        "tv": 0.0,
    },
}
