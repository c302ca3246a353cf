"""What is noted on a network besides its parameters: the images it takes, and what of it is trained."""

from __future__ import annotations

from typing import cast

from torch import nn

from .found import Shape


def mark(module: nn.Module, shape: Shape) -> None:
    """Note on a network for which images (C, H, W) it was built."""
    vars(module)["image_shape"] = tuple(shape)


def shape_of(module: nn.Module) -> Shape | None:
    """Shape of the images that a network, or the first marked part of it, was built for."""
    found = (vars(each).get("image_shape") for each in module.modules())
    return cast(Shape | None, next((shape for shape in found if shape is not None), None))


def mark_sent(module: nn.Module, names: tuple[str, ...]) -> None:
    """Note on a network that clients run which of its parameters are trained."""
    vars(module)["sent"] = names


def sent_of(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters that are trained: those noted, or else those that require a gradient."""
    noted = vars(module).get("sent")
    if noted is not None:
        return cast(tuple[str, ...], noted)
    return tuple(name for name, tensor in module.named_parameters() if tensor.requires_grad)
