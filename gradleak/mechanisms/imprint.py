"""Layers that keep single images apart in their own gradient: what a server puts before a layer, and how bins are cut.

Every row of a first linear layer reads the same number h of an image; biases cut the line of h into bins. An image that
is alone in its bin is the quotient of two differences of gradients.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from .. import structure
from ..errors import GradleakError, unknown
from ..update import copied

Reading = Literal["random", "mean", "dct"]
"""What is read: a random direction of zero mean, the mean, or one of the cosine transform's."""
FAR = 10.0
"""Standard deviations beyond which no image is expected: where the outermost bins end."""


class Imprint(nn.Module):
    """x + back(act(rows(x))): rows that differ in their bias alone, and columns on the way back that are all equal.

    cumulative: act is a ReLU, so a row sees all images above its edge. sparse: act is the identity cut to [0, 1] and
    rows are scaled by the width of their bin, so that a row sees the images in its bin only.
    """

    def __init__(self, reading: Tensor, edges: Tensor, back: Tensor, sparse: bool, closed: bool = False):
        """Cut the line of `reading` [P] at `edges` [K], ascending; `back` [P] is the column on the way back.

        Where they are `closed`, the last edge ends the last bin; else it begins one that has no end.
        """
        super().__init__()
        self.sparse, self.closed = sparse, closed
        bins, inputs = len(edges), len(reading)
        self.rows, self.back = skip_init(nn.Linear, inputs, bins), skip_init(nn.Linear, bins, inputs)
        width = widths(edges) if sparse else torch.ones_like(edges)
        with torch.no_grad():
            self.rows.weight.copy_(reading / width[:, None])
            self.rows.bias.copy_(-edges / width)
            self.back.weight.copy_(back[:, None].expand(-1, bins))
            self.back.bias.zero_()

    def forward(self, inputs: Tensor) -> Tensor:
        """Add what the rows say to inputs [B, ...]."""
        added: Tensor = self.back(active(self.rows(inputs.flatten(1)), self.sparse))
        return inputs + added.view_as(inputs)


class Apart(nn.Module):
    """`Imprint` for one client of a sum: a frozen convolution copies its image to channels that no other client uses.

    A further channel holds a constant, whose weights' gradient is what a client's own bias would get: biases are
    shared by all clients of the sum.
    """

    def __init__(
        self,
        reading: Tensor,
        edges: Tensor,
        back: Tensor,
        shape: tuple[int, int, int],
        client: int,
        clients: int,
        scale: float,
    ):
        """As `Imprint`, sparse, with `scale` times the images [C, H, W] of one of so many clients."""
        super().__init__()
        channels, height, width = shape
        wide = channels + 1
        self.client, self.shape = client, shape
        self.copy = skip_init(nn.Conv2d, channels, wide * clients, 3, padding=1)
        self.rows = skip_init(nn.Linear, wide * clients * height * width, len(edges))
        self.back = skip_init(nn.Linear, len(edges), channels * height * width)
        own = torch.cat([reading.view(shape), torch.zeros_like(reading).view(shape)[:1]]).flatten().repeat(clients)
        with torch.no_grad():
            self.copy.weight.zero_()
            self.copy.bias.zero_()
            for channel in range(channels):
                self.copy.weight[wide * client + channel, channel, 1, 1] = scale
            self.copy.bias[wide * client + channels] = scale
            self.rows.weight.copy_(own / (scale * widths(edges)[:, None]))
            self.rows.bias.copy_(-edges / widths(edges))
            self.back.weight.copy_(back[:, None].expand(-1, len(edges)))
            self.back.bias.zero_()
        self.copy.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Add what the rows say to images [B, C, H, W]."""
        added: Tensor = self.back(active(self.rows(self.copy(images).flatten(1)), True))
        return images + added.view_as(images)

    def own(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Of the rows' gradient [..., K, P] this client's images [..., K, C * H * W] and what they are weighted by."""
        channels, height, width = self.shape
        blocks = rows.unflatten(-1, (-1, channels + 1, height * width))[..., self.client, :, :]
        return blocks[..., :channels, :].flatten(-2), blocks[..., channels, 0]


def active(outputs: Tensor, sparse: bool) -> Tensor:
    """A ReLU, or the identity cut to [0, 1]."""
    return outputs.clamp(0, 1) if sparse else outputs.relu()


