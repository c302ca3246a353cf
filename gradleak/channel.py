"""What a client computes and sends, as pure functions: clients call them, and so do attackers who imitate clients.

No data comes from here: the images are the caller's, a client's own or an attacker's guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.func import vmap

from .defense import Defense, Memory, Message, Public
from .engine import answers
from .update import (
    Differentiate,
    LocalTraining,
    Network,
    Update,
    by_autograd,
    by_transform,
    local_update,
    loss_after,
    stack,
)


@dataclass(frozen=True)
class Batch:
    """What one client trains on: its images as the defense encodes them, and the model's private randomness."""

    images: Tensor
    """[B, C, H, W]."""
    targets: Tensor
    """Class probabilities, [B, classes]."""
    buffers: dict[str, Tensor]
    """Private randomness of the model, [B, ...]."""
    order: Tensor | None = None
    """Images that each local step uses, [steps, width], where the client draws it."""


@dataclass(frozen=True)
class Channel:
    """The way from a client's batch to its message in one round."""

    network: Network
    """As the clients run it."""
    defense: Defense
    public: Public
    """Public randomness of the round."""
    training: LocalTraining

    @classmethod
    def drawn(
        cls, network: Network, defense: Defense, training: LocalTraining, batch_size: int, generator: torch.Generator
    ) -> Channel:
        """Return the channel of a new round, whose public randomness is drawn for batches of `batch_size` images.

        Raises:
            PluginError: the defense drew from the global generator.
        """
        with answers.draws_its_own(defense, "public"):
            public = defense.public(dict(network.parameters), batch_size, generator)
        return cls(network, defense, public, training)

    def batch(self, images: Tensor, targets: Tensor, generator: torch.Generator) -> Batch:
        """Encode images [B, C, H, W] and class probabilities [B, classes]; draw the model's private randomness.

        Raises:
            PluginError: the defense drew from the global generator.
        """
        with answers.draws_its_own(self.defense, "encode"):
            inputs, soft = self.defense.encode(images, targets, generator)
        with answers.draws_its_own(self.defense, "private_buffers"):
            buffers = self.defense.private_buffers(self.network.module, inputs, generator)
        return Batch(inputs, soft, buffers, self.training.drawn(len(inputs), generator))

    def update(self, batch: Batch) -> Update:
        """Return the update before the defense acts on it, without a graph."""
        update = self._train(batch.images, batch.targets, batch.buffers, batch.order, by_autograd)
        return {name: tensor.detach() for name, tensor in update.items()}

    def updates(self, batches: Sequence[Batch]) -> list[Update]:
        """Return the updates of several batches, computed in one stack: faster, and equal up to rounding."""
        orders = [batch.order for batch in batches if batch.order is not None]

        def train(images: Tensor, targets: Tensor, buffers: dict[str, Tensor], order: dict[str, Tensor]) -> Update:
            return self._train(images, targets, buffers, order.get("order"), by_transform)

        stacked = vmap(train)(
            torch.stack([batch.images for batch in batches]),
            torch.stack([batch.targets for batch in batches]),
            stack([batch.buffers for batch in batches]),
            {"order": torch.stack(orders)} if orders else {},
        )
        return [{name: tensor[index] for name, tensor in stacked.items()} for index in range(len(batches))]

    def release(
        self, batch: Batch, update: Update, generator: torch.Generator, memory: Memory = None
    ) -> tuple[Message, Memory]:
        """Return the message of an update without a graph, and what the client keeps for its next.

        Raises:
            PluginError: the defense drew from the global generator, or its message is no dict of tensors.
        """
        loss = loss_after(self.network, batch.images, batch.targets, batch.buffers)
        hooks = ("protect", "release", "release_next")
        with answers.draws_its_own(self.defense, *hooks):
            message, kept = self.defense.release_next(update, self.public, generator, loss, memory)
        answers.tensors(message, self.defense, *hooks)
        return {name: tensor.detach() for name, tensor in message.items()}, kept

    def message(self, images: Tensor, targets: Tensor, generator: torch.Generator) -> Message:
        """Return the first message of a client with these images [B, C, H, W] and targets [B, classes]."""
        batch = self.batch(images, targets, generator)
        return self.release(batch, self.update(batch), generator)[0]

    def _train(
        self,
        images: Tensor,
        targets: Tensor,
        buffers: dict[str, Tensor],
        order: Tensor | None,
        differentiate: Differentiate,
    ) -> Update:
        per_example = partial(self.defense.per_example, public=self.public)
        return local_update(
            self.network,
            images,
            targets,
            self.training,
            per_example=per_example if self.defense.per_example_gradients else None,
            buffers=buffers,
            order=order,
            differentiate=differentiate,
        )
