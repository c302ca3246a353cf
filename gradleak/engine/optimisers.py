"""Optimisers over stacked trials: every row is its own problem with its own step count, rate and state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from .problem import Facts, Problem
from .problem import Variables as Variables  # attacks look for it here

Schedule = Callable[[Tensor], Tensor]
"""Factor of the learning rate for the share of steps done, both [W]."""


def constant(done: Tensor) -> Tensor:
    """No decay."""
    return torch.ones_like(done)


def step_decay(done: Tensor) -> Tensor:
    """A tenth at 3/8, 5/8 and 7/8 of the steps (Geiping et al., arXiv:2003.14053)."""
    passed = sum((done >= milestone).to(done.dtype) for milestone in (3 / 8, 5 / 8, 7 / 8))
    return torch.pow(torch.full_like(done, 0.1), torch.as_tensor(passed))


def cosine_decay(done: Tensor) -> Tensor:
    """Half a cosine from one to zero."""
    return 0.5 * (1 + torch.cos(torch.pi * done))


SCHEDULES: dict[str, Schedule] = {"constant": constant, "step": step_decay, "cosine": cosine_decay}


@dataclass(frozen=True)
class Scene:
    """What the rows of an optimiser stand for, for those that need more than gradients."""

    problem: Problem
    facts: Facts
    """Facts of the rows, [W, ...], as the problem understands them."""
    total: Tensor
    """Total loss where the rows are, [W]."""
    project: Callable[[Variables], None] | None
    """Brings stacked variables back into their set, in place."""


class Optimiser(ABC):
    """Moves stacked variables in place; rows never mix."""

    @abstractmethod
    def start(self, variables: Variables) -> None:
        """Take the variables to move and clear the state of every row."""

    @abstractmethod
    def restart(self, rows: Tensor) -> None:
        """Clear the state of some rows (int64 indices), which now hold new trials."""

    def see(self, scene: Scene) -> None:
        """Take what the rows stand for, before every step; first-order methods do without."""
        del scene

    def state(self, row: int) -> list[Tensor]:
        """Copy the state of one row, to go on from it later."""
        return [tensor[row].clone() for tensor in self._stacked()]

    def resume(self, row: int, state: list[Tensor]) -> None:
        """Go on in a row from a copied state."""
        for tensor, kept in zip(self._stacked(), state, strict=True):
            tensor[row] = kept

    def _stacked(self) -> list[Tensor]:
        """All state: every tensor of an optimiser has a row a trial."""
        return [leaf for leaf in tree_leaves(vars(self)) if isinstance(leaf, Tensor)]

    @abstractmethod
    def step(self, variables: Variables, gradients: Variables, rate: Tensor, done: Tensor | None = None) -> Tensor:
        """Move every row by its gradient at its rate [W]; return which rows [W] can still move.

        `done` is the share of steps done, [W]; none when None.
        """


@dataclass
class Adam(Optimiser):
    """Adam (Kingma and Ba, arXiv:1412.6980), one moment pair and one step count a row.

    `signs` names the variables whose gradient is replaced by its sign first (Geiping et al., arXiv:2003.14053);
    with `soft` by tanh(s g) / s, where s falls from 1 to 0 over the steps: never quite a
    sign, and the gradient itself in the end.
    `rates` multiplies the rate of single variables.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    signs: frozenset[str] = frozenset()
    soft: bool = False
    rates: dict[str, float] | None = None

    def start(self, variables: Variables) -> None:
        """Take the variables to move and clear the state of every row."""
        first = next(iter(variables.values()))
        self._steps = torch.zeros(len(first), dtype=torch.float64, device=first.device)
        self._mean = {name: torch.zeros_like(tensor) for name, tensor in variables.items()}
        self._square = {name: torch.zeros_like(tensor) for name, tensor in variables.items()}

    def restart(self, rows: Tensor) -> None:
        """Clear the state of some rows."""
        self._steps[rows] = 0
        for moments in (self._mean, self._square):
            for tensor in moments.values():
                tensor[rows] = 0

    def step(self, variables: Variables, gradients: Variables, rate: Tensor, done: Tensor | None = None) -> Tensor:
        """One Adam step a row."""
        # Not to zero, where the quotient is none; tanh(s g) / s is g but for a share of (s g)^2 / 3.
        left = (1 - (torch.zeros_like(rate) if done is None else done)).clamp(min=1e-3)
        self._steps += 1
        first, second = self.betas
        # Bias corrections in float64 as torch does them, in Python numbers.
        root = (1 - second**self._steps).sqrt()
        pace = rate.double() / (1 - first**self._steps)
        for name, tensor in variables.items():
            column = (-1,) + (1,) * (tensor.ndim - 1)
            gradient = gradients[name]
            if name in self.signs:
                scale = left.to(gradient.dtype).view(column)
                gradient = (scale * gradient).tanh() / scale if self.soft else gradient.sign()
            mean, square = self._mean[name], self._square[name]
            mean.lerp_(gradient, 1 - first)
            square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
            denominator = square.sqrt() / root.to(tensor.dtype).view(column) + self.epsilon
            factor = (self.rates or {}).get(name, 1.0)
            tensor -= factor * pace.to(tensor.dtype).view(column) * mean / denominator
        return torch.ones_like(self._steps, dtype=torch.bool)


