"""TrAct inversion: linear leakage through a whitened first layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradleak import structure
from gradleak.defense import Defense
from gradleak.mechanisms.whitening import WhitenedLayer, restore, whiten
from gradleak.structure import OnPixels
from gradleak.threat import Knowledge, Level, Observation, Setting

from .linear_leakage import LinearLeakage


@dataclass(frozen=True, kw_only=True)
class TractInversion(LinearLeakage):
    """Reads the whitened inputs of a linear first layer as linear leakage does, and undoes the whitening.

    Counters TrAct (arXiv:2410.23970), whose weight gradient is D^T V with V = (X X^T / b + damping I)^-1 X: rows of V
    are found as those of X would be, and V has the singular vectors of X and singular values that a quadratic gives
    back. Exact for one image of norm above sqrt(damping), as the layer sees it, and for more images where each has
    neurons to itself; one image missed spoils them all. Our own attack.
    """

    reference = "gradleak, counters arXiv:2410.23970"
    ensembles = ()
    needs = Knowledge(defense=Level.PARAMETERS)
    adaptive = True
    tuning = "nothing to tune"

    def unsuited(self, module: nn.Module, setting: Setting, defense: Defense) -> str | None:
        """It needs the defense, in front of a linear layer with bias."""
        if self._first(module) is None:
            return "needs defense tract on a model whose first layer is linear with a bias (linear, mlp)"
        return super().unsuited(module, setting, defense)

    def _first(self, module: nn.Module) -> OnPixels | None:
        for layer in structure.of(module).on_pixels:
            sent = layer.weight is not None and layer.bias is not None
            if isinstance(module.get_submodule(layer.name), WhitenedLayer):
                return layer if layer.linear and layer.whole and layer.index.ndim == 1 and sent else None
        return None

    def _rows(self, inputs: Tensor, observation: Observation) -> Tensor:
        return whiten(inputs, _damping(observation))

    def _inputs(self, rows: Tensor, observation: Observation) -> Tensor:
        return restore(rows, _damping(observation))

    def _compared(self, ratios: Tensor, observation: Observation) -> tuple[Tensor, Tensor]:
        # No bounds are known of whitened pixels; their scale is that of most candidates.
        size = ratios.square().mean(-1, keepdim=True).sqrt()
        points = ratios / size.median(dim=1, keepdim=True).values.clamp(min=1e-300)
        return points, torch.zeros(ratios.shape[:2], dtype=torch.bool, device=ratios.device)


def _damping(observation: Observation) -> float:
    return next(layer.damping for layer in observation.network.module.modules() if isinstance(layer, WhitenedLayer))
