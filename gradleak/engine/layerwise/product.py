"""Layers whose weight gradient is a product of two matrices, one row a position: linear layers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from ...update import Update
from .entries import Entries
from .layer import Layer, ObservedUpdates, Pull

_PASS = 75
"""Multiplications a core does while it moves one entry of a per-victim matrix through memory a few times.

With it `ghost` changes its mind within a tenth of where both ways take equally long: matrices of 256 x 256, 1024 x 128
and 512 x 512 in float32, 16 to 384 positions, one core of an AMD EPYC, torch 2.14 (ratios of CPU seconds).
"""


class Product(Layer):
    """A layer whose output is a matrix times its input at every position: A [W, P, in], D [W, P, out], G = D^T A.

    Subclasses say how input and cotangent become A and D, and what flows back.
    """

    rows: int
    """Positions of all images of all victims."""

    @property
    def positions(self) -> int:
        """P: positions of one victim, all of its images together."""
        return self.rows // self.victims

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs of the matrix."""
        weight = self.parameters["weight"].flatten(1)
        return weight.shape[0], weight.shape[1]

    @property
    def ghost(self) -> bool:
        """Whether products of positions are cheaper than the matrix itself."""
        outputs, inputs = self.shape
        # A A^T and D D^T take P^2 in and P^2 out multiplications, and as many again to be applied to D and A. G takes
        # P in out, and _PASS more an entry to be read and written. What meets the observed g costs both the same.
        return 2 * self.positions**2 * (inputs + outputs) < inputs * outputs * (self.positions + _PASS)

    @property
    def rank_pays(self) -> bool:
        """Whether P factors are much smaller than the matrix."""
        outputs, inputs = self.shape
        return self.ghost and 2 * self.positions * (inputs + outputs) < inputs * outputs

    @abstractmethod
    def left(self) -> Tensor:
        """D, without a graph."""

    @abstractmethod
    def right(self) -> Tensor:
        """A, without a graph."""

    @abstractmethod
    def flow(self, into_left: Tensor, into_right: Tensor) -> Pull:
        """Turn what flows into D and A into what flows into cotangent and input."""

    def compute(self) -> Update:
        """G = D^T A, and the sum of D for the bias."""
        left = self.left()
        weight = left.transpose(1, 2) @ self.right()
        own = {"weight": weight.view(self.victims, *self.parameters["weight"].shape)}
        if "bias" in self.parameters:
            own["bias"] = left.sum(1)
        return own

    def vjp(self, towards: Update) -> Pull:
        """V A into D, V^T D into A."""
        matrix = towards["weight"].flatten(2)
        into_left = self.right() @ matrix.transpose(1, 2)
        if "bias" in towards:
            into_left = into_left + towards["bias"][:, None]
        return self.flow(into_left, self.left() @ matrix)

    def _bias_gradient(self) -> Tensor | None:
        return self.left().sum(1) if "bias" in self.parameters else None

    def _factored(self, observed: ObservedUpdates) -> bool:
        return self.full["weight"] in observed.left

    def products(self, observed: ObservedUpdates) -> tuple[Tensor, Tensor]:
        """<G, g> and |G|^2 without G."""
        if not (self.ghost or self._factored(observed)):
            return super().products(observed)
        name = self.full["weight"]
        left, right = self.left(), self.right()
        square = self._gram_square(left, right)
        if self._factored(observed):
            # g = E F^T, so that <D^T A, g> = <A F, D E>: only small matrices.
            self._towards = right @ observed.right[name], left @ observed.left[name]
            dot = (self._towards[0] * self._towards[1]).flatten(1).sum(1)
        else:
            matrix = observed.dense[name].flatten(2)
            self._towards = right @ matrix.transpose(1, 2), left @ matrix
            dot = (self._towards[0] * left).flatten(1).sum(1)
        if self._bias is not None:
            dot = dot + (self._bias * observed.dense[self.full["bias"]]).sum(1)
        return dot, square

    def square(self) -> Tensor:
        """|G|^2 without G."""
        return self._gram_square(self.left(), self.right()) if self.ghost else super().square()

    def _gram_square(self, left: Tensor, right: Tensor) -> Tensor:
        self._grams = left @ left.transpose(1, 2), right @ right.transpose(1, 2)
        self._bias = self._bias_gradient()
        square = (self._grams[0] * self._grams[1]).flatten(1).sum(1)
        return square if self._bias is None else square + self._bias.square().sum(1)

    def pull_own(self, of_own: Tensor) -> Pull:
        """Without V: C G A = C (A A^T) D, and likewise for D."""
        if not self.ghost:
            return super().pull_own(of_own)
        own, left, right = of_own[:, None, None], self.left(), self.right()
        # Not those of `square`: since then the batch may have been taken for that of other victims.
        self._gram_square(left, right)
        into_left = own * (self._grams[1] @ left)
        if self._bias is not None:
            into_left = into_left + own * self._bias[:, None]
        return self.flow(into_left, own * (self._grams[0] @ right))

    def gap(self, observed: ObservedUpdates, factor: Tensor | None = None) -> Tensor:
        """|c G - g|^2; from factors in float64, since it is a small difference of large numbers."""
        if not self._factored(observed):
            return super().gap(observed, factor)
        own, bias = self.left(), self._bias_gradient()
        if factor is None:
            # With a factor they have been computed, to find it.
            self.products(observed)
        else:
            own = factor[:, None, None] * own
            bias = None if bias is None else factor[:, None] * bias
        name = self.full["weight"]
        left = torch.cat([own.transpose(1, 2), -observed.left[name]], 2).double()
        right = torch.cat([self.right().transpose(1, 2), observed.right[name]], 2).double()
        grams = (left.transpose(1, 2) @ left) * (right.transpose(1, 2) @ right)
        gap = grams.flatten(1).sum(1).clamp(min=0)
        if bias is not None:
            gap = gap + (bias - observed.dense[self.full["bias"]]).double().square().sum(1)
        return gap

    def fill_columns(self, columns: Update) -> None:
        """Write the gradients with the victims last: of one position outer products, which need not be turned."""
        if self.positions > 1 or self._gradients is not None:
            return super().fill_columns(columns)
        left, right = self._turned()
        torch.mul(left[:, None], right, out=columns[self.full["weight"]].view(*self.shape, -1))
        if "bias" in self.parameters:
            columns[self.full["bias"]].copy_(left)
        return None

    def picked(self, entries: Mapping[str, Entries]) -> Update:
        """Some entries of the gradients: products of some rows of D and A, where they are few."""
        chosen = entries[self.full["weight"]]
        if not self._sparse(chosen):
            return super().picked(entries)
        left, right = (turned.flatten(1) for turned in self._turned())
        self._chosen = left.index_select(0, chosen.rows), right.index_select(0, chosen.columns)
        product = self._chosen[0] * self._chosen[1]
        if self.positions > 1:
            product = product.view(-1, self.victims, self.positions).sum(2)
        found = {self.full["weight"]: product.T}
        if "bias" in self.parameters:
            full = self.full["bias"]
            found[full] = self.left().sum(1).index_select(1, entries[full].index)
        return found

    def pull_picked(self, entries: Mapping[str, Entries], values: Update) -> Pull:
        """Without V: its entries times rows of A go into D, and times rows of D into A."""
        name = self.full["weight"]
        chosen = entries[name]
        if not self._sparse(chosen):
            return super().pull_picked(entries, values)
        into = values[name].T.contiguous()
        if self.positions > 1:
            into = into.repeat_interleave(self.positions, 1)
        left, right = self._chosen
        shape = self.victims, self.positions, -1
        into_left = chosen.by_row(into * right).T.reshape(shape)
        into_right = chosen.by_column(into * left).T.reshape(shape)
        if "bias" in self.parameters:
            full = self.full["bias"]
            zeros = values[full].new_zeros(self.victims, 1, entries[full].size)
            into_left = into_left + zeros.index_copy_(2, entries[full].index, values[full][:, None])
        return self.flow(into_left, into_right)

    def _sparse(self, chosen: Entries) -> bool:
        """Whether so few entries are wanted that the matrix need not be formed; a pass takes about six steps each."""
        return self.ghost and 6 * self.positions * len(chosen.index) < chosen.size

    def _turned(self) -> tuple[Tensor, Tensor]:
        """D and A with the victims last, [out, W, P] and [in, W, P]; of one position [.., W]."""
        left, right = (rows.permute(2, 0, 1).contiguous() for rows in (self.left(), self.right()))
        return (left.squeeze(2), right.squeeze(2)) if self.positions == 1 else (left, right)

    def pull_directly(self, observed: ObservedUpdates, of_observed: Tensor, of_own: Tensor) -> Pull:
        """Without V: (c g + C G) A = c g A + C (A A^T) D, and likewise for D."""
        if self._gradients is not None:
            return super().pull_directly(observed, of_observed, of_own)
        name = self.full["weight"]
        c, own = of_observed[:, None, None], of_own[:, None, None]
        of_left, of_right = (c * towards for towards in self._towards)
        if self._factored(observed):
            of_left = of_left @ observed.left[name].transpose(1, 2)
            of_right = of_right @ observed.right[name].transpose(1, 2)
        if self._bias is not None:
            bias = of_observed[:, None] * observed.dense[self.full["bias"]] + of_own[:, None] * self._bias
            of_left = of_left + bias[:, None]
        into_left = of_left.baddbmm(own * self._grams[1], self.left())
        into_right = of_right.baddbmm(own * self._grams[0], self.right())
        return self.flow(into_left, into_right)


class LinearProduct(Product):
    """nn.Linear."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Run the layer and take notes."""
        self.rows = inputs[..., 0].numel()
        return self.note(inputs, F.linear(inputs, self.parameters["weight"], self.parameters.get("bias")))

    def left(self) -> Tensor:
        """D: the cotangent's rows."""
        return self.flowing.reshape(self.victims, self.positions, -1)

    def right(self) -> Tensor:
        """A: the input's rows."""
        return self.inputs.detach().reshape(self.victims, self.positions, -1)

    def flow(self, into_left: Tensor, into_right: Tensor) -> Pull:
        """The same rows."""
        return [
            (self.cotangent, into_left.reshape(self.cotangent.shape)),
            (self.inputs, into_right.reshape(self.inputs.shape)),
        ]
