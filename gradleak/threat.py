"""The line between victim and attacker: what a setting grants, what an attack needs, what the attacker sees."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from . import structure
from .dataset import Images
from .update import LocalTraining, Network, Update

if TYPE_CHECKING:
    from .defense import Message, View


class Labels(StrEnum):
    """What is known of a victim's labels; `inferred` and `optimised` need nothing granted."""

    NONE = "none"
    OPTIMISED = "optimised"
    INFERRED = "inferred"
    COUNTS = "counts"
    KNOWN = "known"


class BatchNorm(StrEnum):
    """Which batch normalisation statistics are known: the server's running ones, or the victim batch's own."""

    NONE = "none"
    RUNNING = "running"
    BATCH = "batch"


class Level(StrEnum):
    """How much of the defense is known (Kerckhoffs' ladder, K0 to K3).

    oblivious: takes the decoded message for a clean update. parameters: family and parameters.
    public: also the public randomness of the round. oracle: private randomness too; a ceiling, never a headline.
    """

    OBLIVIOUS = "oblivious"
    PARAMETERS = "parameters"
    PUBLIC = "public"
    ORACLE = "oracle"


_RANKS: dict[type[StrEnum], dict[StrEnum, int]] = {
    Labels: {
        Labels.NONE: 0,
        Labels.OPTIMISED: 0,
        Labels.INFERRED: 0,
        Labels.COUNTS: 1,
        Labels.KNOWN: 2,
    },
    BatchNorm: {BatchNorm.NONE: 0, BatchNorm.RUNNING: 1, BatchNorm.BATCH: 2},
    Level: {level: rank for rank, level in enumerate(Level)},
}


def rank(level: StrEnum) -> int:
    """Position on its ladder: a grant covers a need when its rank is at least as high."""
    return _RANKS[type(level)][level]


@dataclass(frozen=True, kw_only=True)
class Knowledge:
    """What an attacker knows beyond the model, the message and the batch size; needed by an attack or granted."""

    labels: Labels = Labels.NONE
    batch_norm: BatchNorm = BatchNorm.NONE
    defense: Level = Level.OBLIVIOUS
    generator: bool = False
    """A generator trained on public images of the victim's kind."""
    auxiliary: bool = False
    """Public labelled images, disjoint from every victim."""
    local_training: bool = False
    """Number, size and rate of the client's local steps."""

    def missing(self, granted: Knowledge) -> list[str]:
        """Name what is needed here but not granted, e.g. `["labels: known"]`; empty when all is there."""
        lacking = []
        for item in dataclasses.fields(self):
            need, grant = getattr(self, item.name), getattr(granted, item.name)
            if isinstance(need, StrEnum):
                if rank(need) > rank(grant):
                    lacking.append(f"{item.name}: {need.value}")
            elif need and not grant:
                lacking.append(f"{item.name}: true")
        return lacking


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How the client trains, and what the attacker is granted."""

    name: str = "default"
    batch_size: Annotated[int, Ge(1)] = 1
    """Images in a victim's batch."""
    mode: Literal["eval", "train"] = "eval"
    """Batch normalisation of the client: running statistics (eval) or its own batch's (train)."""
    epochs: Annotated[int, Ge(0)] = 0
    """Epochs the model was trained for before the update; 0 is an untrained model."""
    local_steps: Annotated[int, Ge(1)] = 1
    """Local steps of FedAvg; a FedSGD client (`local_lr` unset) takes one and sends its gradient."""
    local_batch_size: Annotated[int, Ge(1)] | None = None
    """Images in a local step; unset is the whole batch."""
    local_lr: Annotated[float, Gt(0)] | None = None
    """Rate of the local steps; set, the client sends its weight difference (FedAvg)."""
    trainable: Literal["all", "head"] | tuple[str, ...] = field(default="all", metadata={"later": True})
    """What the client trains and sends: all that the model lets train, its last layer, or parameters and modules by
    name; the rest stays as the server sent it."""
    precision: Literal["float32", "float64"] = "float32"
    grants: Knowledge = field(default_factory=Knowledge)

    @property
    def dtype(self) -> torch.dtype:
        """Arithmetic of client and attacker."""
        return torch.float64 if self.precision == "float64" else torch.float32

    @property
    def local_training(self) -> LocalTraining:
        """The client's protocol."""
        return LocalTraining(steps=self.local_steps, batch_size=self.local_batch_size, lr=self.local_lr)


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
