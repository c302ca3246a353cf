"""One captured update attacked without any truth: what comes out, how well it explains the update, what was assumed."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from . import registry, seeds
from .defense import Defense
from .engine import memory
from .engine.gauss_newton import LevenbergMarquardt
from .errors import GradleakError
from .knowledge import Conduct
from .plugins import said
from .reconstruction import Attack, Reconstruction, complete, left_alone, mistakes_of_victims
from .search.gradient_matching import GradientMatching
from .seeds import Generators
from .state import restored
from .threat import BatchNorm, Knowledge, Labels, Level, Observation, Setting
from .update import one_hot

AUTO = "auto"
ENSEMBLE = "auto-v2"
"""What `auto` tries: its members that can run on the observation."""
BUDGET = 300.0
"""Seconds of `auto`, unless another number is given."""
EXPLAINED = 1e-6
"""Mismatch below which nothing remains of an update that an attack could explain better."""
_POOR = 0.5
"""Mismatch from which an answer explains the update hardly better than nothing does."""
_FEW = 5
"""Iterations of a second-order search below which it is not worth a beginning."""
_SHORTEST = 20
"""Iterations that a search is given at least."""
_ORDER = ("analytic", "optimisation", "generative", "learned")

Tell = Callable[[str], None]
"""Told in a few words what is done now."""


@dataclass(frozen=True)
class Tried:
    """One attack that was run on a captured update, or why it was not."""

    method: str
    seconds: float = 0.0
    mismatch: float = math.nan
    """Mean over victims of what its answer leaves unexplained; NaN where it gave none."""
    note: str = ""
    """Why it gave no answer, or that it was cut short."""


@dataclass(kw_only=True)
class Captured(Reconstruction):
    """The answer to a captured update, with all that can be known of it without a truth."""

    methods: list[str] = field(default_factory=list)
    """The attack whose answer each victim got."""
    mismatch: Tensor | None = None
    """What the answer leaves unexplained of the update, [N]: 0 for everything, 1 for a guess of nothing. It is the
    squared distance between the observed update and the answer's, relative to the former; where the client's steps are
    unknown one minus their cosine; where the defense's law is known its negative log-likelihood."""
    agreement: Tensor | None = None
    """Mean PSNR [N] in dB between the images of different restarts: high where they came to the same images."""
    assumed: tuple[str, ...] = ()
    """What was taken for granted and cannot be checked with the update alone."""
    tried: tuple[Tried, ...] = ()
    """Every attack that was run."""

    def report(self) -> dict[str, Any]:
        """Return everything but the images as plain data."""

        def numbers(tensor: Tensor | None) -> list[float | None] | None:
            return None if tensor is None else [value if math.isfinite(value) else None for value in tensor.tolist()]

        return {
            "victims": len(self.images),
            "images": self.images.shape[1],
            "method": self.methods,
            "status": [str(state.value) for state in self.status] or ["ok"] * len(self.images),
            "mismatch": numbers(self.mismatch),
            "own_loss": numbers(self.loss),
            "agreement_db": numbers(self.agreement),
            "labels": None if self.labels is None else self.labels.tolist(),
            "assumed": list(self.assumed),
            "tried": [
                {**dataclasses.asdict(each), "mismatch": each.mismatch if math.isfinite(each.mismatch) else None}
                for each in self.tried
            ],
        }

    def lines(self) -> list[str]:
        """Say in sentences what was found."""
        found = []
        for victim, method in enumerate(self.methods):
            text = f"victim {victim}: by {method}"
            if self.mismatch is not None:
                text += f"; {float(self.mismatch[victim]):.2g} of the update is unexplained"
                if not float(self.mismatch[victim]) < _POOR:
                    text += ": these images are not what was trained on, or something that was assumed is wrong"
            if self.agreement is not None and math.isfinite(float(self.agreement[victim])):
                text += f"; restarts agree to {float(self.agreement[victim]):.1f} dB"
            found.append(text)
        return [*found, *(f"assumed: {each}" for each in self.assumed)]

    def _repr_html_(self) -> str:
        """Show the images, and below them what is known of them."""
        from html import escape

        lines = "".join(f"<li>{escape(line)}</li>" for line in self.lines())
        return f"{super()._repr_html_()}<ul>{lines}</ul>"