@dataclass
class LBFGS(Optimiser):
    """L-BFGS without line search, as torch.optim.LBFGS does it by default, for every row by itself.

    A row that meets torch's stopping rules (gradient, step or directional derivative vanish) does not move
    again. One call is one inner iteration of torch's. The direction is the same up to rounding, but by the compact form
    of the inverse Hessian (Byrd, Nocedal, Schnabel, Mathematical Programming 63, 1994): two passes over what is
    remembered instead of two loops over steps.
    """

    history: int = 100
    tolerance_gradient: float = 1e-7
    tolerance_change: float = 1e-9

    def start(self, variables: Variables) -> None:
        """Take the variables to move and clear the state of every row."""
        flat = _padded(variables)
        rows, size = flat.shape
        self._moves = flat.new_zeros(rows, self.history, size)
        self._changes = flat.new_zeros(rows, self.history, size)
        # <s_i, y_j> for steps i no younger than j, and <y_i, y_j>, oldest first; an identity where there are none yet.
        self._triangle = torch.eye(self.history, dtype=flat.dtype, device=flat.device).repeat(rows, 1, 1)
        self._gram = torch.zeros_like(self._triangle)
        self._count = torch.zeros(rows, dtype=torch.int64, device=flat.device)
        self._taken = torch.zeros_like(self._count)
        self._scale = flat.new_ones(rows)
        self._direction = torch.zeros_like(flat)
        self._length = flat.new_zeros(rows)
        self._gradient = torch.zeros_like(flat)

    def restart(self, rows: Tensor) -> None:
        """Clear the state of some rows."""
        for zeroed in (self._count, self._taken, self._moves, self._changes, self._gram, self._triangle):
            zeroed[rows] = 0
        self._triangle[rows] += torch.eye(self.history, dtype=self._gram.dtype, device=self._gram.device)
        self._scale[rows] = 1

    def step(self, variables: Variables, gradients: Variables, rate: Tensor, done: Tensor | None = None) -> Tensor:
        """One L-BFGS step a row."""
        gradient = _padded(gradients)
        rate = rate.to(gradient.dtype)
        fresh = self._taken == 0
        direction = torch.where(fresh[:, None], -gradient, -self._newton(gradient, fresh))
        steepest = (1 / gradient.abs().sum(1)).clamp(max=1) * rate
        length = torch.where(fresh, steepest, rate)
        slope = (gradient * direction).sum(1)
        moves = (slope <= -self.tolerance_change) & (gradient.abs().amax(1) > self.tolerance_gradient)
        delta = torch.where(moves[:, None], length[:, None] * direction, torch.zeros_like(direction))
        _add(variables, delta)
        self._gradient, self._direction, self._length = gradient, direction, length
        self._taken += 1
        return moves & (delta.abs().amax(1) > self.tolerance_change)

    def _newton(self, gradient: Tensor, fresh: Tensor) -> Tensor:
        """H g, after the last step was remembered."""
        change = gradient - self._gradient
        rows = self._remember(change, fresh)
        longest = int(self._count.max())
        if longest == 0:
            return self._scale[:, None] * gradient
        used = [slice(at, at + _BLOCK) for at in range(0, min(longest, self.history), _BLOCK)]
        vectors = torch.stack([change, gradient], 1)
        steps, changes = self._along(self._moves, vectors, used), self._along(self._changes, vectors, used)
        order = self._order() if longest > self.history else None
        if order is not None:
            steps, changes = (found.gather(1, order[:, :, None].expand_as(found)) for found in (steps, changes))
        place = (self._count[rows] - 1).clamp(max=self.history - 1)
        self._triangle[rows, :, place] = steps[rows, :, 0]
        self._gram[rows, :, place] = self._gram[rows, place, :] = changes[rows, :, 0]
        # H = q I + [S qY] [[R^-T (D + q Y^T Y) R^-1, -R^-T], [-R^-1, 0]] [S qY]^T, R the triangle, D its diagonal.
        scale, triangle = self._scale[:, None], self._triangle
        inner = torch.linalg.solve_triangular(triangle, steps[:, :, 1:], upper=True)
        curved = (self._gram @ inner)[:, :, 0]
        outer = triangle.diagonal(dim1=1, dim2=2) * inner[:, :, 0] + scale * (curved - changes[:, :, 1])
        outer = torch.linalg.solve_triangular(triangle.mT, outer[:, :, None], upper=False)
        shares = torch.cat([outer, -scale[:, :, None] * inner], 2)
        if order is not None:
            shares = torch.zeros_like(shares).scatter(1, order[:, :, None].expand_as(shares), shares)
        found = (scale * gradient)[:, None]
        for block in used:
            found = found.baddbmm(shares[:, block, :1].mT, self._moves[:, block])
            found = found.baddbmm(shares[:, block, 1:].mT, self._changes[:, block])
        return found[:, 0]

    def _remember(self, change: Tensor, fresh: Tensor) -> Tensor:
        """Keep the last step of the rows where it says something, and return these rows."""
        move = self._direction * self._length[:, None]
        curvature = (change * move).sum(1)
        # torch's own bound; along anything flatter the inverse curvature would be rounding.
        useful = (curvature > 1e-10) & ~fresh
        rows = useful.nonzero().squeeze(1)
        full = rows[self._count[rows] >= self.history]
        if len(full):
            for kept in (self._triangle, self._gram):
                younger = kept[full, 1:, 1:]
                kept[full] = 0
                kept[full, :-1, :-1] = younger
        slot = self._count[rows] % self.history
        self._moves[rows, slot] = move[rows]
        self._changes[rows, slot] = change[rows]
        self._scale[rows] = curvature[rows] / (change[rows] ** 2).sum(1)
        self._count[rows] += 1
        return rows

    def _along(self, kept: Tensor, vectors: Tensor, used: list[slice]) -> Tensor:
        """Products of what is kept [W, history, n] with vectors [W, k, n]; [W, history, k].

        By blocks of equal size, so that a row's digits do not depend on how much its neighbours remember.
        """
        found = vectors.new_zeros(*vectors.shape[:2], self.history)
        for block in used:
            # This way round it is twice as fast.
            found[:, :, block] = vectors @ kept[:, block].mT
        return found.mT

    def _order(self) -> Tensor:
        """Slot of each remembered step, oldest first, [W, history]."""
        every = torch.arange(self.history, device=self._count.device)
        return torch.where(self._count[:, None] > self.history, (self._count[:, None] + every) % self.history, every)


_BLOCK = 25
"""Steps that are multiplied at a time."""
_LINE = 16
"""Numbers to whose multiple rows are filled up with zeros, so that all start alike in memory: products round by it."""


def _padded(variables: Variables) -> Tensor:
    flat = _flat(variables)
    return F.pad(flat, (0, -flat.shape[1] % _LINE))


def _flat(variables: Variables) -> Tensor:
    return torch.cat([tensor.flatten(1) for tensor in variables.values()], dim=1)


def _add(variables: Variables, delta: Tensor) -> None:
    start = 0
    for tensor in variables.values():
        size = tensor[0].numel()
        tensor += delta[:, start : start + size].view_as(tensor)
        start += size
