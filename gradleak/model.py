"""The Model contract: builds a network for any image shape of the datasets, with normalisation inside."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from . import seeds, structure
from .errors import GradleakError
from .options import Options
from .plugins import PluginError, at, place_of, place_of_hook, said


@dataclass(frozen=True, kw_only=True)
class Model(Options, ABC):
    """An architecture; a plugin implements `build`."""

    reference: ClassVar[str]
    """The paper or code the architecture comes from."""
    version: ClassVar[str] = "1"
    """Raised whenever its networks change; part of every cell's key."""

    @abstractmethod
    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Return the network for images of shape (C, H, W) in [0, 1]; it returns logits [B, classes].

        The caller has seeded the global generator (see `initialise`), so torch's initialisers may be used.
        Every module must be twice differentiable on every device (no fused attention). As clients run it, the network
        is a function: it draws nothing, keeps nothing between calls, and every run checks that before it starts.

        Raises:
            GradleakError: the architecture cannot take images of this shape.
        """


class Normalise(nn.Module):
    """(x - mean) / std per channel, so that images stay in [0, 1] everywhere outside the model."""

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int, mean: float | tuple[float, ...] = 0.5, std: float | tuple[float, ...] = 0.5):
        """Keep mean and standard deviation, one number or one a channel, as constants of the model."""
        super().__init__()
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32).expand(channels).clone()[:, None, None])
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.float32).expand(channels).clone()[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """Normalise images [B, C, H, W] in [0, 1]."""
        return (images - self.mean) / self.std


def initialise(model: Model, shape: tuple[int, int, int], classes: int, *seed: object) -> nn.Module:
    """Build a network whose initial weights depend on `seed` alone; the global generator is left as it was."""
    with seeds.drawing(seeds.derive("model", *seed)):
        network = _built(model.build(shape, classes), model)
    structure.mark(network, shape)
    return network


def _built(module: object, model: Model) -> nn.Module:
    if not isinstance(module, nn.Module):
        raise PluginError(f"build returned {type(module).__name__}; a torch.nn.Module is needed{_of(model)}")
    lazy = [name for name, tensor in module.named_parameters() if nn.parameter.is_lazy(tensor)]
    if lazy:
        raise PluginError(f"build returned a network whose {lazy[0]!r} has no size yet; give its size{_of(model)}")
    return module


def try_out(module: nn.Module, model: Model, shape: tuple[int, int, int], classes: int) -> None:
    """Run a network on two images, as a client would.

    Raises:
        PluginError: it answers something else than logits [2, classes].
    """
    training = module.training
    like = next(module.parameters(), torch.zeros(()))
    images = torch.full((2, *shape), 0.5, dtype=like.dtype, device=like.device)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            logits: object = module.eval()(images)
    except GradleakError:
        raise
    except Exception as error:
        # The modules may all be torch's: then it is the plugin's choice of them.
        place = "" if place_of(error) else _of(model)
        raise PluginError(f"images of shape {list(shape)}: {said(error)}{place}") from error
    finally:
        module.train(training)
    if not isinstance(logits, Tensor):
        raise PluginError(f"the network returned {type(logits).__name__}; logits [B, classes] are needed{_of(model)}")
    if tuple(logits.shape) != (2, classes):
        found, needed = list(logits.shape), [2, classes]
        raise PluginError(f"the network returned shape {found} for 2 images; {needed} is needed{_of(model)}")


def _of(model: Model) -> str:
    return at(place_of_hook(model, "build"))
