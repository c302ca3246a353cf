"""The matching loss of updates of which only the largest entries were sent."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...update import Update
from ..closed_forms import Largest
from ..objectives import _TINY as TINY
from ..problem import Facts
from . import coefficients
from .layer import Layer, Pull, beyond, dot
from .matching import Matcher


class LargestEntries(Matcher):
    """A cosine on the entries that were sent, and a hinge on the others; the gradients are formed once."""

    def __init__(self, layers: Sequence[Layer], parameters: Update, form: Largest):
        super().__init__(layers)
        self._names, self._form = list(parameters), form
        whole = sum(tensor.numel() for tensor in parameters.values())
        self._most = {
            name: min(tensor.numel(), math.ceil(form.ratio * (tensor.numel() if form.by_tensor else whole)))
            for name, tensor in parameters.items()
        }

    def prepare(self, facts: Facts) -> Facts:
        """Find the entries that were sent, and the smallest, of all victims."""
        rows = {name: facts.message[name].flatten(1) for name in self._names}
        found = {name: [row.nonzero().squeeze(1) for row in tensor] for name, tensor in rows.items()}
        # As many places for every victim, whoever its neighbours are: sums of more terms are rounded otherwise.
        fits = all(len(index) <= self._most[name] for name, each in found.items() for index in each)
        index, sent = {}, {}
        for name, tensor in rows.items():
            most = self._most[name] if fits else tensor.shape[1]
            index[name] = torch.zeros(len(tensor), most, dtype=torch.int64, device=tensor.device)
            sent[name] = tensor.new_zeros(len(tensor), most)
            for victim, kept in enumerate(found[name]):
                index[name][victim, : len(kept)] = kept
                sent[name][victim, : len(kept)] = tensor[victim, kept]
        size = torch.stack([tensor.square().sum(1) for tensor in rows.values()]).sum(0)
        ready = facts.plus(own={"_square": size}, named={"_index": index, "_sent": sent, "_least": self._least(rows)})
        return Facts(ready.targets, {}, ready.update, ready.own, ready.named)

    def _least(self, rows: Update) -> Update:
        """The smallest entry that was sent of each tensor, or of all, [N]."""
        infinite = {name: torch.where(row == 0, torch.inf, row.abs()).amin(1) for name, row in rows.items()}
        if self._form.by_tensor:
            return infinite
        least = torch.stack(list(infinite.values())).amin(0)
        return dict.fromkeys(self._names, least)

    def __call__(self, facts: Facts) -> tuple[Tensor, Pull]:
        """Loss [W], and what flows into the graph."""
        sent, index, size = facts.named["_sent"], facts.named["_index"], facts.own["_square"]
        update, outside, ours, parts = self.updates(), {}, {}, []
        for name in self._names:
            gradient, least = update[name].flatten(1), facts.named["_least"][name]
            excess = beyond(gradient, least)
            guess = torch.where(sent[name] != 0, gradient.gather(1, index[name]), 0.0)
            outside[name], ours[name] = excess, (guess, beyond(guess, least))
            surplus = dot(excess, excess) - dot(ours[name][1], ours[name][1])
            parts.append(torch.stack([dot(guess, sent[name]), dot(guess, guess), surplus]))
        both, own, surplus = torch.stack(parts).sum(0)
        found = coefficients.cosine(both, own, size)
        scale = size + TINY
        towards = {}
        for name, (guess, excess) in ours.items():
            # Those that were sent are no excess; where a victim sent fewer, nothing is added to its first entry.
            slope = (scale / 2 * found.of_observed)[:, None] * sent[name] - excess
            slope.addcmul_((scale / 2 * found.of_own)[:, None], guess)
            whole = outside[name].scatter_add_(1, index[name], slope).mul_((2 / scale)[:, None])
            towards[name] = whole.view(update[name].shape)
        return found.loss + surplus.clamp(min=0) / scale, self.pull(towards)