def attack(
    observation: Observation,
    method: str | Attack = AUTO,
    *,
    seed: int = 0,
    budget: float | None = None,
    tell: Tell | None = None,
    **options: Any,
) -> Captured:
    """Attack what was captured; nothing but the observation is looked at.

    Each victim is answered by the attack whose images, trained on as the client does, leave least of the update
    unexplained.

    Args:
        observation: from `Observation.of`.
        method: an attack, its name, or `auto` for every member of `auto-v2` that can run.
        seed: of the attack's draws; equal seeds give equal answers where no budget cuts a search short.
        budget: seconds; searches are given as many iterations as fit. By default 300 for `auto`, none for others.
        tell: told what is done now.
        options: of a named attack.

    Raises:
        GradleakError: no attack of that name, or it cannot run on this observation; the line says why.
    """
    if not isinstance(observation, Observation):
        raise GradleakError(f"observation: {type(observation).__name__}; build one by Observation.of(model, update, …)")
    if budget is not None and not budget > 0:
        raise GradleakError(f"budget: {budget} (allowed: seconds above 0)")
    tried: list[Tried] = []
    if method == AUTO:
        if options:
            raise GradleakError(f"options {', '.join(map(repr, options))} are of one attack; name it instead of auto")
        chosen = list(_members(observation, tried))
        end = time.monotonic() + (BUDGET if budget is None else budget)
    else:
        plugin: Attack = registry.build("attacks", method, options) if isinstance(method, str) else method
        name = method if isinstance(method, str) else type(method).__name__
        if (reason := _unfit(plugin, observation)) is not None:
            raise GradleakError(f"attack {name!r}: {reason}")
        chosen, end = [(name, plugin)], math.inf if budget is None else time.monotonic() + budget
    answer: Captured | None = None
    for index, (name, plugin) in enumerate(chosen):
        share = (end - time.monotonic()) / (len(chosen) - index)
        if share <= 0:
            tried.append(Tried(name, note="no time was left for it"))
            continue
        if tell is not None:
            tell(name)
        found, note = _run(name, plugin, observation, seed, share, alone=method != AUTO)
        tried.append(note)
        answer = _better(answer, found)
        if method == AUTO and answer is not None and _explained(answer):
            break
    if answer is None:
        told = "; ".join(f"{each.method}: {each.note}" for each in tried if each.note)
        raise GradleakError(f"no attack gave an answer to this update ({told or 'none can run on it'})")
    return dataclasses.replace(answer, tried=tuple(tried), assumed=tuple(_assumed(observation)))


def _members(observation: Observation, tried: list[Tried]) -> Iterator[tuple[str, Attack]]:
    """Yield the attacks of the ensemble that can run, closed forms first; note the others."""
    found, seen = [], set[str]()
    for name, label, options in registry.members(ENSEMBLE):
        plugin: Attack = registry.build("attacks", name, options)
        # Without public images the variants of an attack do the same.
        if plugin.family == "control" or (name in seen and observation.auxiliary is None):
            continue
        seen.add(name)
        reason = _unfit(plugin, observation)
        if reason is None:
            place = _ORDER.index(plugin.family) if plugin.family in _ORDER else len(_ORDER)
            found.append((place, label != "inverting-gradients", label, plugin))
        else:
            tried.append(Tried(label, note=reason))
    for *_, label, plugin in sorted(found, key=lambda each: each[:3]):
        yield label, plugin


def _unfit(plugin: Attack, observation: Observation) -> str | None:
    """Say why an attack cannot run on an observation, or None."""
    known, view = _known(observation), observation.view
    missing = plugin.needs.missing(known)
    if missing:
        return f"needs {', '.join(missing)}, which is not given"
    training = observation.training
    setting = Setting(
        batch_size=observation.batch_size,
        local_steps=training.steps,
        local_batch_size=training.batch_size,
        # Of unknown steps all that counts here is that there were some.
        local_lr=(training.lr or 1.0) if observation.weight_difference else None,
        client=_conduct(observation),
        grants=known,
    )
    try:
        return plugin.unsuited(observation.network.module, setting, Defense() if view is None else view.defense)
    except GradleakError as error:
        return str(error)


def _conduct(observation: Observation) -> Conduct:
    """The client's loss as a setting names it; what it is called makes no difference."""
    client = observation.network.client
    if client.plain:
        return Conduct()
    loss = {"loss": client.loss, "label_smoothing": client.label_smoothing, "forward": client.forward}
    return Conduct(name="sgd", options=loss)


def _known(observation: Observation) -> Knowledge:
    view = observation.view
    return Knowledge(
        labels=Labels.NONE if observation.labels is None else Labels.KNOWN,
        batch_norm=BatchNorm.RUNNING if observation.running_statistics else BatchNorm.NONE,
        defense=Level.OBLIVIOUS if view is None else Level.PUBLIC if view.complete else Level.PARAMETERS,
        generator=observation.generator is not None,
        auxiliary=observation.auxiliary is not None,
        local_training=observation.training.lr is not None or not observation.weight_difference,
    )


