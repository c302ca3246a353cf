"""What public labelled images tell before any message: class means, a Gaussian of each class, grey levels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..dataset import Images
from ..seeds import Generators

_FINEST = 256
"""More values than these are no alphabet."""


@dataclass(frozen=True)
class Gaussian:
    """A Gaussian of each class's images: some principal directions, and a spread that all directions share."""

    mean: Tensor
    """[classes, n]."""
    basis: Tensor
    """Principal directions, [classes, k, n]."""
    shrink: Tensor
    """One minus the ratio of the deviation off the directions to that along each, [classes, k]."""
    deviation: float
    """Off the directions."""

    def facts(self, labels: Tensor) -> dict[str, Tensor]:
        """What belongs to labels [N, B], stacked over victims; what `whiten` reads."""
        deviation = self.mean.new_full((len(labels),), self.deviation)
        own = {"mean": self.mean[labels], "basis": self.basis[labels], "shrink": self.shrink[labels]}
        return own | {"deviation": deviation}


def whiten(images: Tensor, facts: dict[str, Tensor]) -> Tensor:
    """Differences [B * n] of one victim's images [B, C, H, W] from their classes' means, times the precision's root."""
    apart = images.flatten(1) - facts["mean"]
    along = (facts["basis"] @ apart[:, :, None])[:, :, 0] * facts["shrink"]
    rest = apart - (along[:, None] @ facts["basis"])[:, 0]
    return rest.flatten() / facts["deviation"]


def gaussian(public: Images, classes: int, spread: float = 2e-3, rank: int = 128) -> Gaussian:
    """Fit a Gaussian to each class's images.

    Args:
        public: labelled images.
        classes: number of classes; one without images gets those of all.
        spread: variance added in every direction, (pixel value)^2; its root is below the digits' grey level, 1 / 16.
        rank: most principal directions kept of a class.
    """
    parts = [_fit(rows.flatten(1).double(), spread, rank) for rows in _by_class(public, classes)]
    most = max(len(shrink) for _, _, shrink in parts)
    mean = torch.stack([mean for mean, _, _ in parts])
    basis = mean.new_zeros(classes, most, mean.shape[1])
    shrink = mean.new_zeros(classes, most)
    for index, (_, directions, shares) in enumerate(parts):
        basis[index, : len(directions)] = directions
        shrink[index, : len(shares)] = shares
    return Gaussian(mean, basis, shrink, spread**0.5)


def _fit(rows: Tensor, spread: float, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    mean = rows.mean(0)
    _, sizes, directions = torch.linalg.svd(rows - mean, full_matrices=False)
    kept = slice(0, min(rank, len(rows) - 1))
    variances = sizes[kept].square() / max(1, len(rows) - 1)
    return mean, directions[kept], 1 - (spread / (variances + spread)).sqrt()


def class_means(public: Images, classes: int) -> Tensor:
    """Mean image of every class, [classes, C, H, W]; of all images where a class has none."""
    return torch.stack([rows.mean(0) for rows in _by_class(public, classes)])


def draw(public: Images, classes: int, labels: Tensor, count: int, generator: Generators) -> Tensor:
    """Batches of public images with given labels [N, B], so many for each victim: [count, N, B, C, H, W].

    Each position runs through a random order of its class, so that no image is met twice before all are.
    """
    groups = _by_class(public, classes)
    drawn = []
    for position in range(labels.shape[1]):
        order = generator.child("public", position).uniform(max(len(rows) for rows in groups)).cpu()
        rows = []
        for victim, label in enumerate(labels[:, position].tolist()):
            images = groups[label]
            turn = order[victim, : len(images)].argsort()
            rows.append(images[turn[torch.arange(count) % len(images)]])
        drawn.append(torch.stack(rows, dim=1))
    return torch.stack(drawn, dim=2)


def first(public: Images, classes: int, labels: Tensor, count: int) -> Tensor:
    """The first public images with given labels [N, B], others at every place of a batch: [count, N, B, C, H, W]."""
    groups, size = _by_class(public, classes), labels.shape[1]
    rows = [
        groups[label][(torch.arange(count) * size + place) % len(groups[label])]
        for victim in labels.tolist()
        for place, label in enumerate(victim)
    ]
    images = torch.stack(rows, dim=1)
    return images.view(count, *labels.shape, *images.shape[2:])


def levels(public: Images) -> Tensor | None:
    """Pixel values that public images have, sorted; None if they are too many to be an alphabet."""
    values = public.images.unique()
    return values if len(values) <= _FINEST else None


def snap(images: Tensor, values: Tensor) -> Tensor:
    """Images with every pixel at its nearest of some sorted values."""
    between = (values[1:] + values[:-1]) / 2
    return values[torch.bucketize(images.contiguous(), between)]


def _by_class(public: Images, classes: int) -> list[Tensor]:
    found = [public.images[public.labels == label] for label in range(classes)]
    return [rows if len(rows) else public.images for rows in found]
