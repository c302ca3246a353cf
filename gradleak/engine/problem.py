"""What an attack asks of the engine: one trial's loss, in its parts.

Every callable here sees ONE victim; the engine stacks trials.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node, tree_map

from ..update import Differentiate, LocalTraining, Network, Update, local_update
from .closed_forms import ClosedForm
from .objectives import OBJECTIVES

Variables = dict[str, Tensor]
"""What an attack searches over, each tensor [W, ...] with a row a trial."""

UNKNOWN = torch.empty(0)
"""In the place of targets that are searched for."""


@dataclass(frozen=True)
class Facts:
    """What a trial knows and does not search over: of one victim inside a `Problem`, stacked [N, ...] outside.

    A pytree, so that torch.func's transforms go through it; `facts[name]` reads any fact by its name.
    """

    targets: Tensor = UNKNOWN
    """Class probabilities that the client trains on, [B, classes]; `UNKNOWN` where labels are searched for."""
    message: Update = field(default_factory=dict)
    """What the client sent."""
    update: Update = field(default_factory=dict)
    """What an honest server decodes: a gradient or, where local steps are unrolled, a weight difference."""
    own: dict[str, Tensor] = field(default_factory=dict)
    """Further facts of an attack or a backend that are one tensor each."""
    named: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Those that are tensors by name."""

    @property
    def knows_labels(self) -> bool:
        """Whether there are targets."""
        return self.targets is not UNKNOWN

    def __getitem__(self, name: str) -> Any:
        for group in (self.own, self.named, vars(self)):
            if name in group:
                return group[name]
        raise KeyError(name)

    def plus(self, own: dict[str, Tensor] | None = None, named: dict[str, dict[str, Tensor]] | None = None) -> Facts:
        """Return these facts and more."""
        return replace(self, own={**self.own, **(own or {})}, named={**self.named, **(named or {})})


def _children(facts: Facts) -> tuple[list[object], bool]:
    rest = [facts.message, facts.update, facts.own, facts.named]
    return ([facts.targets, *rest] if facts.knows_labels else rest), facts.knows_labels


def _rebuilt(children: Any, knows_labels: Any) -> Facts:
    return Facts(*children) if knows_labels else Facts(UNKNOWN, *children)


register_pytree_node(Facts, _children, _rebuilt, serialized_type_name="gradleak.engine.problem.Facts")


@dataclass(frozen=True)
class Guess:
    """One victim as an attack imagines it: images [B, C, H, W] in [0, 1], class probabilities [B, classes]."""

    images: Tensor
    targets: Tensor
    buffers: dict[str, Tensor] = field(default_factory=dict)
    """Replaced buffers with a row an image, such as guessed dropout masks, [B, ...]."""
    parameters: Update | None = None
    """Where the gradient is taken, if not at the model's own parameters."""
    before: Tensor | None = None
    """Images that a prior is about, where `images` were made of them by an encoding."""


@dataclass(frozen=True)
class Direct:
    """A `match` that compares the update itself with an observed one; a backend may know a closed form of it."""

    objective: str
    """Name in `gradleak.engine.objectives`."""
    observed: Literal["update", "message"] = "update"
    """The fact it is compared with."""

    def __call__(self, update: Update, facts: Facts) -> Tensor:
        """How far the update is from the observed one, a scalar."""
        return OBJECTIVES[self.objective](update, self.of(facts))

    def of(self, facts: Facts) -> Update:
        """What is observed."""
        return facts.message if self.observed == "message" else facts.update


@dataclass(frozen=True)
class Described:
    """A `match` that a backend may compute by the form that a defense gives of it."""

    whole: Callable[[Update, Facts], Tensor]
    """The loss of an update."""
    sent: Callable[[Update, Update], Tensor]
    """The loss of a simulated message and the one that was sent."""
    form: ClosedForm
    batch: int
    """Images of a victim."""
    objective: str | None = None
    """Name of `sent` in `gradleak.engine.objectives`, if it is one."""

    def __call__(self, update: Update, facts: Facts) -> Tensor:
        """How far the update's message is from the one that was sent, a scalar."""
        return self.whole(update, facts)


