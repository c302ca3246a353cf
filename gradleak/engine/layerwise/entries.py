"""Some entries of a layer's parameter, and sums over groups of them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Entries:
    """K entries of a parameter, as indices into the flattened tensor, int64 [K], rising."""

    index: Tensor
    size: int
    """Entries of the whole parameter."""
    width: int
    """Entries of a row of the parameter, taken for a matrix of outputs and inputs."""

    @functools.cached_property
    def rows(self) -> Tensor:
        """Row of each entry."""
        return self.index // self.width

    @functools.cached_property
    def columns(self) -> Tensor:
        """Column of each entry."""
        return self.index % self.width

    def by_row(self, values: Tensor) -> Tensor:
        """Sum values [K, n] of each row's entries, [rows, n]."""
        return bags(values, *self._by_row)

    def by_column(self, values: Tensor) -> Tensor:
        """Sum values [K, n] of each column's entries, [columns, n]."""
        return bags(values, *self._by_column)

    @functools.cached_property
    def _by_row(self) -> tuple[Tensor, Tensor]:
        return grouped(self.rows, self.size // self.width)

    @functools.cached_property
    def _by_column(self) -> tuple[Tensor, Tensor]:
        return grouped(self.columns, self.width)


def grouped(groups: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Order of entries by their group, int64 [K], and where each of `count` groups starts in it."""
    order = groups.argsort(stable=True)
    every = torch.arange(count, device=groups.device)
    return order, torch.searchsorted(groups[order].contiguous(), every)


def bags(table: Tensor, order: Tensor, starts: Tensor, factors: Tensor | None = None) -> Tensor:
    """Sum rows of a table [K, n] in an order, cut into bags; each row has a factor."""
    return F.embedding_bag(order, table, starts, mode="sum", per_sample_weights=factors)
