"""SPEAR: a whole batch, exactly, from the low-rank and sparse gradient of a linear layer before a ReLU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from gradleak.attack import Attack, Reconstruction
from gradleak.defense import Defense
from gradleak.engine.loop import Status
from gradleak.seeds import Generators
from gradleak.structure import OnPixels
from gradleak.threat import Observation, Setting

from ._first_layer import first_linear, gradients, noise_floor, to_inputs, to_pixels

_SAME = 0.999  # cosine from which two normals are one
_PAUSE = 10  # rounds between attempts by swaps, which cost more than a round
_DEPENDENT = 1e-2  # length of what is new in a normal, below which it adds no direction


@dataclass(frozen=True, kw_only=True)
class Spear(Attack):
    """Factors dL/dW = D^T X by the zeros that a ReLU leaves in D, and scales X by dL/db = D^T 1.

    References: Dimitrov, Baader, Müller, Vechev, NeurIPS 2024, arXiv:2403.03945. With r the rank of dL/dW = U R,
    each neuron is a point (a row of U) in r dimensions; neurons that are inactive for one image lie on a plane
    through zero, whose normal is that image's column of Q in D^T = U Q, X = Q^-1 R. Planes are drawn through r - 1
    neurons and ranked by the neurons they hold. The self-check compares the zeros of D with the signs of W x + b:
    it is 1 for the exact batch, and anything less says that the images are not exact. The loss is its complement,
    taken on the images returned. Deviations: what counts as zero follows the noise that is seen beyond rank B, and a
    normal is fitted again to all neurons of its plane. With two classes and one hidden layer D has the same
    magnitudes for every image, so that many wrong planes hold as much; larger batches then often fail, and say so.
    """

    family = "analytic"
    reference = "arXiv:2403.03945"
    ensembles: ClassVar[tuple[str, ...]] = ("auto-v1", "auto-v2")

    trials: Annotated[int, Ge(1)] = 2048
    """Planes drawn in a round."""
    rounds: Annotated[int, Ge(1)] = 100
    """Most rounds; a victim whose self-check is perfect draws no more."""
    tolerance: Annotated[float, Gt(0)] = 20.0
    """Derivatives below so many standard deviations of the noise count as zero."""
    pool: Annotated[int, Ge(1)] = 32
    """Best planes kept besides one an image, for swaps."""

    def unsuited(self, module: nn.Module, setting: Setting, defense: Defense) -> str | None:
        """It needs a biased linear layer on the pixels, a ReLU after it, and no more images than neurons."""
        layer = first_linear(module)
        if layer is None or layer.weight is None or not layer.rectified:
            return "needs a model that starts with a linear layer with a bias and a ReLU (mlp), and trains it"
        width = module.get_parameter(layer.weight).shape[0]
        if setting.batch_size > width:
            return f"needs no more images than neurons: {width} neurons face a batch of {setting.batch_size}"
        return None

    def reconstruct(self, observation: Observation, generator: Generators) -> Reconstruction:
        """Return every victim's images; `details` has the self-check and the rank found."""
        layer = _Layer.of(observation, self.tolerance)
        victims, size = observation.victims, observation.batch_size
        inputs = layer.weight.new_zeros(victims, size, layer.weight.shape[2])
        drawn = torch.zeros(victims, dtype=torch.int64, device=observation.device)
        finished = torch.ones(victims, dtype=torch.bool, device=observation.device)
        ranks = layer.ranks(size)
        for rank in sorted(set(ranks.tolist()) - {0}):
            mine = (ranks == rank).nonzero().flatten()
            found, drawn[mine], finished[mine] = self._search(
                layer.select(mine), rank, generator.select(mine.tolist()), observation
            )
            # Equal or inactive images leave no trace of their own; the mean of the others stands for them.
            spare = found.mean(1, keepdim=True).expand(-1, size - rank, -1)
            inputs[mine] = torch.cat([found, spare], dim=1)
        images = to_pixels(inputs, layer.place, observation).nan_to_num(0.5).clamp(0, 1)
        agreement = layer.agreement(to_inputs(images, layer.place))
        return Reconstruction(
            images=images,
            loss=(1 - agreement).to(observation.dtype),
            status=[Status.OK if done else Status.TIMEOUT for done in finished.tolist()],
            iterations=drawn,
            details={"self_check": agreement, "rank": ranks},
        )

    def loss(
        self, observation: Observation, images: Tensor, targets: Tensor, buffers: dict[str, Tensor]
    ) -> Tensor | None:
        """One minus the self-check [N] of given images."""
        layer = _Layer.of(observation, self.tolerance)
        return (1 - layer.agreement(to_inputs(images, layer.place))).to(observation.dtype)

    def _search(
        self, layer: _Layer, rank: int, generator: Generators, observation: Observation
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs [N, r, P] of victims of one rank, planes drawn [N], and whether the deadline was met [N]."""
        factors = _Factors.of(layer, rank)
        victims, width = len(layer.weight), rank + self.pool
        normals = layer.weight.new_zeros(victims, width, rank)
        held = layer.weight.new_full((victims, width), -1.0)
        basis = torch.eye(rank, dtype=torch.float64, device=layer.weight.device).repeat(victims, 1, 1)
        best = held[:, 0].clone()
        drawn = torch.zeros(victims, dtype=torch.int64, device=layer.weight.device)
        searching = torch.arange(victims, device=layer.weight.device)
        for turn in range(self.rounds):
            if len(searching) == 0 or observation.compute.expired:
                break
            some, stream = factors.select(searching), generator.select(searching.tolist()).child("round", turn)
            fresh = self._planes(some, stream)
            drawn[searching] += fresh.shape[1]
            fresh, count = some.distinct(fresh, some.holds(fresh), width)
            fresh, count = some.refit(fresh, count)
            fresh, count = torch.cat([normals[searching], fresh], dim=1), torch.cat([held[searching], count], dim=1)
            fresh, count = some.distinct(fresh, count, width)
            normals[searching], held[searching] = fresh, count
            tries = _independent(fresh, count, rank)
            check = some.agreement(tries)
            if turn % _PAUSE == _PAUSE - 1:
                # The planes that hold most need not be the right ones, so swaps start elsewhere each time.
                shuffled = count * stream.child("order").uniform(width).to(count)
                tries, check = some.swapped(_independent(fresh, shuffled, rank), fresh)
            better = check > best[searching]
            basis[searching] = torch.where(better[:, None, None], tries, basis[searching])
            best[searching] = torch.where(better, check, best[searching])
            # Rounding may let one neuron of one image disagree.
            searching = searching[best[searching] < 1 - 1.5 / (rank * layer.weight.shape[1])]
        finished = torch.ones(victims, dtype=torch.bool, device=layer.weight.device)
        finished[searching] = not observation.compute.expired
        return factors.inputs(basis), drawn, finished

    def _planes(self, factors: _Factors, generator: Generators) -> Tensor:
        """Unit normals [N, K, r] to try in a round."""
        return factors.planes(generator, self.trials)


@dataclass(frozen=True)
class _Layer:
    """The first layer's gradients and weights, in float64."""

    weight: Tensor
    """dL/dW, [N, O, P]."""
    bias: Tensor
    """dL/db, [N, O]."""
    noise: Tensor
    """Largest noise that is taken for zero on an entry of dL/dW, [N]."""
    parameters: tuple[Tensor, Tensor]
    """W [O, P] and b [O]."""
    place: OnPixels

    @classmethod
    def of(cls, observation: Observation, tolerance: float) -> _Layer:
        place = first_linear(observation.network.module)
        assert place is not None and place.weight is not None and place.bias is not None
        weight, bias = gradients(observation, place)
        floor = noise_floor(weight, observation.batch_size, observation.dtype)
        own = observation.network.parameters
        return cls(weight, bias, tolerance * floor, (own[place.weight].double(), own[place.bias].double()), place)

    def select(self, victims: Tensor) -> _Layer:
        return replace(self, weight=self.weight[victims], bias=self.bias[victims], noise=self.noise[victims])

    def ranks(self, batch_size: int) -> Tensor:
        """Singular values that stand out of the noise, at most the batch size, [N]."""
        values = torch.linalg.svdvals(self.weight)[:, :batch_size]
        size = max(self.weight.shape[1:]) ** 0.5
        ranks: Tensor = (values > size * self.noise[:, None]).sum(1)
        return ranks

    def active(self, inputs: Tensor) -> Tensor:
        """Whether W x + b > 0 for inputs [N, r, P], [N, O, r]."""
        weight, bias = self.parameters
        return (inputs @ weight.mT + bias).mT > 0

    def agreement(self, inputs: Tensor) -> Tensor:
        """Share of neurons and images [N] whose derivative, fitted to inputs [N, B, P], is zero where it must be."""
        inverse = torch.linalg.pinv(inputs)
        derivatives = self.weight @ inverse
        noise = self.noise[:, None] * inverse.norm(dim=1)
        share: Tensor = ((derivatives.abs() > noise[:, None]) == self.active(inputs)).double().mean((1, 2))
        return share


@dataclass(frozen=True)
class _Factors:
    """dL/dW = U R to rank r: a neuron is a row of U, an image's inactive neurons lie on a plane through zero."""

    layer: _Layer
    neurons: Tensor
    """U, [N, O, r]."""
    values: Tensor
    """Singular values, [N, r]."""
    rows: Tensor
    """R, [N, r, P]."""

    @classmethod
    def of(cls, layer: _Layer, rank: int) -> _Factors:
        """Factor a layer's gradient."""
        left, values, right = torch.linalg.svd(layer.weight, full_matrices=False)
        values = values[:, :rank]
        return cls(layer, left[:, :, :rank], values, values[:, :, None] * right[:, :rank])

    def select(self, victims: Tensor) -> _Factors:
        """Return the factors of some victims."""
        return _Factors(self.layer.select(victims), self.neurons[victims], self.values[victims], self.rows[victims])

    def planes(self, generator: Generators, count: int) -> Tensor:
        """Unit normals [N, count, r] of planes through r - 1 drawn neurons that are active for some image."""
        rank = self.neurons.shape[2]
        lengths = (self.neurons * self.values[:, None]).norm(dim=2)
        alive = lengths > self.layer.noise[:, None] * rank**0.5
        order = (~alive).double().argsort(dim=1, stable=True)
        drawn = (generator.uniform(count, rank - 1).double() * alive.sum(1)[:, None, None]).long()
        index = order.gather(1, drawn.flatten(1))[..., None].expand(-1, -1, rank)
        points = nn.functional.normalize(self.neurons.gather(1, index), dim=2).unflatten(1, (count, rank - 1))
        normals: Tensor = torch.linalg.qr(points.mT, mode="complete").Q[..., -1]
        return normals

    def on(self, normals: Tensor) -> Tensor:
        """Whether each neuron lies on each plane [N, K, r] up to noise, [N, K, O]."""
        noise = self.layer.noise[:, None] * (normals / self.values[:, None]).norm(dim=2)
        inside: Tensor = (normals @ self.neurons.mT).abs() < noise[..., None]
        return inside

    def holds(self, normals: Tensor) -> Tensor:
        """Neurons on each plane, [N, K]."""
        return self.on(normals).sum(2).double()

    def distinct(self, normals: Tensor, count: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Return the `width` planes that hold most, no two the same."""
        victim = torch.arange(len(normals), device=normals.device)
        kept, score = [], count
        for _ in range(width):
            best = score.argmax(1)
            kept.append(best)
            same = torch.einsum("nkr,nr->nk", normals, normals[victim, best]).abs() > _SAME
            score = score.masked_fill(same, -2.0).scatter(1, best[:, None], -2.0)
        index = torch.stack(kept, dim=1)
        left = torch.where(score.gather(1, index) > -3, count.gather(1, index), -1.0)
        return normals.gather(1, index[..., None].expand(-1, -1, normals.shape[2])), left

    def refit(self, normals: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """Fit each plane to all neurons on it; keep what holds no fewer."""
        scaled = self.neurons * self.values[:, None]
        spread = torch.einsum("nko,noi,noj->nkij", self.on(normals).double(), scaled, scaled)
        fitted = torch.linalg.eigh(spread).eigenvectors[..., 0] * self.values[:, None]
        fitted = nn.functional.normalize(fitted, dim=2)
        held = self.holds(fitted)
        better = held >= count
        return torch.where(better[..., None], fitted, normals), torch.where(better, held, count)

    def scaled(self, basis: Tensor) -> Tensor:
        """Scale normals [N, ..., r, r] (one a row) so that D^T 1 is the bias gradient: Q^T."""
        neurons, bias = self.neurons, self.layer.bias
        # U has orthonormal columns, so that U Q d = dL/db is r equations.
        target = torch.einsum("nor,no->nr", neurons, bias)
        target = target.view(len(target), *(1,) * (basis.ndim - 3), -1, 1)
        scaled: Tensor = basis * torch.linalg.solve_ex(basis.mT, target.expand(*basis.shape[:-1], 1)).result
        return scaled

    def inputs(self, basis: Tensor) -> Tensor:
        """X = Q^-1 R, [N, r, P]."""
        inputs: Tensor = torch.linalg.solve_ex(self.scaled(basis).mT, self.rows).result
        return inputs

    def agreement(self, basis: Tensor) -> Tensor:
        """Self-check [N, ...] of bases [N, ..., r, r]."""
        weight, bias = self.layer.parameters
        images = self.rows @ weight.mT
        images = images.view(len(images), *(1,) * (basis.ndim - 3), *images.shape[1:])
        images = images.expand(*basis.shape[:-1], images.shape[-1])
        before = torch.linalg.solve_ex(self.scaled(basis).mT, images).result + bias
        zero = self.on(basis.flatten(1, -2)).view(*basis.shape[:-1], -1)
        same = ((before > 0) == ~zero).double().mean((-2, -1))
        return torch.where(before.isfinite().all(-1).all(-1), same, 0.0)

    def swapped(self, basis: Tensor, pool: Tensor) -> tuple[Tensor, Tensor]:
        """Swap single normals for pooled ones as long as the self-check rises; bases and their self-check."""
        victims, rank, _ = basis.shape
        victim = torch.arange(victims, device=basis.device)
        current = self.agreement(basis)
        for _ in range(4 * rank):
            if (current == 1).all():
                break
            tries = basis[:, None, None].repeat(1, rank, pool.shape[1], 1, 1)
            for slot in range(rank):
                tries[:, slot, :, slot] = pool
            scores, choice = self.agreement(tries).flatten(1).max(1)
            rises = scores > current
            if not rises.any():
                break
            basis = torch.where(rises[:, None, None], tries.flatten(1, 2)[victim, choice], basis)
            current = torch.where(rises, scores, current)
        return basis, current


def _independent(normals: Tensor, order: Tensor, rank: int) -> Tensor:
    """Return the `rank` normals [N, K, r] highest in an order [N, K] that are linearly independent, [N, r, r]."""
    victim = torch.arange(len(normals), device=normals.device)
    left, chosen = normals, []
    for _ in range(rank):
        # Where too few are independent, the longest rest keeps the basis regular.
        lengths = left.norm(dim=2)
        first = torch.where(lengths > _DEPENDENT, order.clamp(min=0) + 1, lengths).argmax(1)
        chosen.append(first)
        direction = nn.functional.normalize(left[victim, first], dim=1)
        left = left - torch.einsum("nkr,nr->nk", left, direction)[..., None] * direction[:, None]
    return normals.gather(1, torch.stack(chosen, dim=1)[..., None].expand(-1, -1, rank))
