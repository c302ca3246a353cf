"""SPEAR++: larger batches, by learning the dictionary that makes a ReLU layer's derivatives sparse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor
from torch.nn.functional import normalize

from gradleak.attacks.spear import Spear, _Factors
from gradleak.seeds import Generators

_POLISH = 0.1
"""What the smoothing is multiplied by in the last steps, which bring zeros down to rounding."""

_BY_CHANCE = 12
"""Images up to which planes through random neurons are worth trying too."""
_DRAWN = 2048
"""Planes drawn in a round then."""


@dataclass(frozen=True, kw_only=True)
class SpearPP(Spear):
    """Finds SPEAR's planes by descent instead of by chance, so that its time is polynomial in the batch size.

    Reference: arXiv:2510.24200. In dL/dW = U R, U = D^T Q^-1 with sparse D and unknown Q: complete dictionary learning
    with the neurons, rows of U (whitened, as U^T U = 1), for data. A column of Q is a direction q on the sphere to
    which half of all neurons are orthogonal; it is found by descent from a random neuron, column by column. SPEAR's
    fit, self-check and choice of B columns follow. Deviations: what is minimised is the sum over neurons u of
    |q . u|^1/2, smoothed less and less, by reweighted least squares with one step of inverse iteration each. Images
    of one class that the rest of the network treats alike (one hidden layer, not trained) differ less than they
    hide, so that few descents end right; larger batches then fail, and say so.
    """

    reference = "arXiv:2510.24200"
    version = "1"
    tuning = "steps, shrink, power: 12 trials on 1 tuning batch each of 24 and 48 digits (mlp)"

    trials: Annotated[int, Ge(1)] = 32
    """Descents in a round."""
    rounds: Annotated[int, Ge(1)] = 60
    """Most rounds; a victim whose self-check is perfect makes no more."""
    steps: Annotated[int, Ge(1)] = 60
    """Steps of a descent."""
    shrink: Annotated[float, Gt(0), Lt(1)] = 0.9
    """By which the smoothing, at first the median |q . u|, is multiplied in a step."""

    def _planes(self, factors: _Factors, generator: Generators) -> Tensor:
        """Unit normals [N, K, r] at which descents from random neurons end, and in small batches some by chance."""
        neurons = factors.neurons.mT
        noise = factors.layer.noise[:, None]
        lengths = neurons.norm(dim=1)
        alive = lengths * factors.values[:, :1] > noise
        points = torch.where(alive[:, None], normalize(neurons, dim=1), 0.0)
        drawn = (generator.uniform(self.trials).double() * alive.sum(1, keepdim=True)).long()
        index = (~alive).double().argsort(dim=1, stable=True).gather(1, drawn)
        normals = points.mT.gather(1, index[..., None].expand(-1, -1, points.shape[1]))
        smooth = (normals @ points).abs().median(dim=2, keepdim=True).values
        for rate in (*[self.shrink] * self.steps, *[_POLISH] * 15):
            # Below the noise nothing tells zeros from others.
            floor = noise * (normals / factors.values[:, None]).norm(dim=2)
            far = torch.maximum((normals @ points).abs(), torch.maximum(smooth, floor[..., None] / lengths[:, None]))
            # Weights of iterated least squares for the sum of |distance|^(1/2), which zeros make small.
            normals = _weighted_step(points, torch.where(alive[:, None], far**-1.5, 0.0), normals)
            smooth = smooth * rate
        if neurons.shape[1] > _BY_CHANCE:
            return normals
        return torch.cat([normals, factors.planes(generator, _DRAWN)], dim=1)


def _weighted_step(points: Tensor, weights: Tensor, normals: Tensor) -> Tensor:
    """One step of inverse iteration [N, K, r] to the planes nearest points [N, r, O] of weights [N, K, O]."""
    found = []
    for weight, normal in zip(weights.unbind(1), normals.unbind(1), strict=True):
        spread = (points * (weight / weight.amax(1, keepdim=True))[:, None]) @ points.mT
        # A plane through points makes the matrix singular; its null vector is what is looked for.
        ridge = 1e-15 * spread.diagonal(dim1=1, dim2=2).mean(1)[:, None]
        spread.diagonal(dim1=1, dim2=2).add_(ridge)
        step = torch.linalg.solve_ex(spread, normal[..., None]).result[..., 0]
        found.append(torch.where(step.isfinite().all(1, keepdim=True), normalize(step, dim=1), normal))
    return torch.stack(found, dim=1)
