"""Images from weighted means of them: the posterior mode given the weights, pixel by pixel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..dataset import Images

_EXACT = 1e-6
"""Standard deviation of a mean's pixels where the weights are known, from rounding."""
_SPLIT = 0.1
"""The same where images share a label, so that their weights are known only together."""
_LEVEL = 1e-4
"""How far from a grey level, or out of the box, rounding may bring a pixel."""

_SPREAD = 2e-3
"""Variance added in every direction to that of a class's images."""
_LARGEST = 1024
"""Pixels of an image above which they are taken to be independent."""
_SWEEPS = 6
"""How often pixels are chosen."""
_RARE = 25.0
"""Most that a pixel's distance from its class may cost, as its square over the variance: five deviations, so that one
pixel that no public image has does not outweigh all others."""


@dataclass(frozen=True)
class Mixture:
    """How B images of P pixels are mixed, and what each was likely to be before: a Gaussian of its class."""

    weights: Tensor
    """[B, B], a row a mean."""
    mean: Tensor
    """[B, P]."""
    precision: Tensor
    """[B, P, P]; of the pixels alone, [B, P, 1], where no images are public or these are too large."""
    noise: float
    """Standard deviation of what the weights leave unexplained."""
    levels: Tensor | None
    """Grey levels of public images, ascending, if few."""

    @classmethod
    def of(cls, soft: Tensor, labels: Tensor, pixels: int, public: Images | None) -> Mixture:
        """Read the weights from mixed labels [B, classes] of images with labels [B].

        Images that share a label are taken to share their weight equally.
        """
        same = labels[:, None] == labels[None]
        weights = soft.double()[:, labels] / same.sum(0)
        noise = _SPLIT if bool((same.sum(0) > 1).any()) else _EXACT
        if public is None:
            # Grey, give or take half the range: a precision of 4.
            half = weights.new_full((len(labels), pixels), 0.5)
            return cls(weights, half, 8 * half[..., None], noise, None)
        images = public.images.to(weights).flatten(1)
        parts = {}
        for label in labels.unique().tolist():
            own = images[public.labels.to(labels.device) == label]
            parts[label] = _gaussian(own if len(own) > 1 else images)
        mean, precision = (torch.stack(rows) for rows in zip(*map(parts.__getitem__, labels.tolist()), strict=True))
        values = images.unique()
        return cls(weights, mean, precision, noise, values if len(values) <= 256 else None)

    def alone(self, images: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and precision of every pixel [B, P]; given all the others, if the images [B, P] are known so far."""
        if self.precision.shape[2] == 1:
            return self.mean, self.precision[..., 0]
        own = self.precision.diagonal(dim1=1, dim2=2)
        if images is None:
            return self.mean, 1 / torch.linalg.inv(self.precision).diagonal(dim1=1, dim2=2)
        pull = (self.precision @ (images - self.mean)[..., None])[..., 0] / own
        return images - pull, own


def _gaussian(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [P] and precision [P, P] or [P, 1] of images [M, P]."""
    if rows.shape[1] > _LARGEST:
        return rows.mean(0), 1 / (rows.var(0)[:, None] + _SPREAD)
    spread = _SPREAD * torch.eye(rows.shape[1]).to(rows)
    return rows.mean(0), torch.linalg.inv(rows.mT.cov() + spread)


def unmix(candidates: Tensor, mixture: Mixture) -> Tensor:
    """Return the images [B, C, H, W] whose weighted means are the likeliest of K candidates, chosen pixel by pixel.

    Each pixel is chosen anew by what its neighbours were taken to be.

    Args:
        candidates: [K, B, C, H, W]; one where the means are known.
        mixture: of the images.
    """
    means = candidates.double().flatten(2)
    chosen = None
    # Where weights are guessed, what errs at one pixel would spread to the others.
    for _ in range(_SWEEPS if mixture.noise == _EXACT and len(means) > 1 else 1):
        chosen = _choose(means, mixture, *mixture.alone(chosen))
    assert chosen is not None
    if mixture.levels is not None:
        near = _nearest(chosen, mixture.levels)
        chosen = torch.where((chosen - near).abs() < _LEVEL, near, chosen)
    return chosen.view(candidates.shape[1:]).clamp(0, 1).to(candidates)


def _choose(means: Tensor, mixture: Mixture, expected: Tensor, precision: Tensor) -> Tensor:
    """Likeliest pixels [B, P] of candidates [K, B, P] for their means, each with a Gaussian [B, P] of its own."""
    weights, strength = mixture.weights, mixture.noise**-2
    normal = strength * weights.mT @ weights + torch.diag_embed(precision.mT)
    right = strength * torch.einsum("ij,kip->pjk", weights, means) + (precision * expected).mT[..., None]
    pixels = torch.linalg.solve(normal, right).permute(2, 1, 0)
    cost = strength * (means - weights @ pixels).square().sum(1)
    # A pixel that public images never show is unlikely, not impossible.
    cost = cost + ((pixels - expected).square() * precision).clamp(max=_RARE).sum(1)
    cost = cost + (pixels - pixels.clamp(0, 1)).abs().amax(1) / _LEVEL
    if mixture.levels is not None and mixture.noise == _EXACT:
        cost = cost + (pixels - _nearest(pixels, mixture.levels)).abs().amax(1) / _LEVEL
    best = cost.argmin(0)
    chosen: Tensor = pixels.gather(0, best.expand(1, *pixels.shape[1:]))[0]
    return chosen


def _nearest(pixels: Tensor, levels: Tensor) -> Tensor:
    between = (levels[1:] + levels[:-1]) / 2
    return levels[torch.bucketize(pixels.contiguous(), between)]
