"""Linear leakage: the input of a biased linear layer in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from gradleak.attack import Attack, Reconstruction
from gradleak.defense import Defense
from gradleak.seeds import Generators
from gradleak.structure import OnPixels
from gradleak.threat import Observation, Setting

from ._first_layer import first_linear, gradients, to_inputs, to_pixels

_SAME = 1e-3  # root mean square distance in pixels below which two rows show one image
_OUTSIDE = 1e-3  # how far outside [0, 1] rounding may bring a pixel


@dataclass(frozen=True, kw_only=True)
class LinearLeakage(Attack):
    """Divides the first layer's weight gradient by its bias gradient: exact for a batch of one.

    Row j of dL/dW is a mean of the inputs weighted by dL/db_j. One image: least squares over all rows,
    x = dW^T db / |db|^2, the best estimate under white noise on dW. More images: every row is a candidate mean;
    rows inside [0, 1] that recur most (an image that alone activates several neurons) come first, each the least
    squares over its recurrences. The loss is what no gradient at the outputs explains of dL/dW and dL/db together
    with the images returned, relative to both: 1 where no gradient of the layer arrived. References: Phong et al.,
    2018; Geiping et al., arXiv:2003.14053, proposition 3.1.
    """

    family = "analytic"
    reference = "arXiv:2003.14053"
    version = "2"
    ensembles: ClassVar[tuple[str, ...]] = ("auto-v1", "auto-v2")

    def unsuited(self, module: nn.Module, setting: Setting, defense: Defense) -> str | None:
        """It needs a linear layer with bias right on the pixels."""
        layer = self._first(module)
        if layer is None or layer.weight is None:
            return "needs a model whose first layer is linear with a bias (linear, mlp), and is trained"
        width = module.get_parameter(layer.weight).shape[0]
        if setting.batch_size > width:
            return f"needs no more images than neurons: {width} neurons face a batch of {setting.batch_size}"
        return None

    def reconstruct(self, observation: Observation, generator: Generators) -> Reconstruction:
        """Return the ratios of weight and bias gradients as images."""
        weight, bias = self._gradients(observation)
        if observation.batch_size == 1:
            rows = _ratio(weight, bias, torch.ones_like(bias))[:, None]
        else:
            rows = self._recurring_rows(weight, bias, observation)
        images = to_pixels(self._inputs(rows, observation), self._layer(observation), observation)
        images = images.nan_to_num(0.5).clamp(0, 1)
        return Reconstruction(
            images=images,
            labels=observation.labels,
            loss=self._unexplained(observation, images),
        )

    def loss(
        self, observation: Observation, images: Tensor, targets: Tensor, buffers: dict[str, Tensor]
    ) -> Tensor | None:
        """Share of the layer's gradient [N] that given images cannot explain."""
        return self._unexplained(observation, images)

    def _first(self, module: nn.Module) -> OnPixels | None:
        """Return the layer."""
        return first_linear(module)

    def _layer(self, observation: Observation) -> OnPixels:
        layer = self._first(observation.network.module)
        assert layer is not None
        return layer

    def _rows(self, inputs: Tensor, observation: Observation) -> Tensor:
        """Return what the layer's weight gradient is made of, given its inputs [N, B, P]."""
        return inputs

    def _inputs(self, rows: Tensor, observation: Observation) -> Tensor:
        """Inverse of `_rows`."""
        return rows

    def _compared(self, ratios: Tensor, observation: Observation) -> tuple[Tensor, Tensor]:
        """Return candidates [N, O, P] in units in which 1 is large, and which of them cannot be images."""
        pixels = to_pixels(ratios, self._layer(observation), observation).double().flatten(2)
        return pixels, (pixels - pixels.clamp(0, 1)).abs().amax(-1) > _OUTSIDE

    def _gradients(self, observation: Observation) -> tuple[Tensor, Tensor]:
        return gradients(observation, self._layer(observation))

    def _unexplained(self, observation: Observation, images: Tensor) -> Tensor:
        weight, bias = self._gradients(observation)
        rows = self._rows(to_inputs(images, self._layer(observation)), observation)
        # A bias is the weight of an input that is always 1.
        rows = torch.cat([rows, torch.ones_like(rows[..., :1])], dim=2)
        seen = torch.cat([weight, bias[..., None]], dim=2)
        rest = seen - seen @ torch.linalg.pinv(rows) @ rows
        # Nothing explains a gradient that is not there.
        whole = seen.square().sum((1, 2))
        share = torch.where(whole > 0, rest.square().sum((1, 2)) / whole.clamp(min=1e-300), 1.0)
        loss: Tensor = share.to(observation.dtype)
        return loss

    def _recurring_rows(self, weight: Tensor, bias: Tensor, observation: Observation) -> Tensor:
        """Pick B distinct rows a victim, first those that recur most, [N, B, P]."""
        alive = bias != 0
        ratios = torch.where(alive[..., None], weight / torch.where(alive, bias, 1.0)[..., None], 0.0)
        points, outside = self._compared(ratios, observation)
        # Without the matrix product, whose cancellation blurs what is the same.
        apart = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist") / points.shape[2] ** 0.5
        same = (apart < _SAME) & alive[:, None]
        # Ties go to the row of the largest bias gradient, which rounding hurts least.
        size = bias.abs() / bias.abs().amax(1, keepdim=True).clamp(min=1e-300)
        # By the number of twins; rows that are no image need a thousand more, rows without a bias gradient come last.
        # What was picked falls below all of these, and its twins below the rest.
        votes = same.sum(2) + 0.5 * size - 1e3 * outside - 1e6 * ~alive
        victim = torch.arange(len(bias), device=bias.device)
        picked = []
        for _ in range(observation.batch_size):
            best = votes.argmax(1)
            twins = same[victim, best]
            picked.append(_ratio(weight, bias, twins.double()))
            votes = (votes - 1e9 * twins).scatter(1, best[:, None], -1e12)
        return torch.stack(picked, dim=1)


def _ratio(weight: Tensor, bias: Tensor, chosen: Tensor) -> Tensor:
    """Least squares over chosen rows [N, O] for the input that they share, [N, P]."""
    strength = bias * chosen
    return torch.einsum("nop,no->np", weight, strength) / strength.square().sum(1, keepdim=True)
