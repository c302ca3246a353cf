"""InstaHide: mixup, and a random sign for every pixel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.dataset import Images
from gradleak.defenses.mixup import Mixup
from gradleak.mechanisms.encoding import Latents
from gradleak.mechanisms.unmixing import Mixture, unmix

_MOST = 8
"""Images of a batch whose signs can all be tried."""


@dataclass(frozen=True, kw_only=True)
class InstaHide(Mixup):
    """Mixes the images of a batch and flips the sign of every pixel, as 2x - 1 in [-1, 1], by a fair coin.

    References: Huang, Song, Li, Arora, arXiv:2010.02772; the options are those of Huang et al., arXiv:2112.00059.
    Absolute values stay as they are, which many encodings of the same images give away (Carlini et al.,
    arXiv:2011.05315). An attack on one message has the range of pixels, public images and their grey levels to choose
    signs by, once it knows the mixing.
    """

    reference = "arXiv:2010.02772"

    def draw(self, images: Tensor, generator: torch.Generator) -> Latents:
        """Draw the mixing matrix, and signs [B, C, H, W]."""
        mixing = super().draw(images, generator)
        coins = torch.rand(images.shape, generator=generator, dtype=torch.float64) < 0.5
        return {**mixing, "signs": 1 - 2 * coins.to(images)}

    def apply(self, images: Tensor, targets: Tensor, latents: Latents) -> tuple[Tensor, Tensor]:
        """Mix, and flip signs."""
        mixed, soft = super().apply(images, targets, latents)
        return 0.5 + latents["signs"] * (mixed - 0.5), soft

    def recover(self, encoded: Tensor, soft: Tensor, labels: Tensor, public: Images | None) -> Tensor | None:
        """Solve for the images under every pattern of signs, pixel by pixel.

        Needs public images, as x and 1 - x have the same encodings, and no more than eight images.
        """
        if len(encoded) > _MOST or public is None:
            return None
        ones = torch.tensor([1.0, -1.0]).to(encoded)
        patterns = torch.cartesian_prod(*[ones] * len(encoded)).view(-1, len(encoded), 1, 1, 1)
        return unmix(0.5 + patterns * (encoded - 0.5), Mixture.of(soft, labels, encoded[0].numel(), public))

    def encode_test(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Flip signs, which the model was trained on; nothing is mixed."""
        coins = torch.rand(images.shape, generator=generator, dtype=torch.float64) < 0.5
        return 0.5 + (1 - 2 * coins.to(images)) * (images - 0.5)

    def unknowns(self, batch_size: int, shape: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
        """One number for each pair of images and for each pixel."""
        return {**super().unknowns(batch_size, shape), "signs": (batch_size, *shape)}

    def relax(self, numbers: Latents) -> Latents:
        """Softmax over the images mixed; signs relaxed to (-1, 1)."""
        return {**super().relax(numbers), "signs": numbers["signs"].tanh()}
