"""Outpost: now and then, prune the update and add noise where it is informative."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from gradleak.defense import Defense, Message, Public
from gradleak.update import Update


@dataclass(frozen=True, kw_only=True)
class Outpost(Defense):
    """With probability 1 / (1 + decay * round), prunes each tensor and noises its most informative entries.

    References: Wang, Hugh, Li, INFOCOM 2023. Pruned are the `prune` smallest entries of a tensor. The noise is
    N(0, (noise * r)^2) with the tensor's risk r = min(Var(w), 1), on entries whose squared gradient, averaged
    over the first axis, is among the `share` largest. The risk follows from the public weights and the message
    shows what was pruned, so the adaptive answer leaves pruned entries out and weighs the rest by their noise.
    Deviation: a bias has no axis to average over. No clipping, no guarantee.
    """

    family = "noise"
    reference = "Wang, Hugh, Li, INFOCOM 2023"
    linear = False
    has_likelihood = True

    prune: Annotated[float, Ge(0), Lt(1)] = 0.8
    """Share of each tensor's entries that are pruned."""
    noise: Annotated[float, Ge(0)] = 0.8
    """Noise over risk."""
    share: Annotated[float, Gt(0), Le(1)] = 0.4
    """Share of each tensor's entries that get noise."""
    decay: Annotated[float, Ge(0)] = 0.125
    """How fast perturbation becomes rare."""
    round: Annotated[int, Ge(0)] = 0
    """Local step of the attacked message; 0 is always perturbed."""

    def public(self, template: Update, batch_size: int, generator: torch.Generator) -> Public:
        """Return each tensor's noise, a scalar by name, from the weights (`template`)."""
        return {name: self.noise * weight.detach().var(correction=0).clamp(max=1) for name, weight in template.items()}

    def at_round(self, index: int, epoch: int) -> Outpost:
        """Return the defense of that round."""
        return replace(self, round=index)

    def protect(self, update: Update, public: Public, generator: torch.Generator) -> Message:
        """Return the pruned and noised update, or the update itself where the coin says so."""
        coin = torch.rand((), generator=generator, dtype=torch.float64)
        noise = {
            name: torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
            for name, tensor in update.items()
        }
        if float(coin) >= 1 / (1 + self.decay * self.round):
            return update
        return {
            name: self._pruned(tensor) + public[name] * noise[name] * self._informative(tensor)
            for name, tensor in update.items()
        }

    def nll(self, message: Message, simulated: Message, public: Public) -> Tensor:
        """Squared distance on entries that were sent, over their noise, relative to a guess of zero."""
        misses, sizes = [], []
        # Entries without noise are known exactly; a share of the message's size keeps their weight finite.
        floor = 1e-2 * torch.stack([sent.square().mean() for sent in message.values()]).mean() + 1e-30
        for name, sent in message.items():
            variance = public[name].square() * self._informative(sent) + floor
            misses.append((torch.where(sent != 0, simulated[name] - sent, 0.0).square() / variance).sum())
            sizes.append((sent.square() / variance).sum())
        return torch.stack(misses).sum() / (torch.stack(sizes).sum() + 1e-30)

    def residual(self, message: Message, simulated: Message, public: Public) -> Tensor:
        """Differences of the entries that were sent, as `nll` weighs them: where noise lies is only guessed."""
        # As in `nll`.
        floor = 1e-2 * torch.stack([sent.square().mean() for sent in message.values()]).mean() + 1e-30
        rows, sizes = [], []
        for name, sent in message.items():
            deviation = (public[name].square() * self._informative(sent) + floor).sqrt()
            rows.append((torch.where(sent != 0, simulated[name] - sent, 0.0) / deviation).flatten())
            sizes.append((sent / deviation).square().sum())
        return torch.cat(rows) / (torch.stack(sizes).sum() + 1e-30).sqrt()

    def _pruned(self, tensor: Tensor) -> Tensor:
        kept = math.ceil((1 - self.prune) * tensor.numel())
        chosen = tensor.abs().flatten().topk(kept).indices
        mask = torch.zeros_like(tensor).flatten().index_fill(0, chosen, 1.0)
        return tensor * mask.view_as(tensor)

    def _informative(self, tensor: Tensor) -> Tensor:
        """Mask of the entries that get noise."""
        # In float64, or the rounding of the mean would pick among close entries.
        squares = tensor.double().square()
        fisher = squares if tensor.ndim < 2 else squares.mean(0)
        kept = math.ceil(self.share * fisher.numel())
        threshold = fisher.flatten().topk(kept).values.amin()
        return (fisher >= threshold).to(tensor).expand_as(tensor)
