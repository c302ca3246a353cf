"""Random linear sketches R: R^d -> R^s with E[R^T R] = I that never form R, and their adjoints.

Every operator acts on the last dimension, is its own double derivative (it is linear) and stacks under vmap;
derivatives keep the seed or the hashes only, so memory stays O(d). All draws are public and travel as tensors.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ..engine.closed_forms import LinearMap, Sums
from ..update import Update

Draws = dict[str, Tensor]
"""The random tensors that fix one operator."""

_BLOCK = 2**22
"""Entries of a dense matrix that exist at one time."""


@dataclass(frozen=True)
class Operator(ABC):
    """One drawn sketch of R^dimension into R^size."""

    dimension: int
    size: int
    draws: Mapping[str, Tensor]
    """From `draw`, for the same dimension and size."""

    @staticmethod
    @abstractmethod
    def draw(dimension: int, size: int, generator: torch.Generator) -> Draws:
        """Draw an operator's random tensors, on the CPU."""

    def sketch(self, vector: Tensor) -> Tensor:
        """R v: [..., d] to [..., s]."""
        return cast(Tensor, _Linear.apply(vector, self._forward, self._adjoint))

    def desketch(self, sketched: Tensor) -> Tensor:
        """R^T y: [..., s] to [..., d]; the unbiased estimate of the vector."""
        return cast(Tensor, _Linear.apply(sketched, self._adjoint, self._forward))

    def described(self, key: str) -> LinearMap:
        """As a backend knows linear maps, to a message of that name."""
        return LinearMap(key=key, forward=self._forward, adjoint=self._adjoint, sums=self._sums())

    def _sums(self) -> Sums | None:
        """R as sums of entries, if it is no more than that."""
        return None

    @abstractmethod
    def _forward(self, rows: Tensor) -> Tensor:
        """R on plain rows [n, d]."""

    @abstractmethod
    def _adjoint(self, rows: Tensor) -> Tensor:
        """R^T on plain rows [n, s]."""


@dataclass(frozen=True)
class CountSketch(Operator):
    """Adds every entry, with a random sign, to one of s buckets (Charikar, Chen, Farach-Colton, ICALP 2002)."""

    @staticmethod
    def draw(dimension: int, size: int, generator: torch.Generator) -> Draws:
        """Bucket of each entry, int64 [d]; the buckets s to 2s-1 are 0 to s-1 with a negative sign."""
        return {"buckets": torch.randint(2 * size, (dimension,), generator=generator)}

    def _forward(self, rows: Tensor) -> Tensor:
        signed = rows.new_zeros(len(rows), 2 * self.size).index_add_(1, self.draws["buckets"], rows)
        return signed[:, : self.size] - signed[:, self.size :]

    def _adjoint(self, rows: Tensor) -> Tensor:
        return torch.cat([rows, -rows], dim=1).index_select(1, self.draws["buckets"])

    def _sums(self) -> Sums:
        buckets = self.draws["buckets"]
        return Sums(buckets % self.size, buckets >= self.size, self.size)


@dataclass(frozen=True)
class SRHT(Operator):
    """Keeps s rows, without repeats, of a Hadamard transform of the randomly signed vector (Tropp, arXiv:1011.1595)."""

    @staticmethod
    def draw(dimension: int, size: int, generator: torch.Generator) -> Draws:
        """Signs int8 [d] and rows int64 [s] of the Hadamard matrix of the next power of two."""
        signs = torch.randint(2, (dimension,), generator=generator, dtype=torch.int8) * 2 - 1
        return {"signs": signs, "rows": torch.randperm(_power_of_two(dimension), generator=generator)[:size]}

    def _forward(self, rows: Tensor) -> Tensor:
        padded = rows.new_zeros(len(rows), _power_of_two(self.dimension))
        padded[:, : self.dimension] = rows * self.draws["signs"].to(rows.dtype)
        return hadamard(padded).index_select(1, self.draws["rows"]) / math.sqrt(self.size)

    def _adjoint(self, rows: Tensor) -> Tensor:
        padded = rows.new_zeros(len(rows), _power_of_two(self.dimension))
        padded[:, self.draws["rows"]] = rows
        signs = self.draws["signs"].to(rows.dtype) / math.sqrt(self.size)
        return hadamard(padded)[:, : self.dimension] * signs


