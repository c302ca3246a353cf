"""Imprint: a block before a layer, whose rows bin the images by one number each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt
from torch import nn

from gradleak.dataset import Images
from gradleak.knowledge import Knowledge, Power, Setting
from gradleak.mechanisms import imprint
from gradleak.server import Server


@dataclass(frozen=True, kw_only=True)
class ImprintServer(Server):
    """Puts K rows of one reading h before a layer, with biases at the K quantiles of h, and equal columns back.

    Row i sees the images with h above its edge (cumulative), so that (dW_i - dW_{i+1}) / (db_i - db_{i+1}) is an image
    that is alone between two edges. The sparse variant cuts the identity to a bin, and so survives local steps.
    Expected exact images: n (1 - 1/K)^(n - 1). One-shot reads a single one of K virtual bins (K: all images of the
    round) by two rows. References: Fowl, Geiping, Czaja, Goldblum, Goldstein, ICLR 2022, arXiv:2110.13057. Deviations:
    the law of h is fitted to public images instead of assumed; the block adds to its input and so leaves the model
    nearly as accurate; the way back has random signs, which no normalisation layer removes. A mean of pixels with few
    grey levels ties, so that its count falls short of the formula: a random reading of zero mean does not.
    """

    surface = Power.ARCHITECTURE
    needs = Knowledge(auxiliary=True)
    reference = "arXiv:2110.13057"

    bins: Annotated[int, Ge(2)] = 128
    """K; of the one-shot variant, virtual ones."""
    variant: Literal["cumulative", "sparse", "one-shot"] = "cumulative"
    reading: imprint.Reading = "random"
    law: Literal["normal", "laplace", "empirical"] = "normal"
    """Of the reading."""
    before: str = "input"
    """Layer that the block is put before; input is the first one that is called."""
    gain: Annotated[float, Gt(0)] = 1e-3
    """Size of the columns back: what the block changes of the model, and how large its gradient is."""

    def tamper(
        self, module: nn.Module, auxiliary: Images | None, generator: torch.Generator, client: int = 0
    ) -> nn.Module:
        """Return the model with the block."""
        assert auxiliary is not None
        layer = imprint.layer_named(module, self.before, "server 'imprint': before")
        like = next(module.parameters())
        with torch.no_grad():
            inputs = imprint.inputs_at(module, layer, auxiliary.images.to(like)).double().cpu()
        row = imprint.direction(self.reading, inputs.shape[1], generator)
        edges = imprint.edges_of(inputs @ row, self.bins, self.law)
        closed = self.variant == "one-shot"
        if closed:
            middle = self.bins // 2
            edges = edges[middle : middle + 2]
        signs = torch.randint(2, (inputs.shape[1],), generator=generator, dtype=torch.float64) * 2 - 1
        block = imprint.Imprint(row, edges, self.gain * signs, self.variant == "sparse", closed)
        return imprint.placed_before(module, layer, block)

    def expected(self, setting: Setting, clients: int) -> float | None:
        """Return n (1 - 1/K)^(nC - 1) for n images of each of C clients; one-shot reads one bin.

        None for rows that see others' bins, where local steps move them.
        """
        if self.variant != "sparse" and setting.local_lr is not None and setting.local_steps > 1:
            return None
        found = imprint.expected(setting.batch_size * clients, self.bins, 1 if self.variant == "one-shot" else None)
        return found / clients
