"""What a defense may tell of its matching loss, so that a backend computes it without a dense gradient a victim.

A form says the same as the hooks `per_example`, `simulate` and `nll`, in parts that are known to backends; these stay
the definition, and every form is compared with them on the problem at hand before it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Sums(NamedTuple):
    """A linear map that adds every entry, with a sign, to one of s numbers."""

    groups: Tensor
    """Which number each entry goes into, int64 [d]."""
    negative: Tensor
    """Whether with a minus, bool [d]."""
    size: int
    """s."""


@dataclass(frozen=True, kw_only=True)
class Picked:
    """The map of flattened updates [d] to some of their entries, a message of one tensor, [s]."""

    key: str
    """The message's name for it."""
    entries: Tensor
    """Which, int64 [s], rising."""


@dataclass(frozen=True, kw_only=True)
class LinearMap:
    """A linear map R of flattened updates [d] to a message of one tensor, [s]."""

    key: str
    """The message's name for it."""
    forward: Callable[[Tensor], Tensor]
    """R on rows, [W, d] to [W, s]."""
    adjoint: Callable[[Tensor], Tensor]
    """R^T on rows, [W, s] to [W, d]."""
    sums: Sums | None = None
    """R as sums, if it is no more than that."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """The message is R (mean of the examples' gradients), each clipped to a norm, and compared as a whole."""

    linear: LinearMap | Picked | None = None
    """R; None: the message is the update itself."""
    clip: float | None = None
    """Largest norm of R times one example's gradient."""
    objective: str | None = None
    """Name in `gradleak.engine.objectives`; None: the attack's own distance."""
    noise: float = 0.0
    """Standard deviation of an entry's noise over `clip`, where the message has such."""


@dataclass(frozen=True, kw_only=True)
class Largest:
    """The message is an update with only its largest entries, zeros elsewhere.

    The loss is the cosine on the entries that were sent, plus the sum of squares by which others exceed the smallest
    of these, over the message's squared norm.
    """

    ratio: float
    """Share of the entries that is sent."""
    by_tensor: bool
    """Whether entries compete within their tensor."""


ClosedForm = Compared | Largest
