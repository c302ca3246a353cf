"""The contract of attacks: an observation in, a reconstruction out."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from .defense import Defense
from .knowledge import Power
from .options import Options
from .plugins import PluginError, at, place_of_hook
from .seeds import Generators
from .status import Status
from .threat import Knowledge, Level, Observation, Setting

ROUNDING = 1e-6
"""How far beyond [0, 1] a pixel may lie: what clamping before the last product in float32 leaves."""


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

    def _repr_html_(self) -> str:
        """Show the images of every victim, as notebooks do."""
        from .pictures import row

        lines = []
        for victim, images in enumerate(self.images.detach().float().cpu().numpy()):
            parts = [f"victim {victim}", self.status[victim] if self.status else Status.OK.value]
            if self.loss is not None:
                parts.append(f"own loss {float(self.loss[victim]):.3g}")
            named = [] if self.labels is None else [f"label {label}" for label in self.labels[victim].tolist()]
            lines.append(f"<p>{', '.join(parts)}</p>{row(images, named)}")
        return "".join(lines)


@dataclass(frozen=True, kw_only=True)
class Attack(Options, ABC):
    """A gradient inversion attack; a plugin implements `reconstruct`."""

    family: ClassVar[str]
    """optimisation, analytic, generative, learned, or control."""
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

    @property
    def threat_model(self) -> str:
        """What the attack asks of the server, as it follows from `needs`."""
        return threat_model(self.needs.server)

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


def threat_model(power: Power) -> str:
    """Return in words what a server of some power does."""
    return "honest server" if power is Power.HONEST else f"malicious server ({power.value})"


def granted_of(attack: Attack, setting: Setting, level: Level) -> Knowledge:
    """What a setting grants; controls are yardsticks and always have the public images.

    The attacker is the server, so it may do what the setting's server does.
    """
    auxiliary = setting.grants.auxiliary or attack.family == "control"
    return replace(setting.grants, defense=level, auxiliary=auxiliary, server=setting.server.surface)


def mistakes(answer: object, observation: Observation) -> Iterator[str]:
    """Yield what is wrong with an answer as a whole, in types and shapes; a later mistake may follow from the first."""
    if not isinstance(answer, Reconstruction):
        yield f"{type(answer).__name__} (allowed: Reconstruction)"
        return
    batch = (observation.victims, observation.batch_size)
    yield from _misfit("images", answer.images, (*batch, *observation.shape), floating=True)
    if answer.labels is not None:
        yield from _misfit("labels", answer.labels, batch, floating=False)
    for name in ("loss", "iterations", "gradient_evaluations"):
        if getattr(answer, name) is not None:
            yield from _misfit(name, getattr(answer, name), batch[:1])
    for name, column in answer.details.items():
        yield from _misfit(f"details[{name!r}]", column, batch[:1])
    if answer.candidates is not None:
        yield from _misfit(
            "candidates", answer.candidates, (batch[0], None, batch[1], *observation.shape), floating=True
        )
    if answer.trace is not None:
        yield from _misfit("trace", answer.trace, (batch[0], None))
    for name, guess in answer.guessed.items():
        if not isinstance(guess, Tensor) or guess.shape[:1] != batch[:1]:
            yield f"guessed[{name!r}] has no row for each of {batch[0]} victims"
    known = [state.value for state in Status]
    if len(answer.status) not in (0, batch[0]) or any(state not in known for state in answer.status):
        yield f"status {answer.status} (allowed: none, or one a victim of {', '.join(known)})"


def _misfit(name: str, tensor: object, shape: tuple[int | None, ...], floating: bool | None = None) -> Iterator[str]:
    """Say so if a tensor has another shape (None: any size), or another kind of numbers."""
    if not isinstance(tensor, Tensor):
        yield f"{name} are {type(tensor).__name__} (allowed: a tensor)"
        return
    if tensor.ndim != len(shape) or any(size not in (None, own) for own, size in zip(tensor.shape, shape, strict=True)):
        allowed = ", ".join("any" if size is None else str(size) for size in shape)
        yield f"{name} of shape {list(tensor.shape)} (allowed: [{allowed}])"
    whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool)
    if floating is not None and (not tensor.is_floating_point() if floating else not whole):
        allowed = "float32 or float64" if floating else "int64"
        yield f"{name} of {str(tensor.dtype).removeprefix('torch.')} (allowed: {allowed})"


def mistakes_of_victims(answer: Reconstruction, classes: int) -> dict[int, str]:
    """Return what is wrong with single victims' images and labels, by victim."""
    found: dict[int, str] = {}
    for victim, images in enumerate(answer.images):
        if not images.isfinite().all():
            found[victim] = "images are not finite"
        elif images.min() < -ROUNDING or images.max() > 1 + ROUNDING:
            found[victim] = f"images lie in [{float(images.min()):.4g}, {float(images.max()):.4g}] (allowed: [0, 1])"
        elif answer.labels is not None:
            labels = answer.labels[victim]
            if labels.min() < 0 or labels.max() >= classes:
                found[victim] = f"labels {labels.tolist()} (allowed: 0 to {classes - 1})"
    return found


def complete(answer: object, attack: Attack, observation: Observation) -> Reconstruction:
    """Return an attack's answer as it is; what its images show is for the evaluator to judge.

    Args:
        answer: what `reconstruct` returned.
        attack: whose answer it is.
        observation: what it is an answer to.

    Raises:
        PluginError: it is no reconstruction of this observation's shapes and types, or still has a graph.
    """
    place = at(place_of_hook(attack, "reconstruct"))
    for mistake in mistakes(answer, observation):
        raise PluginError(f"reconstruct returned {mistake}{place}")
    assert isinstance(answer, Reconstruction)
    tensors = {**{item.name: getattr(answer, item.name) for item in fields(answer)}, **answer.details}
    for name, value in tensors.items():
        if isinstance(value, Tensor) and value.requires_grad:
            raise PluginError(f"reconstruct returned {name} that require a gradient; detach them{place}")
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