@dataclass(frozen=True)
class PlainDecode:
    """A `decode` that is also known for stacked trials at once."""

    one: Callable[[Variables, Facts], Guess]
    rows: Callable[[Variables, Facts], Guess]

    def __call__(self, variables: Variables, facts: Facts) -> Guess:
        """Guess of one trial."""
        return self.one(variables, facts)


@dataclass(frozen=True)
class PlainPenalty:
    """A `penalty` of images alone that is also known for stacked trials at once."""

    one: Callable[[Guess, Variables, Facts], Tensor]
    rows: Callable[[Tensor, Facts], tuple[Tensor, Tensor]]
    """Penalty [W] of images [W, B, C, H, W], and its gradient by them."""

    def __call__(self, guess: Guess, variables: Variables, facts: Facts) -> Tensor:
        """Penalty of one trial, a scalar."""
        return self.one(guess, variables, facts)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One trial's loss in its parts; every callable sees one victim.

    Raises nothing itself: a loss that is not finite ends its trial as diverged.
    """

    network: Network
    training: LocalTraining
    decode: Callable[[Variables, Facts], Guess]
    """Variables to images and whatever else is guessed."""
    match: Callable[[Update, Facts], Tensor]
    """How far a simulated update is from what was observed, a scalar."""
    penalty: Callable[[Guess, Variables, Facts], Tensor]
    """Prior, a scalar."""
    per_example: Callable[[Update], Update] | None = None
    """Changes one example's gradient before the mean; a `Described` match whose form clips knows of it."""
    residual: Callable[[Update, Facts], Tensor] | None = None
    """Vector [m] whose squared norm is `match`; second-order optimisers need it."""
    prior_residual: Callable[[Guess, Variables, Facts], Tensor] | None = None
    """Vector whose squared norm is (part of) `penalty`."""

    def simulate(self, guess: Guess, differentiate: Differentiate) -> Update:
        """Return the update a client with the guessed batch would compute."""
        return local_update(
            self.network,
            guess.images,
            guess.targets,
            self.training,
            per_example=self.per_example,
            buffers=guess.buffers,
            parameters=guess.parameters,
            differentiate=differentiate,
        )

    def loss(self, variables: Variables, facts: Facts, differentiate: Differentiate) -> tuple[Tensor, Tensor]:
        """Matching loss plus penalty, and the matching loss alone."""
        guess = self.decode(variables, facts)
        matching = self.match(self.simulate(guess, differentiate), facts)
        return matching + self.penalty(guess, variables, facts), matching


@dataclass(frozen=True)
class Values:
    """What a backend answers for W trials: total and matching loss [W], gradients of the total [W, ...]."""

    total: Tensor
    matching: Tensor
    gradients: Variables


class Backend(ABC):
    """A way to compute the losses and gradients of stacked trials; made anew for every problem."""

    def refusal(self, problem: Problem, variables: Variables, facts: Facts) -> str | None:
        """Say why it cannot compute the problem for chunks like this one, or None; asked before anything else.

        Raises nothing but what says that memory is short.
        """
        return None

    def applies(self, problem: Problem, variables: Variables, facts: Facts) -> bool:
        """Whether it can compute the problem for chunks like this one."""
        return self.refusal(problem, variables, facts) is None

    def prepare(self, problem: Problem, facts: Facts) -> Facts:
        """Facts of all N victims as this backend likes them; some may be replaced by what only it understands."""
        return facts

    @abstractmethod
    def __call__(self, problem: Problem, variables: Variables, facts: Facts) -> Values:
        """Losses and gradients of W stacked trials."""


def take(facts: Facts, index: Tensor | int | slice) -> Facts:
    """Select rows of stacked facts."""
    rows: Facts = tree_map(lambda tensor: tensor[index], facts)
    return rows
