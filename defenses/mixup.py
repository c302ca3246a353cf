"""Mixup: clients train on weighted means of the images of a batch, with means of their labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from gradleak.dataset import Images
from gradleak.errors import GradleakError
from gradleak.mechanisms.encoding import Encoding, Latents
from gradleak.mechanisms.unmixing import Mixture, unmix


@dataclass(frozen=True, kw_only=True)
class Mixup(Encoding):
    """Mixes each image with `count` - 1 others of its batch, drawn by random orders of the batch.

    References: Zhang et al., arXiv:1710.09412; as a defense with several images, Huang et al., arXiv:2112.00059.
    Coefficients are Dirichlet(3, 1, …, 1), drawn anew while one exceeds `largest`. Mixed labels are the
    weakness: whoever finds them (the last layer's gradient shows them) knows the mixing and solves for the images.
    """

    reference = "arXiv:2112.00059"
    mixes = True
    counter_attacks = ("encoding-inversion", "decoded-spear")

    count: Annotated[int, Ge(2)] = 4
    """Images in a mean; an image may be drawn twice."""
    largest: Annotated[float, Gt(0.5), Le(1)] = 0.65
    """Upper bound of a coefficient."""

    def draw(self, images: Tensor, generator: torch.Generator) -> Latents:
        """Draw the mixing matrix [B, B], rows summing to 1.

        Raises:
            GradleakError: a batch of one, which has nothing to mix with.
        """
        size = len(images)
        if size < 2:
            raise GradleakError(
                "mixup and instahide: a batch of 1 has no other image to mix with; set batch_size to 2 or more"
            )
        mixing = torch.zeros(size, size, dtype=torch.float64)
        coefficients = torch.stack([self._coefficients(generator) for _ in range(size)])
        rows = torch.arange(size)
        for index in range(self.count):
            partner = torch.randperm(size, generator=generator) if index else rows
            mixing[rows, partner] += coefficients[:, index]
        return {"mixing": mixing.to(images)}

    def apply(self, images: Tensor, targets: Tensor, latents: Latents) -> tuple[Tensor, Tensor]:
        """Mix images and class probabilities."""
        mixing = latents["mixing"]
        return torch.einsum("ij,jchw->ichw", mixing, images), mixing @ targets

    def unknowns(self, batch_size: int, shape: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
        """One number for each pair of images."""
        return {"mixing": (batch_size, batch_size)}

    def relax(self, numbers: Latents) -> Latents:
        """Softmax over the images mixed, with an advantage for an image's own row."""
        logits = numbers["mixing"]
        return {"mixing": (logits + torch.eye(len(logits), dtype=logits.dtype, device=logits.device)).softmax(-1)}

    def recover(self, encoded: Tensor, soft: Tensor, labels: Tensor, public: Images | None) -> Tensor | None:
        """Solve for the images: mixed labels show how much of each class is in a mean."""
        return unmix(encoded[None], Mixture.of(soft, labels, encoded[0].numel(), public))

    def _coefficients(self, generator: torch.Generator) -> Tensor:
        while True:
            # Gamma(k, 1) for whole k is the sum of k exponentials; normalised Gammas are a Dirichlet.
            drawn = -torch.rand(self.count + 2, generator=generator, dtype=torch.float64).clamp(min=1e-300).log()
            gammas = torch.cat([drawn[:3].sum()[None], drawn[3:]])
            weights = gammas / gammas.sum()
            if float(weights.max()) <= self.largest:
                return weights
