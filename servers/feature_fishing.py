"""Feature fishing: a head that asks, query by query, for the image whose feature is the largest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt
from scipy import stats
from torch import Tensor, nn

from gradleak.dataset import Images
from gradleak.defense import Defense
from gradleak.knowledge import Knowledge, Power, Setting
from gradleak.mechanisms import fishing
from gradleak.mechanisms.fishing import Line, note, noted
from gradleak.server import Query, Server
from gradleak.threat import Observation

_NEVER = 1e3  # standard deviations that no feature reaches
_WHOLE = 1e-3  # how far from a whole number a count may be
_BESIDE = 12.0  # logits that put an image clearly on one side


@dataclass(frozen=True, kw_only=True)
class FeatureFishing(Server):
    """Sets row c of the head to a steep reading of a feature h and its bias to a threshold; every other row to zero.

    Above the threshold p_c is 1, below 0. So an image's gradient below the head differs, whatever its label, between a
    threshold that no image reaches (the first query) and one that it does: the difference of two queries holds the
    images between, and the bias's tells how many. The second threshold is the 1 - 1/n quantile of h (a normal law of
    public images); further ones are the mean h of the images above (or, where none was, lower quantiles), which about
    halves them, until one is left. The feature is the one most normal on public images (Kolmogorov and Smirnov), or a
    random direction. References: Wen, Geiping, Fowl, Goldblum, Goldstein, ICML 2022, arXiv:2202.00580. Deviation: the
    difference to a first query takes the place of a batch of one label.
    """

    surface = Power.PARAMETERS
    needs = Knowledge(auxiliary=True)
    reference = "arXiv:2202.00580"

    direction: Literal["feature", "random"] = "feature"
    steepness: Annotated[float, Gt(0)] = 1e6
    """Logits per standard deviation of h."""
    label: Annotated[int, Ge(0)] = 0
    """c."""
    spare: Annotated[int, Ge(0)] = 3
    """Queries beyond the base-2 logarithm of the number of images, at most."""

    @property
    def queries(self) -> int:
        """At most, for 64 images."""
        return self.limit(64)

    def limit(self, images: int) -> int:
        """Queries at most, for so many images."""
        return math.ceil(math.log2(max(images, 2))) + self.spare

    def tamper(
        self, module: nn.Module, auxiliary: Images | None, generator: torch.Generator, client: int = 0
    ) -> nn.Module:
        """Return the model whose threshold no image reaches."""
        assert auxiliary is not None
        line = Line.of(module, "server 'feature-fishing'")
        features = line.features(module, auxiliary.images).cpu()
        row = self._row(features, generator)
        mean, deviation = float((features @ row).mean()), float((features @ row).std().clamp(min=1e-12))
        return self._at(module, _Search(line, row, mean, deviation, mean + _NEVER * deviation))

    def _row(self, features: Tensor, generator: torch.Generator) -> Tensor:
        """Return what is read of features [M, F], of unit norm: [F]."""
        if self.direction == "random":
            row = torch.randn(features.shape[1], generator=generator, dtype=torch.float64)
            unit: Tensor = row / row.norm()
            return unit
        scaled = (features - features.mean(0)) / features.std(0).clamp(min=1e-12)
        fits = [stats.kstest(column.numpy(), "norm").statistic for column in scaled.mT]
        varies = features.std(0) > 1e-9
        return nn.functional.one_hot((torch.tensor(fits) + 1e3 * ~varies).argmin(), features.shape[1]).double()

    def _at(self, module: nn.Module, search: _Search) -> nn.Module:
        """Return the model with a threshold."""
        slope = self.steepness / search.deviation
        changed = search.line.with_row(module, self.label, slope * search.row, -slope * search.threshold, 0.0)
        return note(changed, search)

    def next_query(self, queries: Sequence[Query], auxiliary: Images | None) -> nn.Module | None:
        """Return the model with the next threshold; None once one image is left above, or too many were asked."""
        last, images = queries[-1], queries[-1].images
        search = _asked(last.module)
        if len(queries) == 1:
            threshold = search.quantile(1 - 1 / images)
        elif len(queries) >= self.limit(images):
            return None
        else:
            count, mean = self._above(queries[0], last)
            if abs(count - 1) < _WHOLE:
                return None
            threshold = self._threshold(search, queries, count, mean)
        found = _Search(search.line, search.row, search.mean, search.deviation, threshold)
        return self._at(last.module, found)

    def _threshold(self, search: _Search, queries: Sequence[Query], count: float, mean: float) -> float:
        """Return where to ask next, of how many were above the last threshold and their mean."""
        beside = _BESIDE * search.deviation / self.steepness
        tried = [(_asked(query.module).threshold, self._above(queries[0], query)[0]) for query in queries[1:]]
        crowded = [threshold for threshold, above in tried if above > 1 + _WHOLE and threshold < search.threshold]
        if count > 1 + _WHOLE:
            return max(mean, search.threshold + beside)
        if crowded:
            # Between the highest threshold that several were above and one that is not wholly below any.
            return (max(crowded) + search.threshold) / 2
        if count > _WHOLE:
            return search.threshold - beside
        return search.quantile(max(0.02, 1 - 4.0 ** sum(above < 1 for _, above in tried) / queries[-1].images))

    def _above(self, first: Query, query: Query) -> tuple[float, float]:
        """How many images were above a query's threshold, and the mean of their h."""
        search = _asked(query.module)
        line = search.line
        moved = fishing.difference([query.update, first.update])
        share = float(moved[line.bias][self.label])
        total = float(line.rows(moved[line.weight])[self.label].double().cpu() @ search.row)
        return share * query.images, total / share if share else math.nan

    def isolate(self, observation: Observation, queries: Sequence[Query]) -> Observation | None:
        """Return what the image sent that was alone above the last threshold; None if none was."""
        if len(queries) < 2 or abs(self._above(queries[0], queries[-1])[0] - 1) > 0.5:
            return None
        first, last = queries[0], queries[-1]
        line = _asked(first.module).line
        # Of the first query's model p_c is 0, where this image had 1 more.
        moved = fishing.difference([first.update, last.update])
        alone = line.isolated(moved, self.label, last.images, 1)
        return fishing.as_if_alone(observation, first.module, alone, self.label, 1)

    def unsuited(self, module: nn.Module, setting: Setting, defense: Defense) -> str | None:
        """It needs one gradient, and a linear head."""
        return fishing.unsuited(module, setting, defense)


@dataclass(frozen=True)
class _Search:
    """What a model asks: which reading, its normal law, and from where on an image counts."""

    line: Line
    row: Tensor
    mean: float
    deviation: float
    threshold: float

    def quantile(self, share: float) -> float:
        return self.mean + self.deviation * float(stats.norm.ppf(share))


def _asked(module: nn.Module) -> _Search:
    found = noted(module)
    assert isinstance(found, _Search)
    return found
