"""The line between victim and attacker: what a setting grants, what an attack needs, what the attacker sees."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from . import structure
from .dataset import Images
from .defense import Message, View
from .knowledge import BatchNorm, Knowledge, Labels, Level, Power, Setting, Tampering, rank
from .update import LocalTraining, Network, Update

__all__ = [
    "BatchNorm",
    "Compute",
    "Knowledge",
    "Labels",
    "Level",
    "Observation",
    "Power",
    "Setting",
    "Tampering",
    "Width",
    "Widths",
    "rank",
]

Width = int | Literal["auto"]
"""Trials computed together: a number, or as many as memory is measured to hold."""


@dataclass
class Widths:
    """Widths that were found out, by kind of problem and the backend that was asked for.

    What one cell could not hold must not change another's last digits, so every cell starts without any.
    """

    halved: dict[tuple[str, str], int] = field(default_factory=dict)
    """Gone down to where memory ran out."""
    measured: dict[tuple[str, str], int] = field(default_factory=dict)
    """As many as memory holds."""


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How an attack may compute; changes no result beyond rounding."""

    backend: str = "auto"
    """Engine backend: auto, sequential, vmap, …"""
    width: Width = 32
    """Victims (times restarts) optimised together, at most; fewer where memory runs out."""
    compile: bool = False
    """Whether to compile backends that can be."""
    deadline: float | None = None
    """`time.monotonic()` after which an attack stops; its victims are marked as timed out."""
    widths: Widths = field(default_factory=Widths, compare=False, repr=False)
    """What the engine has found out of memory, kept from one minimisation of an attack to the next."""
    progress: Callable[[float, float], None] | None = None
    """Called now and then with the share of work done in [0, 1] and the current mean loss."""

    @property
    def expired(self) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and time.monotonic() > self.deadline


@dataclass(frozen=True, kw_only=True)
class Observation:
    """All that an attacker sees of N victims; holds no image of theirs."""

    network: Network
    """The model as the attacker runs it, its parameters and buffers those the server sent."""
    message: Message
    """What the clients sent, each tensor [N, ...]."""
    update: Update
    """The message as an honest server decodes it, one tensor a parameter, [N, ...]."""
    view: View | None
    """What is known of the defense; None for an oblivious attacker."""
    shape: tuple[int, int, int]
    """Image shape (C, H, W)."""
    classes: int
    batch_size: int
    training: LocalTraining
    """The client's protocol as far as granted: a FedSGD step where nothing is."""
    weight_difference: bool = False
    """Whether `update` is a weight difference (FedAvg) rather than a gradient."""
    labels: Tensor | None = None
    """Granted labels [N, B] in the order of the batch (`known`), or sorted (`counts`)."""
    running_statistics: dict[str, Tensor] | None = None
    """Granted running statistics of each batch normalisation layer (see `batch_statistics`), [channels]."""
    batch_statistics: dict[str, Tensor] | None = None
    """Granted statistics of each batch normalisation layer on the victim's own batch, [N, channels]."""
    generator: Any = None
    """Granted image prior."""
    auxiliary: Images | None = None
    """Granted public images."""
    private: dict[str, Tensor] | None = None
    """The clients' private randomness, [N, ...], for an oracle."""
    compute: Compute = field(default_factory=Compute)

    def __post_init__(self) -> None:
        """Note on the network which images it takes, for `gradleak.structure`."""
        structure.mark(self.network.module, self.shape)

    @property
    def victims(self) -> int:
        """N."""
        return len(next(iter(self.message.values())))

    @property
    def device(self) -> torch.device:
        """Where the message lies."""
        return next(iter(self.message.values())).device

    @property
    def dtype(self) -> torch.dtype:
        """Arithmetic of the model."""
        return next(iter(self.network.parameters.values())).dtype

    @property
    def gradient(self) -> Update:
        """The decoded update with the sign of a gradient, [N, ...]: a weight difference is negated.

        Where the local rate is known the difference is divided by rate times steps: the mean local gradient.
        """
        if not self.weight_difference:
            return self.update
        scale = (self.training.lr or 1.0) * self.training.steps
        return {name: -tensor / scale for name, tensor in self.update.items()}
