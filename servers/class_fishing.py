"""Class fishing: a head under which only one class's images have a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from gradleak.dataset import Images
from gradleak.defense import Defense
from gradleak.knowledge import Power, Setting
from gradleak.mechanisms import fishing
from gradleak.mechanisms.fishing import Line, note, noted
from gradleak.server import Query, Server
from gradleak.threat import Observation
from gradleak.update import Update


@dataclass(frozen=True, kw_only=True)
class ClassFishing(Server):
    """Sets the head's rows to zero but for a target class's, and the biases of all others high: p_target is 0.

    Below the head only images of the target class have a gradient. The first query's bias gradients also tell how many
    images each class has, so that the second asks for the rarest that is there; one image alone comes out as a batch
    of one, several as a batch of so many. References: Wen, Geiping, Fowl, Goldblum, Goldstein, ICML 2022,
    arXiv:2202.00580.
    """

    surface = Power.PARAMETERS
    reference = "arXiv:2202.00580"

    target: Annotated[int, Ge(0)] = 0
    """Class of the first query."""
    factor: Annotated[float, Gt(0)] = 0.5
    """Of the target's row."""
    bias: Annotated[float, Gt(0)] = 1000.0
    """Of the other classes."""

    @property
    def queries(self) -> int:
        """One to count, one for the rarest class."""
        return 2

    def tamper(
        self, module: nn.Module, auxiliary: Images | None, generator: torch.Generator, client: int = 0
    ) -> nn.Module:
        """Return the model that asks for the first target."""
        line = Line.of(module, "server 'class-fishing'")
        row = line.rows(module.get_parameter(line.weight))[self.target].detach()
        # Kept for the other classes' turn: what the head was.
        changed = line.with_row(module, self.target, self.factor * row, 0.0, self.bias)
        return note(changed, _Asked(self.target, line.rows(module.get_parameter(line.weight)).detach().clone()))

    def next_query(self, queries: Sequence[Query], auxiliary: Images | None) -> nn.Module | None:
        """Return the model that asks for the rarest class, unless the first target is as rare."""
        if len(queries) > 1:
            return None
        first = queries[0]
        line = Line.of(first.module, "server 'class-fishing'")
        asked = _asked(first.module)
        counts = _counts(first, line, asked.label)
        there = torch.where(counts >= 1, counts, torch.inf)
        rarest = int(there.argmin())
        if not there.isfinite().any() or counts[asked.label] == counts[rarest]:
            return None
        changed = line.with_row(first.module, rarest, self.factor * asked.rows[rarest], 0.0, self.bias)
        return note(changed, _Asked(rarest, asked.rows))

    def isolate(self, observation: Observation, queries: Sequence[Query]) -> Observation | None:
        """Return what the images of the last target sent; None if it has none."""
        first, last = queries[0], queries[-1]
        line = Line.of(first.module, "server 'class-fishing'")
        label = _asked(last.module).label
        count = int(_counts(first, line, _asked(first.module).label)[label])
        if count < 1 or count > observation.batch_size:
            return None
        alone: Update = line.isolated(last.update, label, last.images, count)
        return fishing.as_if_alone(observation, last.module, alone, label, count)

    def unsuited(self, module: nn.Module, setting: Setting, defense: Defense) -> str | None:
        """It needs one gradient, and a linear head."""
        return fishing.unsuited(module, setting, defense)


@dataclass(frozen=True)
class _Asked:
    """What a model asks: for which class, and the rows [K, F] of the head before."""

    label: int
    rows: Tensor


def _asked(module: nn.Module) -> _Asked:
    found = noted(module)
    assert isinstance(found, _Asked)
    return found


def _counts(query: Query, line: Line, label: int) -> Tensor:
    """Images of every class [K], rounded: the target's bias gradient is -m / n, another's 1 / (K - 1) - m / n."""
    slope = query.update[line.bias].double()
    silent = torch.full_like(slope, 1.0 / (len(slope) - 1))
    silent[label] = 0.0
    counts: Tensor = ((silent - slope) * query.images).round()
    return counts
