"""Differential privacy of Gaussian noise: epsilon of what is seen, and the noise that a wanted epsilon takes."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from .errors import GradleakError

Accountant = Literal["rdp", "prv"]

RELATION = "one example added or removed"
"""What two neighbouring inputs differ in: Opacus' accountants, and amplification by sampling, are of this relation.

Its batch is divided by a public B, so that adding an example moves the mean of clipped gradients by clip / B at most.
"""

_DIGITS = 1e-4
"""Noise is rounded up to this multiple, so that machines agree on it."""
_CLOSE = 1e-3
"""How far, relatively, the epsilon of the noise that was found may stay below the wanted one."""


@dataclass(frozen=True)
class Guarantee:
    """A differential privacy guarantee: (epsilon, delta), for what it holds, and who computed it."""

    epsilon: float
    delta: float
    accountant: str
    unit: str
    """What two neighbouring inputs differ in and what is seen, e.g. "one example added or removed, one message"."""
    noise: float | None = None
    """Standard deviation of the noise on what is seen, over the most that one example changes of it."""


@dataclass(frozen=True)
class Exposure:
    """How often one example enters what is seen.

    >>> Exposure(messages=10).sampling_rate
    1.0
    """

    messages: int = 1
    """Messages, or rounds where an example takes part in a share of them."""
    sampling_rate: float = 1.0
    """Probability that an example takes part in a round (Poisson sampling)."""
    clients: int = 1
    """Clients in each sum that is seen; 1 where the messages themselves are."""


@dataclass(frozen=True)
class GaussianMechanism:
    """Gaussian noise on a message whose change by one example is bounded (Dwork and Roth 2014, section A)."""

    multiplier: float
    """Standard deviation of the noise over that bound, in Euclidean norm."""
    delta: float
    accountant: Accountant = "rdp"
    """rdp: Mironov, arXiv:1702.07476; prv: Gopi, Lee, Wutschitz, arXiv:2106.02848; both of Opacus."""
    clients: int = 1
    """Clients whose messages are seen as one sum."""

    def summed(self, clients: int) -> GaussianMechanism:
        """Return the mechanism where only the sum of so many clients' messages is seen, whose noises add up."""
        if clients == 1:
            return self
        return replace(self, multiplier=math.sqrt(clients) * self.multiplier, clients=clients)

    def guarantee(self, exposure: Exposure) -> Guarantee:
        """Return what holds for one example that is exposed so often."""
        count, rate = exposure.messages, exposure.sampling_rate
        seen = "message" if self.clients == 1 else f"sum of {self.clients} clients' messages"
        if rate < 1:
            unit = f"{count} rounds at sampling rate {rate:g}" + (f", {seen}s" if self.clients > 1 else "")
        else:
            unit = f"one {seen}" if count == 1 else f"{count} {seen.replace('sum', 'sums')}" + "s" * (self.clients == 1)
        epsilon = _epsilon(self.multiplier, rate, count, self.delta, self.accountant)
        return Guarantee(
            epsilon, self.delta, f"Opacus {self.accountant.upper()}", f"{RELATION}, {unit}", self.multiplier
        )


def noise_for(epsilon: float, delta: float, exposure: Exposure, accountant: Accountant = "rdp") -> float:
    """Return the noise multiplier of each client with which so often exposed an example has (epsilon, delta).

    Found by Opacus' bisection and rounded up, so that epsilon is at most what was asked for.

    Raises:
        GradleakError: no noise is enough.
    """
    from opacus.accountants.utils import get_noise_multiplier

    try:
        with _quiet():
            found = get_noise_multiplier(
                target_epsilon=epsilon,
                target_delta=delta,
                sample_rate=exposure.sampling_rate,
                steps=exposure.messages,
                accountant=accountant,
                epsilon_tolerance=_CLOSE * epsilon,
            )
    except ValueError as error:
        raise GradleakError(f"epsilon = {epsilon:g}: no noise is enough at delta = {delta:g}") from error
    own = found / math.sqrt(exposure.clients)
    return float(round(math.ceil(own / _DIGITS) * _DIGITS, 4))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Say nothing of what Opacus warns of and gets right."""
    with warnings.catch_warnings():
        # Its orders are few for very little noise, where epsilon is astronomic anyway.
        warnings.simplefilter("ignore", UserWarning)
        # Its accountant PRV takes the logarithm of 1 - q for q = 1.
        warnings.filterwarnings("ignore", "divide by zero", RuntimeWarning)
        yield


@functools.lru_cache(maxsize=1024)
def _epsilon(multiplier: float, rate: float, steps: int, delta: float, accountant: Accountant) -> float:
    from opacus.accountants import PRVAccountant, RDPAccountant

    found = RDPAccountant() if accountant == "rdp" else PRVAccountant()
    found.history = [(multiplier, rate, steps)]
    with _quiet():
        return float(found.get_epsilon(delta=delta))