def widths(edges: Tensor) -> Tensor:
    """Width [K] of the bins that begin at `edges` [K]; the last is as wide as the one before but one reaches."""
    last = edges[-1:] + (edges[-1:] - edges[:1]).clamp(min=1e-9)
    return torch.cat([edges, last]).diff()


def direction(reading: Reading, inputs: int, generator: torch.Generator, mode: int = 32) -> Tensor:
    """Return what is read of inputs [P], float64 of unit norm: [P].

    Args:
        reading: what kind.
        inputs: P.
        generator: of a random direction.
        mode: number of the cosine, from 1.
    """
    if reading == "mean":
        row = torch.ones(inputs, dtype=torch.float64)
    elif reading == "dct":
        places = torch.arange(inputs, dtype=torch.float64)
        row = torch.cos(math.pi / inputs * (places + 0.5) * (mode % inputs or 1))
    else:
        row = torch.randn(inputs, generator=generator, dtype=torch.float64)
        row = row - row.mean()
    unit: Tensor = row / row.norm()
    return unit


def edges_of(readings: Tensor, bins: int, law: Literal["normal", "laplace", "empirical"]) -> Tensor:
    """Where bins [K] begin that are equally likely under a law fitted to readings of public images [M], ascending.

    The first begins `FAR` standard deviations below the mean.
    """
    readings = readings.double()
    shares = torch.arange(1, bins, dtype=torch.float64) / bins
    mean, deviation = readings.mean(), readings.std().clamp(min=1e-12)
    if law == "empirical":
        inner = torch.quantile(readings, shares)
    elif law == "laplace":
        centred = shares - 0.5
        inner = mean - deviation / math.sqrt(2) * centred.sign() * torch.log1p(-2 * centred.abs())
    else:
        inner = mean + deviation * math.sqrt(2) * torch.erfinv(2 * shares - 1)
    first = torch.minimum(mean, inner[:1].min() if bins > 1 else mean) - FAR * deviation
    edges = torch.cat([first.reshape(1), inner])
    # Equal quantiles would make a bin without width.
    return torch.cummax(edges, 0).values + 1e-9 * deviation * torch.arange(bins, dtype=torch.float64)


def inputs_at(module: nn.Module, layer: str, images: Tensor) -> Tensor:
    """Return what a layer of a model is given for images [B, C, H, W], flat: [B, P]; with a graph.

    Raises:
        GradleakError: the layer is not called with one tensor.
    """
    seen: list[Tensor] = []

    def note(_: nn.Module, given: tuple[object, ...]) -> None:
        if given and isinstance(given[0], Tensor):
            seen.append(given[0])

    handle = module.get_submodule(layer).register_forward_pre_hook(note)
    try:
        module(images)
    finally:
        handle.remove()
    if len(seen) != 1 or len(seen[0]) != len(images):
        raise GradleakError(f"layer {layer!r} is called {len(seen)} times with a batch (allowed: once)")
    return seen[0].flatten(1)


def placed_before(module: nn.Module, layer: str, block: nn.Module) -> nn.Module:
    """Return a copy of a model with a block before a layer; everything else keeps its place."""
    changed = copied(module)
    like = next(changed.parameters())
    inner = changed.get_submodule(layer)
    changed.set_submodule(layer, nn.Sequential(block.to(like), inner).train(inner.training))
    shape = structure.shape_of(module)
    if shape is not None:
        structure.mark(changed, shape)
    return changed


def layer_named(module: nn.Module, name: str, where: str) -> str:
    """Return the layer that a block goes before: the first one that is called for `input`.

    Raises:
        GradleakError: there is no such layer.
    """
    called = [each for each in structure.of(module).called if each]
    if not called:
        raise GradleakError(f"{where}: the model has no layer to put anything before")
    if name == "input":
        return called[0]
    if name not in dict(module.named_modules()) or not name:
        raise unknown("layer", name, ["input", *called], where)
    return name


def expected(images: int, bins: int, read: int | None = None) -> float:
    """Images that are expected alone in their bin, of so many equally likely ones: n (1 - 1 / K)^(n - 1).

    Args:
        images: n.
        bins: K.
        read: how many of the bins are read; by default all.
    """
    return images * (bins if read is None else read) / bins * (1 - 1 / bins) ** (images - 1)
