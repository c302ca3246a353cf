"""APRIL: the patches of a vision transformer in closed form from the gradient of its positions."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from gradleak import structure
from gradleak.attack import Attack, Reconstruction
from gradleak.defense import Defense
from gradleak.seeds import Generators
from gradleak.structure import OnPixels
from gradleak.threat import Observation, Setting


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
    ensembles = ("auto-v2",)

    def unsuited(self, module: nn.Module, setting: Setting, defense: Defense) -> str | None:
        """It needs learned positions, one image, and no more patches than a token has dimensions."""
        layer = _front(module)
        if layer is None or layer.patches is None or layer.weight is None:
            return "needs a transformer on patches with learned positions (vit), both trained"
        if setting.batch_size != 1:
            return f"needs a batch of 1, not {setting.batch_size}: tokens of several images share their positions"
        count, width = len(layer.patches), len(module.get_parameter(layer.weight))
        if count > width:
            return f"needs no more patches than dimensions of a token: {count} patches face {width} dimensions"
        return None

    def reconstruct(self, observation: Observation, generator: Generators) -> Reconstruction:
        """Solve for the patches; `details` has the condition number of the system."""
        layer = _front(observation.network.module)
        assert layer is not None and layer.weight is not None
        assert layer.patches is not None and layer.positions is not None
        name, first = layer.positions
        positions = observation.gradient[name].double()
        delta = positions.reshape(len(positions), -1, positions.shape[-1])[:, first : first + len(layer.patches)]
        known = observation.gradient[layer.weight].double().flatten(2)
        left, values, right = torch.linalg.svd(delta.mT, full_matrices=False)
        inside = left.mT @ known
        freedom = max((known.shape[1] - values.shape[1]) * known.shape[2], 1)
        variance = (known - left @ inside).square().sum((1, 2)) / freedom
        patches = right.mT @ (inside * (values / (values.square() + variance[:, None]))[..., None])
        images = replace(layer, index=layer.patches).to_images(patches.flatten(1), observation.shape)[:, None]
        return Reconstruction(
            images=images.nan_to_num(0.5).clamp(0, 1).to(observation.dtype),
            details={"condition": values[:, 0] / values[:, -1]},
        )


def _front(module: nn.Module) -> OnPixels | None:
    """Return the projection of patches to tokens that positions are added to, or None where there is none."""
    for layer in structure.of(module).on_pixels:
        if layer.plain and layer.whole and layer.weight is not None and layer.positions is not None:
            return layer
    return None
