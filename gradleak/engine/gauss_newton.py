"""Second-order steps for sums of squares: Levenberg-Marquardt over stacked trials, each with a damping of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import vmap

from ..update import by_transform
from .optimisers import Optimiser, Scene, Variables
from .problem import Facts, Problem


class Linearisation:
    """Residuals r [W, m] of stacked trials at a point [W, n], and products with their Jacobian J.

    Both products replay one graph: J^T u is its backward pass, J v the backward pass of that. A product costs a few
    gradients of the client's model, and any model that plain double backward serves can be used.
    """

    def __init__(self, problem: Problem, variables: Variables, facts: Facts) -> None:
        """Compute the residuals of the matching loss and, if there are any, those of the prior."""
        self.shapes = {name: tensor.shape[1:] for name, tensor in variables.items()}
        self.point = flat(variables).detach().requires_grad_()

        def one(row: Tensor, known: Facts) -> Tensor:
            return residuals_of(problem, self._cut(row), known)

        self.residuals: Tensor = vmap(one)(self.point, facts)
        self._towards = torch.zeros_like(self.residuals, requires_grad=True)
        (self._pulled,) = torch.autograd.grad(self.residuals, self.point, self._towards, create_graph=True)

    def forward(self, moves: Tensor) -> Tensor:
        """J v for v [W, n]; [W, m]."""
        (answer,) = torch.autograd.grad(self._pulled, self._towards, moves, retain_graph=True)
        return answer

    def backward(self, changes: Tensor) -> Tensor:
        """J^T u for u [W, m]; [W, n]."""
        (answer,) = torch.autograd.grad(self.residuals, self.point, changes, retain_graph=True)
        return answer

    def curvature(self, moves: Tensor) -> Tensor:
        """J^T J v for v [W, n]."""
        return self.backward(self.forward(moves))

    def gram(self) -> Tensor:
        """J^T J itself, [W, n, n], from the Jacobian's columns."""
        width, unknowns = self.point.shape
        axes = torch.eye(unknowns, dtype=self.point.dtype, device=self.point.device)
        columns = torch.stack([self.forward(axis.expand(width, -1)) for axis in axes], dim=1)
        return columns @ columns.mT

    def _cut(self, row: Tensor) -> Variables:
        sizes = [shape.numel() for shape in self.shapes.values()]
        parts = row.split(sizes)
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}


def residuals_of(problem: Problem, variables: Variables, facts: Facts) -> Tensor:
    """Residuals [m] of one trial, whose squared norm is its total loss up to penalties that are no squares."""
    assert problem.residual is not None
    guess = problem.decode(variables, facts)
    parts = [problem.residual(problem.simulate(guess, by_transform), facts)]
    if problem.prior_residual is not None:
        parts.append(problem.prior_residual(guess, variables, facts))
    return torch.cat(parts)


@dataclass
class LevenbergMarquardt(Optimiser):
    """Gauss-Newton steps (J^T J + damping I) d = -J^T r, damped more until they lower the trial's own total loss.

    References: Levenberg 1944; Marquardt 1963; projected steps in a box after Kanzow, Yamashita, Fukushima 2004.
    The damping is relative to the mean curvature. Variables at a bound whose gradient points outwards are held. With
    more than `dense` unknowns the step is the one of the Krylov space of `krylov` products with J^T J (Lanczos with
    full reorthogonalisation), where every damping is tried without a further product. One call is one accepted step;
    a trial that no damping improves, or that improves by less than a share `tolerance`, keeps its point and ends.
    Rates and schedules mean nothing here.
    """

    damping: float = 1e-3
    """Of a trial's first step."""
    lower: float = 0.1
    """Factor of the damping after a step."""
    higher: float = 5.0
    """Factor of the damping after each try that did not lower the loss."""
    least: float = 1e-14
    """Smallest damping; less is lost to rounding in float64."""
    tries: int = 12
    """Dampings before a trial ends: 5^12 takes one from where Newton's step was right to a short step downhill."""
    tolerance: float = 1e-5
    dense: int = 128
    """Most unknowns, such as the 64 pixels of a digit, for which J^T J is formed: as many products as unknowns."""
    krylov: int = 48
    """Products otherwise; each vector is kept, so that memory grows with them too."""

    _scene: Scene | None = None

    def start(self, variables: Variables) -> None:
        """Take the variables to move and clear the state of every row."""
        first = flat(variables)
        self._damping = first.new_full((len(first),), self.damping)

    def restart(self, rows: Tensor) -> None:
        """Clear the state of some rows."""
        self._damping[rows] = self.damping

    def see(self, scene: Scene) -> None:
        """Take what the rows stand for; the Jacobian is computed from it."""
        self._scene = scene

    def step(self, variables: Variables, gradients: Variables, rate: Tensor, done: Tensor | None = None) -> Tensor:
        """One accepted step a row."""
        assert self._scene is not None, "see() comes first"
        scene, here, slope = self._scene, flat(variables), flat(gradients) / 2
        free = ~_held(variables, gradients, scene.project)
        slope = torch.where(free, slope, torch.zeros_like(slope))
        model = self._model(Linearisation(scene.problem, variables, scene.facts), slope, free)
        best, total = here.clone(), scene.total.clone()
        waiting = torch.ones_like(total, dtype=torch.bool)
        for _ in range(self.tries):
            guess = {name: tensor.clone() for name, tensor in variables.items()}
            put(guess, here - model(self._damping))
            if scene.project is not None:
                scene.project(guess)
            loss = total_loss(scene.problem, guess, scene.facts)
            better = waiting & (loss < total)
            best = torch.where(better[:, None], flat(guess), best)
            total = torch.where(better, loss, total)
            waiting = waiting & ~better
            factor = torch.where(waiting, self.higher, torch.where(better, self.lower, 1.0))
            self._damping = (self._damping * factor).clamp(min=self.least)
            if not bool(waiting.any()):
                break
        moving = scene.total - total > self.tolerance * scene.total
        put(variables, torch.where(moving[:, None], best, here))
        return moving

    def gradients(self, unknowns: int) -> int:
        """About how many gradients of the client's model one step costs: two a product, and the losses of two tries."""
        products = unknowns if unknowns <= self.dense else 2 * self.krylov
        return 2 * products + 3

    def _model(self, linear: Linearisation, slope: Tensor, free: Tensor) -> Callable[[Tensor], Tensor]:
        """The step [W, n] for a damping [W]."""
        if slope.shape[1] <= self.dense:
            both = (free[:, :, None] & free[:, None, :]).to(slope)
            return Damped(linear.gram() * both, slope, None)
        return lanczos(lambda moves: torch.where(free, linear.curvature(moves), 0.0), slope, self.krylov)


