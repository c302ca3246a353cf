"""The line between victim and attacker: what a setting grants, what an attack needs, what the attacker sees."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from . import intake, structure
from .client import PLAIN, Client
from .dataset import Images
from .defense import Defense, Message, Public, View
from .errors import GradleakError
from .knowledge import BatchNorm, Knowledge, Labels, Level, Power, Setting, Tampering, rank
from .mechanisms import batch_statistics
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
        """Note on the network which images it takes, for `gradleak.structure`.

        Raises:
            GradleakError: the network is a bare module, the update is not one of its parameters with a row a victim, or
                labels are not [N, B]; `Observation.of` builds one from what people hold.
        """
        if not isinstance(self.network, Network):
            raise GradleakError(f"network: {type(self.network).__name__}; build it by Observation.of(model, update, …)")
        structure.mark(self.network.module, self.shape)
        intake.refuse_misfits(self.update, self.network)
        if self.labels is not None:
            intake.refuse_labels(self.labels, self.victims, self.batch_size)

    @classmethod
    def of(
        cls,
        model: nn.Module | Network,
        update: Mapping[str, Tensor] | Sequence[Tensor],
        shape: tuple[int, int, int],
        *,
        batch_size: int = 1,
        labels: Tensor | Sequence[int] | int | None = None,
        local: LocalTraining | None = None,
        weight_difference: bool | None = None,
        mode: Literal["train", "eval"] | None = None,
        client: Client = PLAIN,
        defense: Defense | None = None,
        auxiliary: Images | None = None,
        compute: Compute | None = None,
    ) -> Self:
        """Return what an attacker sees who has captured an update of this model.

        Args:
            model: as the server sent it, images [B, C, H, W] in [0, 1] to logits; what needs no gradient is not sent.
            update: of one client, tensors by parameter name or in the order of `model.parameters()`; of N clients
                with an axis in front.
            shape: of an image, (C, H, W).
            batch_size: images of a client, B.
            labels: [B] or [N, B] where they are known, in any order of the images; else attacks infer them.
            local: the client's local steps where they are known; the update is a weight difference then.
            weight_difference: whether it is one (weights after local training minus before); by default, if `local` has
                a rate, and then its sign is looked at.
            mode: batch normalisation by the batch (train) or by running statistics (eval); by default as the module is.
            client: its loss and arithmetic, and the optimiser of its local steps.
            defense: what is known of the client's defense, for one whose messages are updates (noise, clipping). A
                round's randomness that the server shares is not known, unless there is none.
            auxiliary: public labelled images of the victims' kind.
            compute: how attacks may compute.

        Raises:
            GradleakError: model, update, shape or labels do not fit each other; the line says which and how.
        """
        network = intake.network_of(model, shape, mode, client)
        rows = intake.stacked(update, network)
        if batch_size < 1:
            raise GradleakError(f"batch_size: {batch_size} (allowed: 1 or more)")
        training, difference = intake.training_of(local, weight_difference, client)
        if defense is None and weight_difference is None and client.shows_labels:
            intake.refuse_other_kind(rows, network, batch_size, difference)
        return cls(
            network=network,
            message=rows,
            update=rows,
            view=None if defense is None else View(defense, _agreed(defense, network, batch_size)),
            shape=shape,
            classes=structure.of(network.module).classes,
            batch_size=batch_size,
            training=training,
            weight_difference=difference,
            labels=None if labels is None else intake.known_labels(labels, rows, network, batch_size),
            running_statistics=_running(model, network),
            auxiliary=auxiliary,
            compute=compute or Compute(),
        )

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


def _running(model: nn.Module | Network, network: Network) -> dict[str, Tensor] | None:
    """Return the running statistics of a model as it was given, None where it has none."""
    return batch_statistics.running(model if isinstance(model, nn.Module) else network.module) or None


def _agreed(defense: Defense, network: Network, batch_size: int) -> Public | None:
    """Return what a defense publishes in a round, if it draws none of it; else it cannot be told from an update."""
    first, second = (
        defense.public(dict(network.parameters), batch_size, torch.Generator().manual_seed(seed)) for seed in (0, 1)
    )
    alike = first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    return first if alike else None
