"""Seeds derived from what a draw may depend on, and per-victim streams of random numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def derive(*components: object) -> int:
    """Return a 63-bit seed from the components' text: equal components, equal seed, on every machine.

    >>> derive("victim", 3) == derive("victim", 3)
    True
    >>> derive("victim", 3) == derive("victim", 4)
    False
    """
    text = "\x1f".join(str(component) for component in components)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(*components: object) -> torch.Generator:
    """Return a CPU generator seeded by `derive(*components)`.

    >>> torch.equal(torch.rand(2, generator=generator("round", 0)), torch.rand(2, generator=generator("round", 0)))
    True
    """
    return torch.Generator().manual_seed(derive(*components))


@contextmanager
def drawing(seed: int) -> Iterator[None]:
    """Let torch's global generator on the CPU start from a seed inside; afterwards it is as it was before.

    `torch.manual_seed` would also seed those of GPUs, which then stay so.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class Generators:
    """One random stream a victim, so that a victim's draws do not depend on its neighbours.

    Draws are made on the CPU and moved, so that a seed means the same on every device.

    >>> together, alone = Generators(["a", "b"]).normal(4), Generators(["b"]).normal(4)
    >>> torch.equal(together[1], alone[0])
    True
    """

    def __init__(
        self,
        names: Sequence[object],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        context: object = "",
    ):
        """Make one stream for each name (a victim's full identity: suite seed, cell, victim id).

        `context` is what all victims share (suite seed, cell); `shared` draws from it.
        """
        self.names = tuple(names)
        self.context = context
        self.device = torch.device(device)
        self.dtype = dtype
        self._streams = [generator(name) for name in self.names]

    def __len__(self) -> int:
        return len(self.names)

    def child(self, *components: object) -> Generators:
        """Fresh independent streams, one a victim, e.g. `child("restart", 2)`."""
        names = [(name, *components) for name in self.names]
        return Generators(names, self.device, self.dtype, (self.context, *components))

    def shared(self, *components: object) -> torch.Generator:
        """CPU generator for what serves all victims alike, such as a network to be trained: no victim is part of it."""
        return generator(self.context, "shared", *components)

    def select(self, indices: Sequence[int]) -> Generators:
        """Fresh streams of a subset of the victims."""
        return Generators([self.names[index] for index in indices], self.device, self.dtype, self.context)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, [N, *shape]."""
        return self._draw(torch.randn, shape)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1), [N, *shape]."""
        return self._draw(torch.rand, shape)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Integers in [0, high), [N, *shape], int64.

        >>> Generators(["a", "b"]).integers(10, 3).shape
        torch.Size([2, 3])
        """
        rows = [torch.randint(high, shape, generator=stream) for stream in self._streams]
        return torch.stack(rows).to(self.device)

    def _draw(self, sample: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        # Drawn in float64 so that float32 and float64 runs start from the same numbers.
        rows = [sample(shape, generator=stream, dtype=torch.float64) for stream in self._streams]
        return torch.stack(rows).to(self.device, self.dtype)
