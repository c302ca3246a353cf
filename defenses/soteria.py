"""Soteria: hides the part of one layer's gradient that says most about the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn
from torch.nn import functional as F

from gradleak import structure
from gradleak.defense import Defense, Message, Public
from gradleak.engine.objectives import cosine
from gradleak.engine.residuals import relative_difference
from gradleak.errors import GradleakError
from gradleak.mechanisms.packing import pack_bits, pack_floats
from gradleak.update import copied, flatten

_CHUNK = 32  # features whose image gradients are computed at once


@dataclass(frozen=True, kw_only=True)
class Soteria(Defense):
    """Removes the columns of a linear layer's weight gradient whose features say most about the images.

    References: Sun et al., CVPR 2021, arXiv:2012.06043. Feature i of the layer's input r is removed if
    |grad_x r_i| / |r_i|, summed over the batch, is among the `ratio` smallest: those that change least when the
    image does, relative to their size. A feature that is zero has nothing to hide and is kept.
    One tensor is changed, and it shows which columns are missing, so the adaptive answer leaves these out
    (Balunović et al., arXiv:2111.04706, leave out the layer).
    """

    family = "representation"
    reference = "arXiv:2012.06043"
    has_likelihood = True

    ratio: Annotated[float, Ge(0), Lt(1)] = 0.4
    """Share of the features that are removed."""
    layer: int = -1
    """The defended one of the linear layers that the model calls, counted as in a list."""

    def prepare_model(self, module: nn.Module) -> nn.Module:
        """Return a copy whose defended layer can leave columns out of its gradient.

        Raises:
            GradleakError: the model has no such linear layer.
        """
        changed = copied(module)
        called = [(name, changed.get_submodule(name)) for name in structure.of(module).called]
        linear = [(name, layer) for name, layer in called if type(layer) is nn.Linear and name]
        if not -len(linear) <= self.layer < len(linear):
            raise GradleakError(
                f"defense 'soteria': layer = {self.layer}, but the model has {len(linear)} linear layers"
            )
        name, layer = linear[self.layer]
        changed.set_submodule(name, _Defended(layer))
        return changed

    def private_buffers(self, module: nn.Module, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return which columns to keep, [B, features], one row for all images; nothing is random.

        They are picked in float64: features of close scores are not told apart by rounding.
        """
        exact = copied(module).double()
        name, layer = next((n, m) for n, m in exact.named_modules() if isinstance(m, _Defended))
        seen: list[Tensor] = []
        hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            leaf = images.detach().double().requires_grad_()
            exact(leaf)
        finally:
            hook.remove()
        features = seen[0]
        norms = torch.cat([_image_gradient_norms(features, leaf, part) for part in _parts(features.shape[1])])
        sizes = features.detach().abs().T
        scores = torch.where(sizes > 0, norms / sizes.clamp(min=1e-30), torch.inf).sum(1)
        removed = scores.topk(int(self.ratio * len(scores)), largest=False).indices
        kept = torch.ones_like(scores).index_fill(0, removed, 0.0).to(images)
        return {f"{name}.kept": kept.expand(len(images), -1).clone()}

    def nll(self, message: Message, simulated: Message, public: Public) -> Tensor:
        """Cosine over all that was sent: the defended weight's missing columns are left out."""
        seen = {
            name: simulated[name] * _columns(sent) if name.endswith(_WEIGHT) else simulated[name]
            for name, sent in message.items()
        }
        return cosine(seen, message)

    def residual(self, message: Message, simulated: Message, public: Public) -> Tensor:
        """Relative differences of all that was sent."""
        seen = {
            name: simulated[name] * _columns(sent) if name.endswith(_WEIGHT) else simulated[name]
            for name, sent in message.items()
        }
        return relative_difference(seen, message)

    def pack(self, message: Message, public: Public) -> bytes:
        """A bitmap of the defended weight's columns, then float32 values without the missing ones."""
        weight = next((tensor for name, tensor in message.items() if name.endswith(_WEIGHT)), None)
        if weight is None:
            return super().pack(message, public)
        columns = _columns(weight) > 0
        rest = {name: tensor for name, tensor in message.items() if not name.endswith(_WEIGHT)}
        return pack_bits(columns, bits=1) + pack_floats(weight[:, columns].flatten()) + pack_floats(flatten(rest))


_WEIGHT = "defended.weight"


class _Defended(nn.Module):
    """A linear layer whose weight sees only the features to keep, while its value is that of all."""

    kept: Tensor

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.defended = layer
        self.register_buffer("kept", torch.empty(0), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        if not self.kept.numel():
            return self.defended(features)  # type: ignore[no-any-return]
        weight, bias = self.defended.weight, self.defended.bias
        return F.linear(features * self.kept, weight, bias) + F.linear(features * (1 - self.kept), weight.detach())


def _columns(weight: Tensor) -> Tensor:
    """1 for every column [features] that is not all zero."""
    return (weight != 0).any(0).to(weight)


def _parts(features: int) -> list[range]:
    return [range(start, min(start + _CHUNK, features)) for start in range(0, features, _CHUNK)]


def _image_gradient_norms(features: Tensor, images: Tensor, part: range) -> Tensor:
    """|grad_x r_i| of some features i of each image, [part, B]."""
    every = torch.eye(features.shape[1], dtype=features.dtype, device=features.device)
    chosen = every[part.start : part.stop]
    towards = chosen[:, None].expand(-1, len(images), -1)
    (gradients,) = torch.autograd.grad(features, images, towards, retain_graph=True, is_grads_batched=True)
    norms: Tensor = gradients.flatten(2).norm(dim=2)
    return norms