def _run(
    name: str, plugin: Attack, observation: Observation, seed: int, seconds: float, alone: bool
) -> tuple[Captured | None, Tried]:
    """Run one attack for so many seconds; return its answer, if it gave one, and a note of it."""
    started = time.monotonic()
    names = [seeds.derive("captured", seed, victim) for victim in range(observation.victims)]
    streams = Generators(names, observation.device, observation.dtype, seeds.derive("captured", seed))
    try:
        with restored(), left_alone(plugin, observation):
            too_long = _too_long(plugin, observation, seconds)
            if too_long is not None:
                return None, Tried(name, note=too_long)
            ready = plugin if math.isinf(seconds) else paced(plugin, observation, seconds, streams)
            timed = observation if math.isinf(seconds) else until(observation, started + seconds)
            answer = complete(ready.reconstruct(timed, streams), ready, observation)
    except Exception as error:
        if alone:
            raise
        told = "out of memory" if memory.is_out_of_memory(error) else said(error)
        return None, Tried(name, time.monotonic() - started, note=told)
    spent = time.monotonic() - started
    wrong = mistakes_of_victims(answer, observation.classes)
    unexplained = mismatch(observation, answer)
    for victim in wrong:
        unexplained[victim] = math.nan
    known = {item.name: getattr(answer, item.name) for item in fields(answer)}
    found = Captured(
        **known,
        methods=[name] * observation.victims,
        mismatch=unexplained,
        agreement=None if answer.candidates is None else agreement(answer.candidates),
    )
    note = next((f"an answer is invalid: {reason}" for reason in wrong.values()), "")
    if isinstance(ready, GradientMatching) and isinstance(plugin, GradientMatching):
        short = ready.iterations < plugin.iterations
        note = note or (f"{ready.iterations} of {plugin.iterations} iterations fitted into the budget" if short else "")
    mean = float(unexplained.mean())
    return found, Tried(name, spent, mean, note)


def _too_long(plugin: Attack, observation: Observation, seconds: float) -> str | None:
    """Say that a single iteration of a second-order search would take longer than there is time, or None."""
    if not isinstance(plugin, GradientMatching) or plugin.optimiser != "levenberg-marquardt":
        return None
    unknowns = observation.batch_size * math.prod(observation.shape)
    blank = torch.full((observation.victims, observation.batch_size, *observation.shape), 0.5)
    # What is found out about a network is found out once, and is no part of an iteration.
    mismatch(observation, Reconstruction(images=blank))
    started = time.monotonic()
    mismatch(observation, Reconstruction(images=blank))
    # It takes one more derivative, in float64, for every unknown.
    expected = 2 * (time.monotonic() - started) * LevenbergMarquardt().gradients(unknowns)
    if expected * _FEW < seconds:
        return None
    return f"an iteration would take about {expected:.0f} s, and {seconds:.0f} s are left for it"


def until(observation: Observation, deadline: float) -> Observation:
    """Return an observation whose attacks end at a time of `time.monotonic()`."""
    compute = dataclasses.replace(observation.compute, deadline=deadline)
    return dataclasses.replace(observation, compute=compute)


def paced(plugin: Attack, observation: Observation, seconds: float, streams: Generators) -> Attack:
    """Return an attack with as many iterations as fit into a time, so that its schedule comes to its end.

    The time of an iteration is measured with the attack itself; other attacks than searches are returned as they are.
    """
    if not isinstance(plugin, GradientMatching):
        return plugin
    # Two restarts tell whether a search comes to the same images from elsewhere.
    plugin = dataclasses.replace(plugin, restarts=max(2, plugin.restarts))

    def spent(iterations: int) -> float:
        brief = dataclasses.replace(plugin, iterations=iterations, patience=None)
        started = time.monotonic()
        brief.reconstruct(until(observation, started + seconds / 4), streams.child("pace"))
        return time.monotonic() - started

    begun = time.monotonic()
    once = spent(1)
    each = max((spent(4) - once) / 3, once / 100, 1e-5)
    fitting = int(0.8 * (seconds - (time.monotonic() - begun) - once) / each)
    return dataclasses.replace(plugin, iterations=max(_SHORTEST, min(plugin.iterations, fitting)))


def mismatch(observation: Observation, answer: Reconstruction) -> Tensor:
    """What an answer leaves unexplained of the update, [N] (see `Captured.mismatch`); NaN where it has no labels."""
    judge = GradientMatching(objective="cosine" if _direction_only(observation) else "relative-squared")
    try:
        labels = answer.labels if answer.labels is not None else judge.labels(observation)
        targets = one_hot(labels, observation.classes, observation.dtype)
    except (GradleakError, RuntimeError):
        return torch.full((observation.victims,), math.nan)
    images = answer.images.to(observation.device, observation.dtype)
    found = judge.loss(observation, images, targets.to(images), answer.guessed)
    return found.detach().cpu().double()


