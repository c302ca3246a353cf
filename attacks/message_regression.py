"""Message regression: the conditional mean of an image given its message, by kernel ridge on public images."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from gradleak.attack import Attack, Reconstruction
from gradleak.defense import Defense, Message
from gradleak.engine.loop import Status
from gradleak.seeds import Generators
from gradleak.threat import Knowledge, Level, Observation, Setting

from ._imitation import Hashing, Imitations, class_prior, imitate, sorted_labels, untold


@dataclass(frozen=True, kw_only=True)
class MessageRegression(Attack):
    """Answers the image that kernel ridge regression expects after a message, learned on messages of public images.

    Our own attack, by kernel ridge regression (Saunders, Gammerman, Vovk, ICML 1998). Messages
    go through the defense as a client's would, private randomness included. With x the images and m the messages,
    the answer is mu(y) + k(m)^T (K + ridge I)^-1 (x - mu), mu(y) the mean public image of the labels. The kernel
    (linear or Gaussian, of the entries, of their directions, or of the tensors' norms alone; times how far labels
    agree) and the ridge are those with the least error on public images held out. A great ridge answers the class
    mean, so that a message that says nothing costs nothing. Longer messages are hashed with random signs.
    """

    family = "learned"
    reference = "gradleak; kernel ridge regression: Saunders, Gammerman & Vovk, ICML 1998"
    ensembles = ("auto-v2",)
    needs = Knowledge(auxiliary=True, defense=Level.PARAMETERS)
    adaptive = True
    tuning = "kernel and ridge are chosen on public images in every run; the rest is as first tried"

    messages: Annotated[int, Ge(8)] = 1024
    """Messages of public images to learn from."""
    features: Annotated[int, Ge(1)] = 4096
    """Most entries of a message that are told apart; those of a longer one are hashed to so many."""
    held_out: Annotated[float, Gt(0), Lt(1)] = 0.2
    """Share of the messages on which kernel and ridge are chosen."""

    def unsuited(self, module: nn.Module, setting: Setting, defense: Defense) -> str | None:
        """It has to do what the client does."""
        return untold(setting)

    def reconstruct(self, observation: Observation, generator: Generators) -> Reconstruction:
        """Learn and answer all victims; `details` has the errors on public images held out, and of the class mean."""
        asked = sorted_labels(observation)
        seen = None if asked is None else asked[0]
        shape = (observation.victims, observation.batch_size, *observation.shape)
        images, errors = class_prior(observation, seen), (math.nan, math.nan)
        assert observation.view is not None
        summary = observation.view.summary
        sent = summary(observation.message)
        hashing = Hashing(sent, self.features, generator.shared("hash"), torch.float64)
        read = partial(_views, hashing=hashing)
        known = imitate(
            observation, self.messages, generator.shared("messages"), lambda message: read(summary(message))
        )
        if known is not None:
            learner = self._learn(known, observation, labelled=seen is not None)
            images = images + learner.answer(read(sent), seen).view(shape).to(images)
            errors = learner.error, learner.prior_error
        if asked is not None:
            images = images.gather(1, asked[1].view(*shape[:2], 1, 1, 1).expand_as(images))
        return Reconstruction(
            images=images.clamp(0, 1),
            status=[Status.TIMEOUT] * observation.victims if known is None else [],
            details={
                name: torch.full((observation.victims,), error)
                for name, error in zip(("held_out_error", "prior_error"), errors, strict=True)
            },
        )

    def _learn(self, known: Imitations, observation: Observation, labelled: bool) -> _Learner:
        prior = class_prior(observation, known.labels if labelled else None)[: len(known.images)]
        return _Learner(
            known.messages,
            known.labels if labelled else None,
            (known.images - (prior if labelled else prior[:1])).flatten(1).double(),
            max(1, round(len(known.images) * (1 - self.held_out))),
        )


_Views = dict[str, Tensor]
"""What kernels compare of M messages: named matrices [M, ...]."""

_WIDTHS: dict[str, tuple[float | None, ...]] = {
    "entries": (None, 0.5, 1.0, 2.0),
    "directions": (0.5, 1.0),
    "norms": (0.3, 1.0),
}
"""Kernels that are tried: a view, and the Gaussian's widths in root mean squared distances (None: linear)."""
_AGREEMENTS = (0.0, 0.5, 1.0)
"""How alike messages of other labels are taken to be."""
_RIDGES = 10.0 ** torch.arange(-8, 5, dtype=torch.float64)
"""Ridges that are tried, in mean eigenvalues of the kernel."""


