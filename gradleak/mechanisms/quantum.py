"""A statevector simulator in plain torch operations, and the contract of models that encode images as angles.

A state of n qubits is a complex tensor [..., 2^n] over any leading dimensions; qubit 0 is the most significant
bit. Everything is twice differentiable and can be stacked by torch.func. A layer of gates on all qubits is two
small matrix products, so the number of torch calls, which is what costs below ten qubits, stays low.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

Entangler = Literal["chain", "ring"]
Observable = Literal["qubits", "parity"]

TURN = 2 * math.pi
_TINY = 1e-12


def encode_angles(angles: Tensor) -> Tensor:
    """State [..., 2^n] of RX(angles [..., n]) on every qubit of |0...0>."""
    half = angles / 2
    zero = torch.zeros_like(half)
    qubits = torch.stack([torch.complex(half.cos(), zero), torch.complex(zero, -half.sin())], dim=-1)
    return kronecker(qubits.unsqueeze(-1)).squeeze(-1)


def encode_amplitudes(values: Tensor) -> Tensor:
    """State of real amplitudes [..., 2^n], scaled to norm one; a zero vector stays zero."""
    norm = (values.square().sum(-1, keepdim=True) + _TINY**2).sqrt()
    return torch.complex(values / norm, torch.zeros_like(values))


def rotate_x(angles: Tensor) -> Tensor:
    """Gates RX [..., 2, 2] of angles [...]."""
    cosine, sine = (angles / 2).cos(), (angles / 2).sin()
    zero = torch.zeros_like(cosine)
    return _gate(torch.complex(cosine, zero), torch.complex(zero, -sine), torch.complex(zero, -sine))


def rotate_yz(angles: Tensor) -> Tensor:
    """Gates RZ(second) RY(first), fused, [..., 2, 2] of angles [..., 2]."""
    turn, phase = (angles / 2).unbind(-1)
    ahead = torch.complex(phase.cos(), phase.sin())
    behind = ahead.conj()
    return _gate(behind * turn.cos(), -behind * turn.sin(), ahead * turn.sin(), ahead * turn.cos())


def _gate(top: Tensor, right: Tensor, left: Tensor, bottom: Tensor | None = None) -> Tensor:
    rows = torch.stack([top, right, left, top if bottom is None else bottom], dim=-1)
    return rows.view(*rows.shape[:-1], 2, 2)


def kronecker(factors: Tensor) -> Tensor:
    """Kronecker product of n matrices [..., n, r, c], the first the most significant: [..., r^n, c^n]."""
    product: Tensor = factors[..., 0, :, :]
    for index in range(1, factors.shape[-3]):
        outer = product[..., :, None, :, None] * factors[..., None, index, :, None, :]
        product = outer.flatten(-4, -3).flatten(-2, -1)
    return product


class Gates:
    """One gate a qubit, [..., n, 2, 2], as two operators, one on each half of the qubits."""

    def __init__(self, gates: Tensor):
        """Form the operators [..., 2^(n/2), 2^(n/2)]."""
        half = gates.shape[-3] // 2
        self.left = kronecker(gates[..., :half, :, :]) if half else torch.ones_like(gates[..., 0, :1, :1])
        self.right: Tensor = kronecker(gates[..., half:, :, :]).mT

    def __call__(self, state: Tensor, index: int | None = None) -> Tensor:
        """Apply them to a state [..., 2^n]; `index` picks a layer of gates stacked [layers, n, 2, 2]."""
        left, right = (self.left, self.right) if index is None else (self.left[index], self.right[index])
        grid = state.unflatten(-1, (left.shape[-1], right.shape[-1]))
        product: Tensor = left @ grid @ right
        return product.flatten(-2)


def entangle(qubits: int, entangler: Entangler) -> Tensor:
    """Order [2^n], int64, with `state[..., order]` the state after CNOT(0, 1), CNOT(1, 2), ..., [CNOT(n-1, 0)]."""
    pairs = [(qubit, qubit + 1) for qubit in range(qubits - 1)]
    if entangler == "ring" and qubits > 2:
        pairs.append((qubits - 1, 0))
    order = torch.arange(2**qubits)
    for control, target in pairs:
        basis = torch.arange(2**qubits)
        flipped = basis ^ (((basis >> (qubits - 1 - control)) & 1) << (qubits - 1 - target))
        order = order[flipped]
    return order


def evolve(state: Tensor, angles: Tensor, order: Tensor) -> Tensor:
    """Hardware-efficient ansatz: layers of RY, RZ on every qubit, then CNOTs.

    Args:
        state: [..., 2^n].
        angles: of RY and RZ, [layers, n, 2].
        order: from `entangle`.
    """
    gates = Gates(rotate_yz(angles))
    for layer in range(len(angles)):
        state = gates(state, layer).index_select(-1, order)
    return state


def observable(qubits: int, kind: Observable) -> Tensor:
    """Eigenvalues [2^n, outputs] of Z on each qubit, or of Z on all qubits together (`parity`, one output)."""
    basis = torch.arange(2**qubits)[:, None]
    signs = 1 - 2 * ((basis >> torch.arange(qubits - 1, -1, -1)) & 1)
    return (signs if kind == "qubits" else signs.prod(-1, keepdim=True)).to(torch.get_default_dtype())


def expectations(state: Tensor, eigenvalues: Tensor) -> Tensor:
    """Expected values [..., outputs] of diagonal observables `eigenvalues` [2^n, outputs]."""
    return (state.real.square() + state.imag.square()) @ eigenvalues


def wrap(angles: Tensor) -> Tensor:
    """Angles modulo a full turn, in [-pi, pi)."""
    return torch.remainder(angles + math.pi, TURN) - math.pi


def unwrap(angles: Tensor, multipliers: Tensor, turn: float) -> Tensor:
    """Features in [0, 1] whose multiples best explain a register of encoding angles.

    The first angle fixes the feature up to its precision, each further one, of frequency m_k, refines it:
    x += w_k wrap(phi_k - m_k x) / m_k, with w_k the share of m_k^2 in the squares so far (least squares).

    Args:
        angles: [B, m, ...], radians modulo a turn.
        multipliers: frequencies [m], the first is 1.
        turn: share of a full turn that the range of a feature takes.
    """
    middle = turn * math.pi
    estimate = middle + wrap(angles[:, 0] - middle)
    weight = multipliers[0] ** 2
    for index in range(1, len(multipliers)):
        frequency = multipliers[index]
        weight = weight + frequency**2
        estimate = estimate + frequency * wrap(angles[:, index] - frequency * estimate) / weight
    return (estimate / (TURN * turn)).clamp(0, 1)


def grid(features: int) -> tuple[int, int]:
    """Most square (rows, columns) with as many places as features, rows the fewer."""
    rows = max(rows for rows in range(1, math.isqrt(features) + 1) if features % rows == 0)
    return rows, features // rows


def pool(images: Tensor, features: int) -> Tensor:
    """Average grey images [B, C, H, W] over a grid of equal areas: [B, features]."""
    return adaptive_avg_pool2d(images.mean(-3, keepdim=True), grid(features)).flatten(1)


def unpool(features: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Images [B, C, H, W] of constant areas and equal channels that `pool` maps to features [B, F].

    Exact where the areas do not overlap: where height and width are multiples of the grid's.
    """
    channels, height, width = shape
    areas = features.unflatten(1, (1, *grid(features.shape[1])))
    return interpolate(areas, (height, width), mode="nearest-exact").expand(-1, channels, -1, -1)


