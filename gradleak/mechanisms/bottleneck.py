"""A variational bottleneck that can be put before any model's last linear layer, and the noise to run it with.

The noise is a buffer of its site, so that a client draws it, an oracle is shown it and an attacker searches for
it like anything else that a network is called with (`Network.logits(buffers=...)`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import seeds, structure
from ..errors import GradleakError
from ..update import Extended, copied


class Bottleneck(nn.Module):
    """Features [B, D] to a sample z [B, K] of N(mu, std^2), both linear in the features, std by softplus.

    `noise` [B, K] is z's standard normal noise; an empty one, the default, gives the mean, as in eval mode.
    """

    noise: Tensor

    def __init__(self, features: int, width: int):
        """Make the encoder of D = `features` to K = `width`."""
        super().__init__()
        self.width = width
        self.encoder = nn.Linear(features, 2 * width)
        self.register_buffer("noise", torch.empty(0), persistent=False)
        self.divergence: Tensor | None = None

    def forward(self, features: Tensor) -> Tensor:
        """Sample, and note the divergence from N(0, 1), in nats: the sum over z, the mean over the batch."""
        mean, raw = self.encoder(features).chunk(2, dim=-1)
        deviation = F.softplus(raw)
        gaps = mean.square() + deviation.square() - 1 - 2 * (deviation + 1e-12).log()
        self.divergence = gaps.sum(-1).mean() / 2
        sample: Tensor = mean + deviation * self.noise if self.noise.numel() else mean
        return sample


class _Bottlenecked(Extended):
    """A model with a bottleneck, whose loss has `beta` times the divergence in bits."""

    def __init__(self, model: nn.Module, beta: float):
        super().__init__()
        self.model, self.beta = model, beta

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        scores: Tensor = self.model(images)
        site = next(layer for layer in self.model.modules() if isinstance(layer, Bottleneck))
        divergence, site.divergence = site.divergence, None
        assert divergence is not None
        return scores if targets is None else (scores, self.beta / math.log(2) * divergence)


def insert(module: nn.Module, width: int, beta: float, expand: bool, seed: int) -> nn.Module:
    """Return a copy with a bottleneck before the linear layer whose output is the logits.

    Args:
        module: the model.
        width: K, numbers in the bottleneck.
        beta: weight of the divergence in the loss.
        expand: map z back to the D features that the last layer takes; else the last layer is made anew for z.
        seed: of the new weights.

    Raises:
        GradleakError: the model has no such layer behind another.
    """
    changed = copied(module)
    name = structure.of(module).head.layer
    last = changed.get_submodule(name) if name else None
    if not name or type(last) is not nn.Linear:
        raise GradleakError(f"bottleneck: {structure.NO_HEAD}, to put it before")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derive("bottleneck", seed))
        site = Bottleneck(last.in_features, width)
        if expand:
            head = nn.Sequential(site, nn.Linear(width, last.in_features), last)
        else:
            head = nn.Sequential(site, nn.Linear(width, last.out_features))
    changed.set_submodule(name, head.to(last.weight))
    return _Bottlenecked(changed, beta)


def noise_shapes(module: nn.Module, batch_size: int) -> dict[str, tuple[int, int]]:
    """Shape [B, K] of the noise of every site, by buffer name."""
    sites = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, Bottleneck)]
    return {f"{name}.noise": (batch_size, site.width) for name, site in sites}
