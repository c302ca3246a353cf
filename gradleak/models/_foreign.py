"""Networks of other libraries, made fit for an attack: their weights, their randomness, the images they take."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import GradleakError
from ..sources import tensors

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's colours: what these networks are trained to be given."""


def digest_of(weights: str, digest: str, where: str) -> str:
    """Return the SHA-256 of a file of weights.

    Raises:
        GradleakError: there is no such file, or its hash is not `digest`, where one is given.
    """
    try:
        found = hashlib.sha256(Path(weights).read_bytes()).hexdigest()
    except OSError as error:
        raise GradleakError(f"{where}: weights: no file {weights} ({error.strerror})") from error
    if digest and found != digest:
        raise GradleakError(f"{where}: weights: {weights} has SHA-256 {found[:12]}…; expected {digest[:12]}…")
    return found


def load(network: nn.Module, weights: str, where: str) -> None:
    """Load a local safetensors file or a state dict into a network whose head may have another number of classes.

    Raises:
        GradleakError: the file is neither, or its tensors are not those of the network.
    """
    state, own = tensors(weights, f"{where}: weights:"), network.state_dict()
    head = list(own)[-1].rpartition(".")[0] + "."
    kept = {
        name: tensor
        for name, tensor in state.items()
        if not (name.startswith(head) and name in own and tensor.shape != own[name].shape)
    }
    wrong = [name for name in own if name not in state]
    wrong += [name for name in kept if name not in own or kept[name].shape != own[name].shape]
    if wrong:
        raise GradleakError(f"{where}: weights: {weights} is not of this network: {wrong[0]!r} is missing or differs")
    network.load_state_dict(kept, strict=False)


def quieten(network: nn.Module) -> nn.Module:
    """Switch off what draws at random in training: dropout and stochastic depth, which nobody could repeat."""
    for part in network.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd) or type(part).__name__ == "StochasticDepth":
            part.p = 0.0  # type: ignore[assignment]
        if type(part).__name__ == "DropPath":
            part.drop_prob = 0.0  # type: ignore[assignment]
        if isinstance(part, nn.MultiheadAttention):
            part.dropout = 0.0
    return network


class Colours(nn.Module):
    """Grey images as colour images of three equal channels; colour images as they are."""

    def forward(self, images: Tensor) -> Tensor:
        """Map [B, 1 or 3, H, W] to [B, 3, H, W]."""
        return images.expand(-1, 3, -1, -1)


def try_out(network: nn.Module, shape: tuple[int, int, int], classes: int, where: str) -> nn.Module:
    """Return the network, once it has answered an image.

    Raises:
        GradleakError: it cannot take images of this shape, or its answer is not one number a class.
    """
    try:
        with torch.no_grad():
            scores = network.eval()(torch.zeros(1, *shape))
    except Exception as error:  # another library's; it may raise anything
        reason = " ".join(str(error).split())[:160]
        raise GradleakError(f"{where} cannot take images {shape}: {reason}") from error
    if not isinstance(scores, Tensor) or scores.shape != (1, classes):
        raise GradleakError(f"{where} does not return scores of {classes} classes; only classifiers can be attacked")
    return network.train()