class AngleEncoded(nn.Module, ABC):
    """A model that sees images only as angles: multiples of features, taken modulo a full turn.

    High frequencies are met only by a search over images. An attacker who takes every angle for an unknown of its own
    meets frequency one, and finds the feature afterwards by `unwrap`.
    """

    multipliers: Tensor
    turn: float
    relaxed = False
    """Whether the model is called with angles, in turns in [0, 1), in the place of images."""

    def forward(self, images: Tensor) -> Tensor:
        """Class scores [B, classes] of images [B, C, H, W], or of angles [B, m, ...] in turns if `relaxed`."""
        return self.from_angles(TURN * images if self.relaxed else self.angles(images))

    def on_angles(self) -> AngleEncoded:
        """Return the same model, sharing its parameters, as a function of its encoding angles in turns."""
        twin = copy.copy(self)
        twin.relaxed = True
        return twin

    def angles(self, images: Tensor) -> Tensor:
        """Encoding angles [B, m, ...] of images [B, C, H, W]: features times frequencies, in radians."""
        features = self.features(images).unsqueeze(1)
        frequencies = self.multipliers.view((1, -1) + (1,) * (features.ndim - 2))
        return TURN * self.turn * frequencies * features

    def images(self, angles: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """Images [B, C, H, W] in [0, 1] that explain angles [B, m, ...]."""
        return self.restored(unwrap(angles, self.multipliers, self.turn), shape)

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """What is encoded of images [B, C, H, W]: numbers in [0, 1], [B, ...]."""

    @abstractmethod
    def restored(self, features: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """Images [B, C, H, W] with such features."""

    @abstractmethod
    def from_angles(self, angles: Tensor) -> Tensor:
        """Class scores [B, classes] of encoding angles [B, m, ...], each of period one turn up to its sign."""
