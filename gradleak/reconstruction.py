"""The contract of attacks: an observation in, a reconstruction out."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from .defense import Defense
from .engine import answers
from .engine.loop import Status
from .options import Options
from .plugins import PluginError, at, place_of_hook
from .seeds import Generators
from .threat import Knowledge, Level, Observation, Setting


@dataclass(kw_only=True)
class Reconstruction:
    """An attack's answer for N victims."""

    images: Tensor
    """[N, B, C, H, W] in [0, 1], in the attacker's own order; a victim whose images leave it by more than 1e-6, or are
    not finite, is `invalid`, which counts as failed."""
    labels: Tensor | None = None
    """Labels of these images, [N, B], int64; a victim with one that is no class is `invalid`."""
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
    backend_reason: str = ""
    """Why it was not the backend that was asked for."""
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
    ensembles: ClassVar[tuple[str, ...] | Mapping[str, Mapping[str, Mapping[str, object]]]] = ()
    """Ensembles that the attack is a member of, such as `auto-v2`; a suite that names one runs all members that can
    run. Members with other options than the defaults, or several of one attack, are given by ensemble and label:
    `{"auto-v2": {"label": {"option": 1}}}`. A changed membership is a new version of the name."""
    tuning: ClassVar[str] = "defaults of the reference"
    """How the defaults were found: on which tuning victims, with how many trials."""

    @abstractmethod
    def reconstruct(self, observation: Observation, generator: Generators) -> Reconstruction:
        """Return images for every victim of the observation; `generator` has one stream a victim."""

    def unsuited(self, module: nn.Module, setting: Setting, defense: Defense) -> str | None:
        """Say why this attack cannot run on such a client at all, or None; asked before anything runs."""
        return None

    def blind(self, setting: Setting) -> bool:
        """Whether the answer is the same under every defense: it reads neither message nor update. Of controls only."""
        return False

    def loss(
        self, observation: Observation, images: Tensor, targets: Tensor, buffers: dict[str, Tensor]
    ) -> Tensor | None:
        """Own loss [N] of given batches; the evaluator asks it for the truth's. None without a loss."""
        return None


def granted_of(attack: Attack, setting: Setting, level: str) -> Knowledge:
    """What a setting grants; controls are yardsticks and always have the public images."""
    auxiliary = setting.grants.auxiliary or attack.family == "control"
    return replace(setting.grants, defense=Level(level), auxiliary=auxiliary)


def complete(answer: object, attack: Attack, images: Tensor) -> Reconstruction:
    """Return an attack's answer as it is; what its images show is for the evaluator to judge.

    Args:
        answer: what `reconstruct` returned.
        attack: whose answer it is.
        images: what was attacked, [N, B, C, H, W].

    Raises:
        PluginError: it is no reconstruction of so many images of this shape, or its other tensors are not what they
            should be.
    """
    if not isinstance(answer, Reconstruction):
        raise answers.wrong(attack, "reconstruct", answers.kind(answer), "a Reconstruction is needed")
    victims, size = images.shape[:2]
    rows = {name: getattr(answer, name) for name in ("loss", "iterations", "gradient_evaluations")}
    needed = {"images": (answer.images, [*images.shape]), "labels": (answer.labels, [victims, size])}
    needed |= {name: (value, [victims]) for name, value in {**rows, **answer.details}.items()}
    for name, (value, shape) in needed.items():
        if value is None and name != "images":
            continue
        if not isinstance(value, Tensor) or list(value.shape) != shape:
            found = f"{answers.kind(value)} for {name}"
            raise answers.wrong(attack, "reconstruct", found, f"a tensor of shape {shape} is needed")
        if value.requires_grad:
            raise answers.wrong(attack, "reconstruct", f"{name} that require a gradient", "detach them")
    if len(answer.status) not in (0, victims):
        found = f"{len(answer.status)} states"
        raise answers.wrong(attack, "reconstruct", found, f"one for each of {victims} victims is needed, or none")
    return answer


@contextlib.contextmanager
def left_alone(attack: Attack, observation: Observation) -> Iterator[None]:
    """Refuse an attack that changes in the block what it was handed: its answer is not one to that observation.

    Raises:
        PluginError: a tensor of the message, the update or the parameters has another sum than before.
    """
    before = _sums(observation)
    yield
    after = _sums(observation)
    changed = [name for name, value in before.items() if not torch.equal(value, after[name])]
    if changed:
        place = at(place_of_hook(attack, "reconstruct"))
        raise PluginError(f"reconstruct changed {', '.join(changed[:3])} in place; work on copies{place}")


def _sums(observation: Observation) -> dict[str, Tensor]:
    groups = {
        "message": observation.message,
        "update": observation.update,
        "parameters": observation.network.parameters,
    }
    return {
        f"{group} {name!r}": tensor.detach().double().sum().nan_to_num()
        for group, items in groups.items()
        for name, tensor in items.items()
    }
