"""What is known of a cell beside its configuration and its rows: who met whom, what messages cost and guarantee."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal, Self

from ..privacy import Guarantee

NOTHING: Final = "nothing"
"""In place of a guarantee: none holds. Where it is not known whether one does, as of a cell that failed, it is None."""

_GUARANTEES = ("epsilon", "training_epsilon")
Guaranteed = Guarantee | Literal["nothing"] | None


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Facts that are stored together."""

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Self:
        """Read the stored form; what is not known here is left out."""
        return cls(**{item.name: facts[item.name] for item in fields(cls) if item.name in facts})


@dataclass(frozen=True, kw_only=True)
class Inspected(_Part):
    """How clients fared who looked at the model."""

    refused: float = math.nan
    """Share of victims whose clients sent nothing."""
    false_alarms: float = math.nan
    """Share of honest rounds that they would have refused."""
    honest_rounds: int = 0
    """Rounds that this share is of."""
    thresholds: list[float] | None = None
    """Suspicion above which a model is refused."""


@dataclass(frozen=True, kw_only=True)
class Served(_Part):
    """What a server did that changes the model."""

    queries: float | None = None
    """How often it asked a client, the mean over rounds."""
    most_queries: int | None = None
    expected: float | None = None
    """Images a victim that it expects to read."""
    added_parameters: int | None = None
    """Beyond those of the agreed model."""
    added_bytes: int | None = None
    """Of a dense float32 message, beyond that of the agreed model."""
    accuracy: float | None = None
    """Share of test images that the changed model tells right."""
    counts: str | None = None
    """Which reconstructions count as read: the `exact` ones, or those `alike`."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What is known of a cell; None, or nothing stored, where it is not known."""

    attack_family: str | None = None
    """`control` for a floor, `utility` for a training."""
    adaptive: bool | None = None
    """Whether the attack uses what it knows of the defense."""
    threat_model: str | None = None
    defense_family: str | None = None
    """`none` for no defense."""
    stochastic: bool | None = None
    """Whether messages of one update differ."""
    test_accuracy: float | None = None
    """Of training under the defense."""
    validation_accuracy: Mapping[str, float] | None = None
    """On images held out, by rate of the server."""
    lr: float | None = None
    """The server's rate that was the best of them."""
    bytes: float | None = None
    """Mean size of a packed message."""
    dense_bytes: int | None = None
    """Size of the plain update in float32."""
    epsilon: Guaranteed = None
    """Of all that an attacker saw of an example."""
    client_seconds: float | None = None
    model_accuracy: float | None = None
    """Of the agreed model."""
    participations: int | None = None
    """Messages of a training run that an example may take part in."""
    training_epsilon: Guaranteed = None
    """Of all messages of a training run."""
    backend: str | None = None
    """Which engine ran the attack."""
    backend_reason: str | None = None
    inspection: Inspected | None = None
    server: Served | None = None
    width: int | None = None
    """Trials that memory held side by side, where these were fewer than asked for."""

    def stored(self) -> dict[str, Any]:
        """Return the stored form, plain data without what is not known."""
        known = {name: value for name, value in asdict(self).items() if value is not None}
        return known | {name: None for name in _GUARANTEES if known.get(name) == NOTHING}

    @classmethod
    def of(cls, facts: Mapping[str, Any] | None) -> Self:
        """Read the stored form; what later or older versions say besides is left out."""
        known = cls.__dataclass_fields__
        own = {name: value for name, value in facts.items() if name in known} if facts else {}
        own |= {name: _guarantee(own[name]) for name in _GUARANTEES if name in own}
        own["inspection"] = Inspected.of(own["inspection"]) if own.get("inspection") else None
        own["server"] = Served.of(own["server"]) if own.get("server") else None
        return cls(**own)


def guaranteed(guarantee: Guarantee | None) -> Guaranteed:
    """Return a guarantee, or that none holds."""
    return NOTHING if guarantee is None else guarantee


def _guarantee(facts: Mapping[str, Any] | None) -> Guaranteed:
    if not facts:
        return NOTHING
    epsilon, delta = facts.get("epsilon"), facts.get("delta")
    return Guarantee(
        # JSON has no infinity: an epsilon that is not stored bounds nothing.
        epsilon=math.inf if epsilon is None else epsilon,
        delta=math.nan if delta is None else delta,
        accountant=facts.get("accountant") or "",
        unit=facts.get("unit") or "",
        noise=facts.get("noise"),
    )