def _direction_only(observation: Observation) -> bool:
    return observation.weight_difference and observation.training.lr is None


def agreement(candidates: Tensor) -> Tensor:
    """Mean PSNR [N] in dB between restarts' images [N, R, B, C, H, W], those of two restarts matched to each other.

    Equal ones are one restart: an attack that needed no more fills up with its answer. NaN where there is but one.
    """
    found = []
    for restarts in candidates.detach().double().cpu():
        pairs = [
            _psnr(restarts[first], restarts[second])
            for first in range(len(restarts))
            for second in range(first + 1, len(restarts))
            if not torch.equal(restarts[first], restarts[second])
        ]
        found.append(sum(pairs) / len(pairs) if pairs else math.nan)
    return torch.tensor(found, dtype=torch.float64)


def _psnr(left: Tensor, right: Tensor) -> float:
    costs = torch.cdist(left.flatten(1), right.flatten(1)).square() / left[0].numel()
    rows, columns = linear_sum_assignment(costs.nan_to_num(1.0).numpy())
    errors = costs[torch.as_tensor(rows), torch.as_tensor(columns)].clamp(min=1e-10)
    return float((-10 * errors.log10()).mean())


def _better(one: Captured | None, other: Captured | None) -> Captured | None:
    """Return for each victim the answer that leaves less unexplained."""
    if one is None or other is None:
        return one or other
    assert one.mismatch is not None and other.mismatch is not None
    left, right = (torch.nan_to_num(each.mismatch, nan=math.inf) for each in (one, other))  # type: ignore[arg-type]
    takes = right < left

    def column(first: Tensor | None, second: Tensor | None) -> Tensor | None:
        if first is None and second is None:
            return None
        like = first if first is not None else second
        assert like is not None
        empty = torch.full_like(like, -1) if not like.is_floating_point() else torch.full_like(like, math.nan)
        first, second = (empty if each is None else each for each in (first, second))
        rows = takes.to(like.device).view(-1, *(1,) * (like.ndim - 1))
        return torch.where(rows, second.to(like), first.to(like))

    picked = takes.tolist()
    status = [
        (second if take else first) for take, first, second in zip(picked, _status(one), _status(other), strict=True)
    ]
    return Captured(
        images=torch.where(takes.to(one.images.device).view(-1, 1, 1, 1, 1), other.images, one.images),
        labels=column(one.labels, other.labels) if _labelled(one, other, picked) else None,
        loss=column(one.loss, other.loss),
        status=status,
        methods=[
            second if take else first for take, first, second in zip(picked, one.methods, other.methods, strict=True)
        ],
        mismatch=torch.where(takes, other.mismatch, one.mismatch),
        agreement=column(one.agreement, other.agreement),
    )


def _status(answer: Reconstruction) -> Sequence[Any]:
    from .status import Status

    return answer.status or [Status.OK] * len(answer.images)


def _labelled(one: Captured, other: Captured, picked: Sequence[bool]) -> bool:
    """Whether every victim's picked answer has labels."""
    return all((other if take else one).labels is not None for take in picked)


def _explained(answer: Captured) -> bool:
    return answer.mismatch is not None and bool((answer.mismatch < EXPLAINED).all())


def _assumed(observation: Observation) -> Iterator[str]:
    size, training = observation.batch_size, observation.training
    yield f"the update is of {size} image{'s' * (size > 1)} of shape {observation.shape}"
    yield "pixels are in [0, 1]; normalisation, if any, is a part of the model"
    if not observation.weight_difference:
        yield "it is the gradient of one step"
    elif training.lr is None:
        yield "it is a weight difference of unknown local steps, of which the direction alone is matched"
    else:
        of = f" of {training.batch_size} images" if training.batch_size else ""
        yield f"it is the weight difference of {training.steps} local steps{of} at rate {training.lr:g}"
    if observation.labels is None:
        yield "labels are not known; attacks infer them, or search for them"
    client = observation.network.client
    mean = ", the mean over its batch" if size > 1 else ""
    yield f"the client minimises {client.loss}{mean}" + (f" in {client.forward}" if client.forward != "float32" else "")
    if observation.running_statistics or any(
        isinstance(part, _BatchNorm) for part in observation.network.module.modules()
    ):
        yield f"batch normalisation ran in {'train' if observation.network.module.training else 'eval'} mode"
    if observation.view is None:
        yield "no defense changed the update"
    else:
        yield f"the client's defense is {type(observation.view.defense).__name__}"
