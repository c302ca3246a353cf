"""D-SNR: the client refuses a model under which one of its images outshines all others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from gradleak.update import Network

from ._detection import Detection

_LEAST = 1e-6  # added to the others' share, as in the reference


@dataclass(frozen=True, kw_only=True)
class DSnr(Detection):
    """Compares each image's gradient with the sum of the others' on the client's own batch, weight by weight.

    The suspicion is the maximum over weight tensors of max_i |g_i| / (sum_j |g_j| - max_i |g_i| + 1e-6). References:
    Garov, Dimitrov, Jovanović, Vechev, ICLR 2024, arXiv:2306.03013.
    """

    reference = "arXiv:2306.03013"

    def inspect(self, module: nn.Module, template: nn.Module, images: Tensor, targets: Tensor) -> float:
        """Return the largest ratio of one image's gradient to the others'."""
        network = Network.of(module)

        def gradient(image: Tensor, target: Tensor) -> dict[str, Tensor]:
            found: dict[str, Tensor] = grad(lambda at: network.loss(image[None], target[None], at))(network.parameters)
            return found

        found = 0.0
        sizes = vmap(lambda image, target: _norms(gradient(image, target)), chunk_size=16)(images, targets)
        for norms in sizes.values():
            largest = norms.max()
            found = max(found, float(largest / (norms.sum() - largest + _LEAST)))
        return found


def _norms(update: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.linalg.vector_norm(tensor) for name, tensor in update.items() if tensor.ndim >= 2}
