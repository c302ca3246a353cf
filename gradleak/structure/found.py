"""What can be found in a network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, int, int]
"""Of an image, (C, H, W)."""


@dataclass(frozen=True)
class Head:
    """Parameters whose gradients are those of a linear layer with the logits as its output, as an update names them.

    With cross-entropy, the weight's is the mean of (p - y) h^T over the batch (h: features), the bias's that of p - y.
    """

    weight: str | None
    """Name of the parameter W [K, F] (or [K, F, 1, 1]); None where its gradient is not in the update, as under
    weight normalisation, pruning, or a use elsewhere."""
    bias: str | None
    transposed: bool = False
    """Whether W is kept as [F, K]."""
    layer: str | None = None
    """Name of the module that takes h [B, F] and returns the logits; None where no module does."""
    owned: tuple[str, ...] = ()
    """Every parameter of the head, those under a reparametrisation included, whether sent or not."""


NO_HEAD = "the model has no linear layer whose output is the logits"
"""Why there are no parameters of a head."""


@dataclass(frozen=True)
class OnPixels:
    """A module with parameters that is called once, with inputs each of which is one pixel, scaled and shifted."""

    name: str
    index: Tensor
    """Flat pixel (of C, H, W) that each input of an image reads, -1 for a constant; in the shape of the inputs."""
    constants: Tensor
    """Value of each input that reads no pixel, float64, in the shape of the inputs; 0 elsewhere."""
    mean: Tensor | None
    """Inputs are (x - mean) / std, float64 [C, 1, 1]; None where a channel has not one mean and one std > 0."""
    std: Tensor | None
    whole: bool
    """Whether every pixel is read, and mean and std are known."""
    weight: str | None = None
    """Parameter W of `inputs @ W^T + b`, or of a convolution; None where it is another layer or W is not sent."""
    bias: str | None = None
    """Parameter b; None where there is none or it is not sent."""
    biased: bool = False
    """Whether the layer adds a bias, sent or not."""
    linear: bool = False
    """Whether it is `inputs @ W^T + b`."""
    plain: bool = False
    """Whether the gradient of W is D^T X, and that of b D^T 1 (D: the loss's derivatives at the outputs)."""
    rectified: bool = False
    """Whether D is zero exactly where the output is negative: a ReLU follows."""
    patches: Tensor | None = None
    """Where inputs are read in parts that make one token each: pixels of every patch, [T, P], as in `index`."""
    positions: tuple[str, int] | None = None
    """Parameter added to the tokens, and its row that the first one gets: T rows of its gradient are those by the
    tokens, summed over the batch. None where there is none or it is not sent."""

    def to_images(self, inputs: Tensor, shape: Shape) -> Tensor:
        """Images [..., C, H, W] of inputs [..., P] (P: all of an image's, flat); needs `whole`."""
        assert self.mean is not None and self.std is not None
        pixels = self.arranged(inputs, shape)
        return pixels * self.std.to(pixels) + self.mean.to(pixels)

    def arranged(self, inputs: Tensor, shape: Shape) -> Tensor:
        """Inputs [..., P] in the order of the pixels that they read, [..., C, H, W], normalised as they are."""
        index = self.index.flatten()
        reads = (index >= 0).nonzero().flatten()
        place = torch.empty(shape[0] * shape[1] * shape[2], dtype=torch.int64)
        # Of several inputs that read one pixel the first.
        place[index[reads].flip(0)] = reads.flip(0)
        pixels: Tensor = inputs[..., place.to(inputs.device)].unflatten(-1, shape)
        return pixels

    def to_inputs(self, images: Tensor) -> Tensor:
        """Inputs [..., P] (P: all of an image's, flat) of images [..., C, H, W]; needs `whole`."""
        assert self.mean is not None and self.std is not None
        index, constants = self.index.flatten().to(images.device), self.constants.flatten().to(images)
        values = ((images - self.mean.to(images)) / self.std.to(images)).flatten(-3)
        return torch.where(index >= 0, values[..., index.clamp(min=0)], constants)


@dataclass(frozen=True)
class Link:
    """One layer of a chain, and the shapes of its input and output for one image."""

    name: str
    below: torch.Size
    above: torch.Size


@dataclass(frozen=True)
class Structure:
    """What was found in one network."""

    shape: Shape
    classes: int
    called: tuple[str, ...]
    """Names of the modules without children, or with parameters of their own, in the order in which they are called."""
    sent: tuple[str, ...]
    """Names of the parameters that are trained, which an update holds."""
    head: Head
    on_pixels: tuple[OnPixels, ...]
    """In the order in which they are called."""
    mean: Tensor | None
    """The network's own normalisation (x - mean) / std, float64 [C, 1, 1]; None where it has none of the kind."""
    std: Tensor | None
    chain: tuple[Link, ...]
    """Layers from the first one on the pixels to the logits, each fed by the one before alone; empty for no chain."""
    activations: tuple[str, ...]
    """Modules without parameters that act on each number alone and are not affine."""
