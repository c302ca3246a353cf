"""LOKI: an imprint of its own for every client of a sum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import nn

from gradleak import structure
from gradleak.dataset import Images
from gradleak.defense import Defense
from gradleak.errors import GradleakError
from gradleak.knowledge import Knowledge, Power, Setting
from gradleak.mechanisms import imprint
from gradleak.server import Server


@dataclass(frozen=True, kw_only=True)
class Loki(Server):
    """Copies each client's image to channels of its own before a sparse imprint, so that a sum keeps clients apart.

    A frozen convolution with identity kernels, at other channels for every client, feeds rows that read all channels
    alike; the gradient of a client's columns is then its own, whatever is summed. References: Zhao, Sharma, Elkordy,
    Ezzeldin, Avestimehr, Bagchi, S&P 2024, arXiv:2303.12233. Deviations: a further channel with a constant 1 tells the
    scale of each image, as biases are summed over clients; a random reading of zero mean for the mean intensity; the
    block adds to the image.
    """

    surface = Power.ARCHITECTURE
    needs = Knowledge(auxiliary=True)
    reference = "arXiv:2303.12233"

    bins: Annotated[int, Ge(2)] = 256
    """Four times the batch in the paper."""
    clients: Annotated[int, Ge(1)] = 10
    """Clients in a sum that are kept apart."""
    reading: imprint.Reading = "random"
    scale: Annotated[float, Gt(0)] = 500.0
    """Of the identity kernels; the weights' gradients are so many times those of an imprint."""
    gain: Annotated[float, Gt(0)] = 1e-3
    """Size of the columns back."""

    @property
    def per_client(self) -> bool:
        """The kernels are elsewhere for every client."""
        return True

    def tamper(
        self, module: nn.Module, auxiliary: Images | None, generator: torch.Generator, client: int = 0
    ) -> nn.Module:
        """Return the model with the block for one client."""
        assert auxiliary is not None
        shape = structure.shape_of(module)
        if shape is None or client >= self.clients:
            what = f"client {client} of a sum" if shape else "a model of images of unknown shape"
            raise GradleakError(f"server 'loki': {what} (allowed: {self.clients} clients)")
        layer = imprint.layer_named(module, "input", "server 'loki'")
        images = auxiliary.images.double().flatten(1)
        row = imprint.direction(self.reading, images.shape[1], generator)
        edges = imprint.edges_of(images @ row, self.bins, "normal")
        signs = torch.randint(2, (images.shape[1],), generator=generator, dtype=torch.float64) * 2 - 1
        back = self.gain * signs
        block = imprint.Apart(row, edges, back, shape, client, self.clients, self.scale)
        return imprint.placed_before(module, layer, block)

    def unsuited(self, module: nn.Module, setting: Setting, defense: Defense) -> str | None:
        """It needs channels for all clients, and images at the first layer."""
        if defense.cohort > self.clients:
            return f"its channels are for {self.clients} clients; {defense.cohort} are in a sum"
        return None

    def expected(self, setting: Setting, clients: int) -> float | None:
        """Return n (1 - 1/K)^(n - 1) for n images of a client, however many clients are in the sum."""
        return imprint.expected(setting.batch_size, self.bins)
