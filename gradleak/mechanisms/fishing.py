"""Heads that silence most images of a batch, and what their gradients tell: shared by the servers that fish.

With every row of the head zero but that of one class c, an image's gradient below the head is W_c (p_c - y_c): it is
there or not as p_c says, which the server decides by the bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .. import structure
from ..defense import Defense
from ..errors import GradleakError
from ..knowledge import Setting
from ..threat import Observation
from ..update import LocalTraining, Network, Update, copied
from .imprint import inputs_at


@dataclass(frozen=True)
class Line:
    """The head of a model: names of W [K, F] and b [K], and the layer that holds them."""

    weight: str
    bias: str
    layer: str
    transposed: bool

    @classmethod
    def of(cls, module: nn.Module, where: str) -> Line:
        """Find it.

        Raises:
            GradleakError: the model has none, or it is not trained.
        """
        head = structure.of(module).head
        if head.weight is None or head.bias is None or head.layer is None:
            raise GradleakError(f"{where}: needs a model whose last layer is linear with a bias, and is trained")
        return cls(head.weight, head.bias, head.layer, head.transposed)

    def rows(self, tensor: Tensor) -> Tensor:
        """Return W [..., K, F] however it is kept."""
        flat = tensor.squeeze(-1) if tensor.ndim > 2 and tensor.shape[-1] == 1 and not self.transposed else tensor
        return flat.mT if self.transposed else flat

    def with_row(self, module: nn.Module, label: int, row: Tensor, bias: Tensor | float, others: float) -> nn.Module:
        """Return a copy whose head is zero but for the row [F] and bias of one class; other classes have one bias."""
        changed = copied(module)
        weight, offset = changed.get_parameter(self.weight), changed.get_parameter(self.bias)
        with torch.no_grad():
            weight.zero_()
            self.rows(weight)[label] = row.to(weight)
            offset.fill_(others)
            offset[label] = bias
        return changed

    def features(self, module: nn.Module, images: Tensor) -> Tensor:
        """Return what the head is given for images [B, C, H, W], float64 [B, F]."""
        with torch.no_grad():
            like = next(module.parameters())
            return inputs_at(module, self.layer, images.to(like)).double()

    def isolated(self, update: Update, label: int, images: int, count: int) -> Update:
        """Return the mean gradient of the `count` images that were not silent, of an update that is over `images`.

        Each of them has p_c = 0 and the label c; rows of the other classes, which hold silent images too, follow from
        row c.
        """
        found = {name: tensor * (images / count) for name, tensor in update.items()}
        weight, bias = found[self.weight].clone(), found[self.bias].clone()
        rows, others = self.rows(weight), len(bias) - 1
        rows[:] = -rows[label].clone() / others
        rows[label] *= -others
        bias[:] = 1.0 / others
        bias[label] = -1.0
        return {**found, self.weight: weight, self.bias: bias}


_NOTED = "fished"


def note(module: nn.Module, what: object) -> nn.Module:
    """Keep on a model what its server asks with it, and return the model."""
    vars(module)[_NOTED] = what
    return module


def noted(module: nn.Module) -> object:
    """Return what was kept."""
    return vars(module)[_NOTED]


def as_if_alone(observation: Observation, module: nn.Module, update: Update, label: int, count: int) -> Observation:
    """Return an observation of one victim whose batch are `count` images of one label, sent from a model's update."""
    like = next(iter(observation.network.parameters.values()))
    mode = "train" if observation.network.module.training else "eval"
    sent = {name: tensor[None].to(like) for name, tensor in update.items()}
    return replace(
        observation,
        network=Network.of(copied(module).to(like), mode),
        message=sent,
        update=sent,
        view=None,
        private=None,
        batch_statistics=None,
        batch_size=count,
        training=LocalTraining(),
        labels=torch.full((1, count), label, dtype=torch.int64, device=like.device),
    )


def unsuited(module: nn.Module, setting: Setting, defense: Defense) -> str | None:
    """Say why no server can fish in a model, or None."""
    if setting.local_lr is not None:
        return "needs clients that send one gradient (FedSGD), whose images are counted by it"
    head = structure.of(module).head
    if head.weight is None or head.bias is None or head.layer is None:
        return "needs a model whose last layer is linear with a bias, and is trained"
    return None


def difference(updates: Sequence[Update]) -> Update:
    """Return the first update less the second."""
    first, second = updates
    return {name: first[name] - second[name] for name in first}