@dataclass(frozen=True)
class _Standard:
    """What standardises a view of messages, found from those it is learned on."""

    mean: Tensor
    scale: Tensor
    unit: float
    """Mean square of a standardised row; half the mean squared distance between two."""

    @classmethod
    def of(cls, rows: Tensor) -> _Standard:
        spread, mean = torch.std_mean(rows, dim=0, correction=0)
        # Entries that never change say nothing, and what is rounded off would be magnified.
        scale = torch.where(spread > 1e-6 * spread.amax(), 1 / spread, torch.zeros_like(spread))
        return cls(mean, scale, float(((rows - mean) * scale).square().sum(1).mean()) + 1e-30)

    def products(self, left: Tensor, right: Tensor) -> _Products:
        """Compare rows [K, ...] with rows [M, ...]."""
        a, b = ((rows - self.mean) * self.scale / self.unit**0.5 for rows in (left, right))
        inner = a @ b.mT
        return _Products(inner, (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * inner).clamp(min=0))


@dataclass(frozen=True)
class _Products:
    """Inner products and squared distances of K by M messages."""

    inner: Tensor
    apart: Tensor


@dataclass(frozen=True)
class _Kernel:
    """How alike two messages are."""

    view: str
    width: float | None
    agreement: float

    def __call__(self, products: _Products, same: Tensor | None) -> Tensor:
        """Kernel matrix of K by M messages, of whose labels the shares `same` [K, M] agree, where they are known."""
        kernel = products.inner if self.width is None else (-products.apart / (4 * self.width**2)).exp()
        return kernel if same is None else kernel * (self.agreement + (1 - self.agreement) * same)


def _same(left: Tensor, right: Tensor) -> Tensor:
    """Shares [K, M] of ascending labels [K, B] and [M, B] that agree."""
    return (left[:, None] == right[None]).double().mean(-1)


class _Learner:
    """Kernel ridge regression whose kernel and ridge have the least error on messages held out."""

    def __init__(self, views: _Views, labels: Tensor | None, targets: Tensor, cut: int) -> None:
        """Choose on the first `cut` messages against the others; targets are [M, pixels]."""
        self.views, self.labels, self.targets = views, labels, targets
        self.prior_error = self.error = float(targets[cut:].square().mean())
        self.chosen: tuple[_Kernel, float] | None = None
        self.standards = {name: _Standard.of(rows[:cut]) for name, rows in views.items()}
        own = other = None
        if labels is not None:
            own, other = _same(labels[:cut], labels[:cut]), _same(labels[cut:], labels[:cut])
        for view, standard in self.standards.items():
            first, last = views[view][:cut], views[view][cut:]
            inside, outside = standard.products(first, first), standard.products(last, first)
            for width, agreement in itertools.product(_WIDTHS[view], (1.0,) if labels is None else _AGREEMENTS):
                kernel = _Kernel(view, width, agreement)
                self._try(kernel, kernel(inside, own), kernel(outside, other))

    def _try(self, kernel: _Kernel, own: Tensor, other: Tensor) -> None:
        """Take a kernel, its matrices given, and the ridge that is best with it, if they are better."""
        cut = len(own)
        values, vectors = torch.linalg.eigh(own)
        inner, outer = vectors.mT @ self.targets[:cut], other @ vectors
        for share in _RIDGES.tolist():
            ridge = share * float(values.mean())
            answer = (outer / (values.clamp(min=0) + ridge)) @ inner
            error = float((answer - self.targets[cut:]).square().mean())
            if error < self.error:
                self.error, self.chosen = error, (kernel, ridge)

    def answer(self, queries: _Views, labels: Tensor | None) -> Tensor:
        """What is expected beyond the prior after K messages, [K, pixels]; zero where no kernel beats the prior."""
        if self.chosen is None:
            return self.targets.new_zeros(len(queries["norms"]), self.targets.shape[1])
        (kernel, ridge), known = self.chosen, self.labels
        rows, standard = self.views[kernel.view], self.standards[kernel.view]
        own = kernel(standard.products(rows, rows), None if known is None else _same(known, known))
        weights = torch.linalg.solve(own + ridge * torch.eye(len(own)).to(own), self.targets)
        same = None if known is None or labels is None else _same(labels, known)
        answer: Tensor = kernel(standard.products(queries[kernel.view], rows), same) @ weights
        return answer


def _views(messages: Message, hashing: Hashing) -> _Views:
    """Entries [M, features], their directions, and logarithms of the tensors' norms [M, tensors], float64."""
    flat = hashing.flat(messages)
    norms = torch.stack([part.norm(dim=1) for part in flat.split(hashing.lengths, dim=1)], dim=1)
    entries = hashing.shorten(flat)
    directions = entries / entries.norm(dim=1, keepdim=True).clamp(min=1e-30)
    return {"entries": entries, "directions": directions, "norms": norms.clamp(min=1e-30).log()}
