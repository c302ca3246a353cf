"""Discrete key-value bottleneck: the trained part of the model sees only which codes an image hits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn
from torch.nn import functional as F

from gradleak import seeds
from gradleak.defense import Defense, Message, Public
from gradleak.errors import GradleakError
from gradleak.update import Update, copied


@dataclass(frozen=True, kw_only=True)
class DiscreteBottleneck(Defense):
    """Replaces the last layer's input by trained values of the nearest fixed keys; what is before is not trained.

    References: Träuble et al., arXiv:2207.11240. The features, normalised, are cut into `heads` parts; each picks
    the nearest of `codes` random keys and is replaced by that key's value. Only values and last layer are
    sent, which show at most heads * log2(codes) bits of an image, besides its label.

    A nearest key has no derivative, so that plain matching would see none: the backward pass is that of a soft
    choice of the given temperature. The adaptive answer matches what was sent; an oblivious attacker takes the
    missing layers for zeros. Deviation: keys are random, not fitted to data, and values start as their keys.
    """

    family = "representation"
    reference = "arXiv:2207.11240"
    linear = False
    simulates = True

    heads: Annotated[int, Ge(1)] = 4
    """Parts the features are cut into; the last is padded with zeros."""
    codes: Annotated[int, Ge(2)] = 64
    """Keys a head."""
    temperature: Annotated[float, Gt(0)] = 1.0
    """Of the soft choice in the backward pass, in units of the mean squared distance of one feature."""
    frozen: bool = True
    """Whether the layers before the bottleneck are left untrained; otherwise their gradients are sent too."""
    seed: int = 0
    """Seed of the keys."""

    def prepare_model(self, module: nn.Module) -> nn.Module:
        """Return a copy with the codes before its last linear layer.

        Raises:
            GradleakError: the model has no linear layer behind another.
        """
        changed = copied(module)
        linear = [(name, layer) for name, layer in changed.named_modules() if type(layer) is nn.Linear]
        if not linear or not linear[-1][0]:
            raise GradleakError("defense 'discrete-bottleneck': the model has no linear layer to put codes before")
        name, last = linear[-1]
        codes = _Codes(last.in_features, self)
        changed.set_submodule(name, nn.Sequential(codes, last).to(last.weight))
        return changed

    def public(self, template: Update, batch_size: int, generator: torch.Generator) -> Public:
        """Return zeros for each parameter before the bottleneck: known, so not sent."""
        return {name: weight.new_zeros(weight.shape) for name, weight in self._unsent(template).items()}

    def protect(self, update: Update, public: Public, generator: torch.Generator) -> Message:
        """Return the update without the layers before the bottleneck."""
        return self.simulate(update, public)

    def simulate(self, update: Update, public: Public) -> Message:
        """Return a guessed update without the layers before the bottleneck."""
        return {name: tensor for name, tensor in update.items() if name not in public}

    def decode(self, message: Message, public: Public) -> Update:
        """Return the message with zeros for what was not sent."""
        return {**public, **message}

    def _unsent(self, template: Update) -> Update:
        names = list(template)
        first = next(index for index, name in enumerate(names) if name.endswith(_VALUES))
        return {name: template[name] for name in names[:first]} if self.frozen else {}


_VALUES = "0.values"


class _Codes(nn.Module):
    """Features [B, D] to the values of their nearest keys, [B, D]."""

    keys: Tensor

    def __init__(self, features: int, options: DiscreteBottleneck):
        super().__init__()
        self.features, self.heads, self.temperature = features, options.heads, options.temperature
        width = -(-features // options.heads)
        generator = seeds.generator("discrete-bottleneck", options.seed)
        keys = torch.randn(options.heads, options.codes, width, generator=generator, dtype=torch.float64)
        self.register_buffer("keys", keys.float())
        self.values = nn.Parameter(keys.float())

    def forward(self, features: Tensor) -> Tensor:
        normal = F.layer_norm(features, (self.features,))
        heads, _, width = self.keys.shape
        parts = F.pad(normal, (0, heads * width - self.features)).unflatten(1, (heads, width))
        distances = (parts[:, :, None] - self.keys).square().mean(-1)
        soft = (-distances / self.temperature).softmax(-1)
        hard = torch.zeros_like(soft).scatter(-1, distances.argmin(-1, keepdim=True), 1.0)
        chosen = hard + soft - soft.detach()
        return torch.einsum("bhc,hcw->bhw", chosen, self.values).flatten(1)[:, : self.features]
