"""Control: inverting gradients on another victim's message."""

from __future__ import annotations

from dataclasses import dataclass

from gradleak.attacks.inverting_gradients import InvertingGradients


@dataclass(frozen=True, kw_only=True)
class WrongGradient(InvertingGradients):
    """Runs inverting gradients on the next victim's observation: what the attack's prior alone is worth."""

    family = "control"
    reference = "gradleak"
    observes_other_victim = True