@dataclass(frozen=True)
class _Dense(Operator):
    """Independent entries, drawn anew from the seed block by block of columns: O(s d) time."""

    @staticmethod
    def draw(dimension: int, size: int, generator: torch.Generator) -> Draws:
        """The seed, int64 []."""
        return {"seed": torch.randint(2**62, (), generator=generator)}

    @staticmethod
    @abstractmethod
    def _entries(rows: int, columns: int, generator: torch.Generator) -> Tensor:
        """Independent entries of mean 0 and variance 1."""

    def _blocks(self, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
        # Drawn on the CPU in float32 so that the seed means one matrix on every device and in every precision.
        generator = torch.Generator().manual_seed(int(self.draws["seed"]))
        width = max(1, _BLOCK // self.size)
        for start in range(0, self.dimension, width):
            columns = slice(start, min(start + width, self.dimension))
            block = self._entries(self.size, columns.stop - start, generator)
            yield columns, block.to(like) / math.sqrt(self.size)

    def _forward(self, rows: Tensor) -> Tensor:
        total = rows.new_zeros(len(rows), self.size)
        for columns, block in self._blocks(rows):
            total += rows[:, columns] @ block.T
        return total

    def _adjoint(self, rows: Tensor) -> Tensor:
        result = rows.new_empty(len(rows), self.dimension)
        for columns, block in self._blocks(rows):
            result[:, columns] = rows @ block
        return result


@dataclass(frozen=True)
class Gaussian(_Dense):
    """Independent normal entries of variance 1/s."""

    @staticmethod
    def _entries(rows: int, columns: int, generator: torch.Generator) -> Tensor:
        return torch.randn(rows, columns, generator=generator)


@dataclass(frozen=True)
class AMS(_Dense):
    """Independent signs over the root of s (Alon, Matias, Szegedy, STOC 1996)."""

    @staticmethod
    def _entries(rows: int, columns: int, generator: torch.Generator) -> Tensor:
        return torch.randint(2, (rows, columns), generator=generator, dtype=torch.int8) * 2.0 - 1.0


FAMILIES: dict[str, type[Operator]] = {
    "ams": AMS,
    "count-sketch": CountSketch,
    "gaussian": Gaussian,
    "srht": SRHT,
}
"""Sketches by name."""


def layout(template: Update) -> dict[str, Tensor]:
    """Shapes of an update as public facts, for defenses that send it as one vector."""
    return {f"shape {name}": torch.tensor(tensor.shape, dtype=torch.int64) for name, tensor in template.items()}


def shapes_of(public: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Read the shapes that `layout` wrote."""
    return {name.removeprefix("shape "): shape.tolist() for name, shape in public.items() if name.startswith("shape ")}


def hadamard(rows: Tensor) -> Tensor:
    """Walsh-Hadamard transform (Sylvester's order, entries ±1) of plain rows [n, D], D a power of two.

    Matrix products with blocks of at most 64 x 64, a block for each six factors of two: O(D log D).
    """
    count, length = rows.shape
    left, result = length, rows
    while left > 1:
        block = min(64, left)
        # Transforms the leading axis and moves it to the back; after the last block the axes are in order again.
        result = (_sylvester(block, rows) @ result.reshape(count, block, length // block)).transpose(1, 2)
        left //= block
    return result.reshape(count, length)


def _sylvester(order: int, like: Tensor) -> Tensor:
    matrix = like.new_ones(1, 1)
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


_Map = Callable[[Tensor], Tensor]


class _Linear(torch.autograd.Function):
    """A linear map on the last dimension whose derivative is its adjoint, so that no intermediate is kept."""

    @staticmethod
    def forward(vector: Tensor, apply: _Map, adjoint: _Map) -> Tensor:
        rows = apply(vector.detach().reshape(-1, vector.shape[-1]))
        return rows.reshape(*vector.shape[:-1], rows.shape[-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, _Map, _Map], output: Tensor) -> None:
        _, ctx.forward_map, ctx.adjoint_map = inputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _Linear.apply(grads[0], ctx.adjoint_map, ctx.forward_map), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        vector, apply, adjoint = args
        assert in_dims[0] is not None
        return _Linear.apply(vector.movedim(in_dims[0], 0), apply, adjoint), 0
