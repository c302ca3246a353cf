"""The contract of attacks: an observation in, a reconstruction out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from .defense import Defense
from .engine.loop import Status
from .options import Options
from .seeds import Generators
from .threat import Knowledge, Observation, Setting


@dataclass(kw_only=True)
class Reconstruction:
    """An attack's answer for N victims."""

    images: Tensor
    """[N, B, C, H, W] in [0, 1], in the attacker's own order."""
    labels: Tensor | None = None
    """Labels of these images, [N, B], int64."""
    loss: Tensor | None = None
    """The attacker's own loss of exactly these images, [N]; what restarts were picked by."""
    status: list[Status] = field(default_factory=list)
    """One a victim; empty means all `ok`."""
    iterations: Tensor | None = None
    """Iterations spent on each victim over all restarts, [N]."""
    gradient_evaluations: Tensor | None = None
    """Gradients of the client's model computed for each victim, [N]; the unit of an attack's budget."""
    candidates: Tensor | None = None
    """Every restart's images [N, R, B, C, H, W], for the oracle column only."""
    trace: Tensor | None = None
    """The picked restart's matching loss at evenly spaced iterations, [N, points]."""
    backend: str = ""
    """Engine backend that computed it."""
    guessed: dict[str, Tensor] = field(default_factory=dict)
    """Whatever else was recovered, [N, ...], such as dropout masks by buffer name."""
    details: dict[str, Tensor] = field(default_factory=dict)
    """Further numbers of the attack's own, [N] each, shown with its rows."""


@dataclass(frozen=True, kw_only=True)
class Attack(Options, ABC):
    """A gradient inversion attack; a plugin implements `reconstruct`."""

    family: ClassVar[str]
    """optimisation, analytic, generative, learned, or control."""
    threat_model: ClassVar[str] = "honest server"
    reference: ClassVar[str]
    version: ClassVar[str] = "1"
    """Raised whenever results change, so that old cells are not taken for new ones."""
    needs: ClassVar[Knowledge] = Knowledge()
    """Knowledge without which the attack cannot run."""
    adaptive: ClassVar[bool] = False
    """Whether the attack uses what it knows of a defense."""
    observes_other_victim: ClassVar[bool] = False
    """A control: it is shown the observation of another victim."""
    ensembles: ClassVar[tuple[str, ...]] = ()
    """Ensembles that the attack is a member of, such as `auto-v1`; a suite that names one runs all members that can
    run. A changed membership is a new version of the name."""
    tuning: ClassVar[str] = "defaults of the reference"
    """How the defaults were found: on which tuning victims, with how many trials."""

    @abstractmethod
    def reconstruct(self, observation: Observation, generator: Generators) -> Reconstruction:
        """Return images for every victim of the observation; `generator` has one stream a victim."""

    def unsuited(self, module: nn.Module, setting: Setting, defense: Defense) -> str | None:
        """Say why this attack cannot run on such a client at all, or None; asked before anything runs."""
        return None

    def loss(
        self, observation: Observation, images: Tensor, targets: Tensor, buffers: dict[str, Tensor]
    ) -> Tensor | None:
        """Own loss [N] of given batches; the evaluator asks it for the truth's. None without a loss."""
        return None
