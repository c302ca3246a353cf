"""APRIL: the patches of a vision transformer in closed form from the gradient of its positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from gradleak.attack import Attack, Reconstruction
from gradleak.defense import Defense
from gradleak.seeds import Generators
from gradleak.threat import Observation, Setting

from ._first_layer import normalisation


@dataclass(frozen=True, kw_only=True)
class April(Attack):
    """Solves the linear system between the gradients of positions and of the patch projection.

    References: Lu, Zhang, Zhao, He, Cheng, CVPR 2022, arXiv:2112.14087: the gradient of a learned position is the
    loss's derivative at its token. Theirs then solves the first attention block, which has to see the tokens as they
    are; here a layer normalisation is in between, so the same idea is used one layer below. With Delta [T, dim] the
    gradients of the T positions and X [T, pixels] the patches of a batch of one, the projection's gradient is
    Delta^T X, which determines X if T <= dim. Ridge regression with the variance of what no X explains is the
    posterior mean under noise, and exact without.
    """

    family = "analytic"
    reference = "arXiv:2112.14087"

    def unsuited(self, module: nn.Module, setting: Setting, defense: Defense) -> str | None:
        """It needs learned positions, one image, and no more patches than a token has dimensions."""
        found = _front(module)
        if found is None:
            return "needs a transformer on patches with learned positions (vit)"
        if setting.batch_size != 1:
            return f"needs a batch of 1, not {setting.batch_size}: tokens of several images share their positions"
        _, length, width = module.get_parameter(found[1]).shape
        if length - 1 > width:
            return f"needs no more patches than dimensions of a token: {length - 1} patches face {width} dimensions"
        return None

    def reconstruct(self, observation: Observation, generator: Generators) -> Reconstruction:
        """Solve for the patches; `details` has the condition number of the system."""
        found = _front(observation.network.module)
        assert found is not None
        # The first position is the class token's.
        delta = observation.gradient[found[1]][:, 0, 1:].double()
        weight = observation.gradient[found[0]].double()
        side, known = weight.shape[-1], weight.flatten(2)
        left, values, right = torch.linalg.svd(delta.mT, full_matrices=False)
        inside = left.mT @ known
        freedom = max((known.shape[1] - values.shape[1]) * known.shape[2], 1)
        variance = (known - left @ inside).square().sum((1, 2)) / freedom
        patches = right.mT @ (inside * (values / (values.square() + variance[:, None]))[..., None])
        channels, height, length = observation.shape
        size = (-(-height // side) * side, -(-length // side) * side)
        images = F.fold(patches.mT, size, kernel_size=side, stride=side)[:, None, :channels, :height, :length]
        mean, std = normalisation(observation.network.module)
        return Reconstruction(
            images=(images * std + mean).nan_to_num(0.5).clamp(0, 1).to(observation.dtype),
            details={"condition": values[:, 0] / values[:, -1]},
        )


def _front(module: nn.Module) -> tuple[str, str] | None:
    """Names of the patch projection's weight and of the positions, or None where the model does not start so."""
    first = next(((name, leaf) for name, leaf in module.named_modules() if list(leaf.parameters(recurse=False))), None)
    positions = [name for name, tensor in module.named_parameters() if name.endswith("positions") and tensor.ndim == 3]
    if first is None or not isinstance(first[1], nn.Conv2d) or len(positions) != 1:
        return None
    name, layer = first
    return (f"{name}.weight", positions[0]) if layer.kernel_size == layer.stride else None
