"""Bottleneck inversion: searches for a variational bottleneck's noise together with the images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from gradleak.attack import GradientMatching
from gradleak.defense import Defense
from gradleak.engine.optimisers import Variables
from gradleak.engine.problem import Facts, Guess
from gradleak.mechanisms import bottleneck
from gradleak.seeds import Generators
from gradleak.threat import Knowledge, Labels, Level, Observation, Setting

_SUFFIX = ".noise"


@dataclass(frozen=True, kw_only=True)
class BottleneckInversion(GradientMatching):
    """Minimises one minus the cosine over images and noise, with Adam.

    Counters PRECODE (Scheliga et al., arXiv:2108.04725) and VIB: noise of a known law, drawn once, is a few more
    unknowns among many more equations. Our own attack.
    """

    tuning = "lr, iterations, tv, restarts: 10 trials on 4 tuning victims of digits (lenet, mlp), precode and vib"
    reference = "gradleak, counters arXiv:2108.04725"
    needs = Knowledge(labels=Labels.INFERRED, defense=Level.PARAMETERS)

    objective: str = "cosine"
    lr: float = 0.3
    iterations: int = 2000
    schedule: Literal["constant", "step", "cosine"] = "cosine"
    tv: float = 1e-6

    def unsuited(self, module: nn.Module, setting: Setting, defense: Defense) -> str | None:
        """It needs a bottleneck."""
        found = bottleneck.noise_shapes(module, setting.batch_size)
        return (
            super().unsuited(module, setting, defense)
            if found
            else "needs a model with a variational bottleneck (precode, vib)"
        )

    def initial(self, observation: Observation, generator: Generators) -> Variables:
        """Initial pixels and noise [N, B, K], by buffer name."""
        variables = super().initial(observation, generator)
        shapes = bottleneck.noise_shapes(observation.network.module, observation.batch_size)
        return variables | {name: generator.normal(*shape) for name, shape in shapes.items()}

    def decode(self, variables: Variables, facts: Facts) -> Guess:
        """Turn one trial's variables into images and noise."""
        noise = {name: tensor for name, tensor in variables.items() if name.endswith(_SUFFIX)}
        return replace(super().decode(variables, facts), buffers=noise)
