"""How a client trains, and what an attacker knows: what a setting grants, what an attack needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt

from . import registry
from .client import PLAIN, Client
from .update import LocalTraining


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


class Power(StrEnum):
    """What the server may do to the model that it sends.

    honest: sends the agreed model as training left it. parameters: chooses its parameters. architecture: also adds
    layers.
    """

    HONEST = "honest"
    PARAMETERS = "parameters"
    ARCHITECTURE = "architecture"


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
    Power: {power: rank for rank, power in enumerate(Power)},
}


def rank(level: StrEnum) -> int:
    """Position on its ladder: a grant covers a need when its rank is at least as high.

    >>> rank(Labels.KNOWN) > rank(Labels.COUNTS) > rank(Labels.INFERRED)
    True
    """
    return _RANKS[type(level)][level]


@dataclass(frozen=True, kw_only=True)
class Knowledge:
    """What an attacker knows beyond the model, the message and the batch size; needed by an attack or granted."""

    labels: Labels = Labels.NONE
    """Of the batch: none, counts (how often each occurs), or known; an attack may also need them inferred or
    optimised, for which nothing has to be granted."""
    batch_norm: BatchNorm = BatchNorm.NONE
    """Statistics of batch normalisation: none, running (the server's), or batch (those of the victim's own batch)."""
    defense: Level = Level.OBLIVIOUS
    """How much of the defense is known; the suite's `knowledge` grants it."""
    generator: bool = False
    """A generator trained on public images of the victim's kind."""
    auxiliary: bool = False
    """Public labelled images, disjoint from every victim."""
    local_training: bool = False
    """Number, size and rate of the client's local steps."""
    server: Power = Power.HONEST
    """What the server may do to the model; the setting's `server` grants it."""

    def missing(self, granted: Knowledge) -> list[str]:
        """Name what is needed here but not granted, e.g. `["labels: known"]`; empty when all is there.

        >>> Knowledge(labels=Labels.KNOWN, auxiliary=True).missing(Knowledge(labels=Labels.COUNTS))
        ['labels: known', 'auxiliary: true']
        """
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
class Conduct:
    """What a client does with its batch: a client of the registry by its name, with every option."""

    name: str = ""
    """Empty for plain gradient descent on the cross-entropy."""
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Plain values."""
    version: str = ""
    code: str = ""
    """Digest of its code, of every client but the plain one."""

    @property
    def built(self) -> Client:
        """The client itself."""
        if not self.name:
            return PLAIN
        client: Client = registry.build("clients", self.name, self.options)
        return client


@dataclass(frozen=True, kw_only=True)
class Tampering:
    """Who sends the model: a server by its name, with every option."""

    name: str = "honest"
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Plain values."""
    version: str = ""
    code: str = ""
    """Digest of what it computes by."""
    surface: Power = Power.HONEST
    """What it changes of the model."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How the client trains, and what the attacker is granted."""

    name: str = "default"
    """What tables call it."""
    batch_size: Annotated[int, Ge(1)] = 1
    """Images in a victim's batch."""
    mode: Literal["eval", "train"] = "eval"
    """Batch normalisation of the client: running statistics (eval) or its own batch's (train)."""
    epochs: Annotated[int, Ge(0)] = 0
    """Epochs the model was trained for, without a defense, before anything else; 0 is an untrained model."""
    statistics: Literal["initial", "calibrated"] = field(default="initial", metadata={"later": True})
    """Running statistics of an untrained model's batch normalisation: 0 and 1, with which it hardly looks at its
    images, or those of public images, as after a first pass over the data. Trained models have those of training."""
    after_rounds: Annotated[int, Ge(0)] = field(default=0, metadata={"later": True})
    """Rounds of federated training under the same defense before the update, as the suite's utility trains; the
    client takes part for the first time."""
    local_steps: Annotated[int, Ge(1)] = 1
    """Local steps of FedAvg; a FedSGD client (`local_lr` unset) takes one and sends its gradient."""
    local_batch_size: Annotated[int, Ge(1)] | None = None
    """Images in a local step; unset is the whole batch."""
    local_lr: Annotated[float, Gt(0)] | None = None
    """Rate of the local steps; set, the client sends its weight difference (FedAvg)."""
    trainable: Literal["all", "head"] | tuple[str, ...] = field(default="all", metadata={"later": True})
    """What the client trains and sends: all that the model lets train, its last layer, or parameters and modules by
    name; the rest stays as the server sent it."""
    local_order: Literal["fixed", "shuffled"] = field(default="fixed", metadata={"later": True})
    """How each pass over the batch goes: in its own order, or in one that the client draws and nobody else knows."""
    client: Conduct = field(default=Conduct(), metadata={"later": True})
    """Loss, arithmetic and optimiser of the client."""
    rounds: Annotated[int, Ge(1)] = field(default=1, metadata={"later": True})
    """Messages that the attacker has of each client: of the same images and the same model, each with private and
    public randomness of its own."""
    precision: Literal["float32", "float64"] = "float32"
    """Arithmetic of client and attacker."""
    grants: Knowledge = field(default_factory=Knowledge)
    """What the attacker is told; see below."""
    server: Tampering = field(default=Tampering(), metadata={"later": True})
    """Who sends the model: an honest server by default."""

    @property
    def dtype(self) -> torch.dtype:
        """Arithmetic of client and attacker."""
        return torch.float64 if self.precision == "float64" else torch.float32

    @property
    def local_training(self) -> LocalTraining:
        """The client's protocol."""
        return LocalTraining(
            steps=self.local_steps,
            batch_size=self.local_batch_size,
            lr=self.local_lr,
            order=self.local_order,
            client=self.trains,
        )

    @property
    def trains(self) -> Client:
        """The client's loss, arithmetic and optimiser."""
        return self.client.built