@dataclass(frozen=True)
class Damped:
    """Solves (A + damping s I) d = b for stacked A [W, k, k] and b [W, k], s the mean of A's diagonal.

    With a basis [W, k, n] the solution is given in its space.
    """

    matrix: Tensor
    right: Tensor
    basis: Tensor | None

    def __call__(self, damping: Tensor) -> Tensor:
        """Solution [W, k], or [W, n] with a basis; zero where there is none."""
        diagonal = self.matrix.diagonal(dim1=1, dim2=2)
        used = (diagonal > 0).sum(1).clamp(min=1)
        scale = (diagonal.sum(1) / used).clamp(min=torch.finfo(self.right.dtype).tiny)
        damped = self.matrix + torch.diag_embed((damping * scale)[:, None].expand_as(self.right))
        solved, _ = torch.linalg.solve_ex(damped, self.right[:, :, None])
        step = solved[:, :, 0] if self.basis is None else (solved.mT @ self.basis)[:, 0]
        return torch.nan_to_num(step, nan=0.0, posinf=0.0, neginf=0.0)


def lanczos(operator: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> Damped:
    """Restrict stacked symmetric operators on [W, n] to their Krylov spaces from `start`, of so many products each."""
    length = start.norm(dim=1)
    tiny = torch.finfo(start.dtype).tiny
    basis = [start / length.clamp(min=tiny)[:, None]]
    images = []
    for index in range(min(steps, start.shape[1])):
        image = operator(basis[-1])
        images.append(image)
        if index + 1 == min(steps, start.shape[1]):
            break
        known, rest = torch.stack(basis, dim=1), image
        # Twice is enough to be orthogonal up to rounding (Parlett, The Symmetric Eigenvalue Problem, 1980).
        for _ in range(2):
            rest = rest - (known.mT @ (known @ rest[:, :, None]))[:, :, 0]
        size = rest.norm(dim=1)
        # Where the space is exhausted what is left is rounding: the rows go on with zeros.
        usable = size > 1e-12 * image.norm(dim=1)
        basis.append(torch.where(usable[:, None], rest / size.clamp(min=tiny)[:, None], torch.zeros_like(rest)))
    space = torch.stack(basis, dim=1)
    matrix = space @ torch.stack(images, dim=2)
    right = torch.zeros_like(matrix[:, 0])
    right[:, 0] = length
    return Damped((matrix + matrix.mT) / 2, right, space)


def total_loss(problem: Problem, variables: Variables, facts: Facts) -> Tensor:
    """Total loss [W] of stacked trials."""

    def one(row: Variables, known: Facts) -> Tensor:
        return problem.loss(row, known, by_transform)[0]

    return vmap(one)(variables, facts).detach()


def flat(variables: Variables) -> Tensor:
    """Stacked variables as one tensor [W, n]."""
    return torch.cat([tensor.flatten(1) for tensor in variables.values()], dim=1)


def put(variables: Variables, values: Tensor) -> None:
    """Write [W, n] into stacked variables, in place."""
    start = 0
    for tensor in variables.values():
        size = tensor[0].numel()
        tensor.copy_(values[:, start : start + size].view_as(tensor))
        start += size


def _held(variables: Variables, gradients: Variables, project: Callable[[Variables], None] | None) -> Tensor:
    """Which entries [W, n] lie at a bound that their descent leaves: what the projection takes back."""
    if project is None:
        return torch.zeros_like(flat(variables), dtype=torch.bool)
    # Any step shorter than the box will do: what counts is whether the projection undoes it.
    moved = {name: tensor - 1e-3 * gradients[name].sign() for name, tensor in variables.items()}
    before = flat(moved)
    project(moved)
    return (flat(moved) != before) & (flat(moved) == flat(variables))
