"""The victim's side: a client trains on its batch under a defense and sends a message.

Only this module and `evaluate` may hold a victim's images.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .. import seeds, structure
from ..channel import Channel
from ..defense import Defense, Memory, Message, Public
from ..errors import GradleakError
from ..mechanisms import batch_statistics
from ..threat import BatchNorm, Setting
from ..update import Network, Update, copied, one_hot, stack
from .trainable import choose


@dataclass(frozen=True)
class Sent:
    """What N clients sent, and what stays with them."""

    message: Message
    """[N, ...]; all that leaves a client."""
    public: Public
    """Public randomness of the round."""
    update: Update
    """The updates before the defense, [N, ...]; private."""
    buffers: dict[str, Tensor]
    """The clients' private randomness in the model, [N, ...]; private."""
    images: Tensor
    """What the clients trained on, [N, B, C, H, W]: their images, or the defense's encoding; private."""
    targets: Tensor
    """Class probabilities they trained on, [N, B, classes]; private."""
    statistics: dict[str, Tensor]
    """What batch normalisation saw of these images, [N, channels]; private unless the setting grants it."""
    bytes: list[int]
    """Encoded length of each message."""
    dense_bytes: int
    """Length of a dense float32 update."""
    seconds: float
    """Mean time of a client, defense included."""
    memories: list[Memory]
    """What each client keeps for its next message; private."""
    drew: bool
    """Whether any client drew private randomness: another draw would have made another message."""

    def of_first(self, size: int) -> Sent:
        """Return it as if only the first `size` images of each row had made the message."""
        return replace(
            self,
            buffers={name: tensor[:, :size] for name, tensor in self.buffers.items()},
            images=self.images[:, :size],
            targets=self.targets[:, :size],
        )


def client_network(module: nn.Module, defense: Defense, setting: Setting) -> Network:
    """Return the network that clients run, from the undefended model: the defense's change, mode and precision."""
    prepared, shape = defense.prepare_model(module), structure.shape_of(module)
    if shape is not None:
        structure.mark(prepared, shape)
    return freeze(prepared, defense, setting)


def freeze(prepared: nn.Module, defense: Defense, setting: Setting) -> Network:
    """Return the network that clients run, from a model that the defense has prepared.

    Raises:
        GradleakError: clipping per example with batch normalisation on the batch, which mixes examples, or
            `trainable` names what is not there.
    """
    if defense.per_example_gradients and setting.mode == "train" and _mixes(prepared):
        raise GradleakError(
            f"setting {setting.name!r}: mode 'train' mixes the examples of a batch in batch normalisation, "
            "but the defense clips each example's gradient; use mode 'eval' or a model without it"
        )
    return Network.of(choose(copied(prepared), setting.trainable).to(setting.dtype), setting.mode, setting.trains)


def send(
    network: Network,
    images: Tensor,
    labels: Tensor,
    classes: int,
    defense: Defense,
    setting: Setting,
    round_seed: int,
    client_seeds: list[int],
    memories: Sequence[Memory] | None = None,
    together: bool = False,
) -> Sent:
    """Compute the message of every client, each on its own.

    Args:
        network: from `client_network`.
        images: [N, B, C, H, W] in [0, 1].
        labels: [N, B].
        classes: number of classes.
        defense: the defense that all clients run.
        setting: how they train.
        round_seed: seed of the round's public randomness.
        client_seeds: seed of each client's private randomness.
        memories: what each client kept from its last message; by default this is their first.
        together: compute the clients' updates in one stack, which is faster and equal up to rounding.
    """
    channel = Channel.drawn(
        network, defense, setting.local_training, setting.batch_size, torch.Generator().manual_seed(round_seed)
    )
    started = time.perf_counter()
    generators = [torch.Generator().manual_seed(seed) for seed in client_seeds]
    batches = [
        channel.batch(rows, one_hot(classes_of, classes, rows.dtype), generator)
        for rows, classes_of, generator in zip(images, labels, generators, strict=True)
    ]
    updates = channel.updates(batches) if together else [channel.update(batch) for batch in batches]
    messages, kept, seen = [], [], []
    for index, (batch, generator) in enumerate(zip(batches, generators, strict=True)):
        memory = None if memories is None else memories[index]
        message, memory = channel.release(batch, updates[index], generator, memory)
        messages.append(message)
        kept.append(memory)
        if setting.grants.batch_norm is BatchNorm.BATCH:
            with torch.no_grad():
                seen.append(batch_statistics.of_batch(network, batch.images, batch.buffers))
    seconds = (time.perf_counter() - started) / len(images)
    return Sent(
        message=stack(messages),
        public=channel.public,
        update=stack(updates),
        buffers=stack([batch.buffers for batch in batches]),
        images=torch.stack([batch.images for batch in batches]),
        targets=torch.stack([batch.targets for batch in batches]),
        statistics=stack(seen) if seen else {},
        bytes=[len(defense.pack(message, channel.public)) for message in messages],
        dense_bytes=4 * sum(tensor.numel() for tensor in network.parameters.values()),
        seconds=seconds,
        memories=kept,
        drew=any(_drew(generator, seed) for generator, seed in zip(generators, client_seeds, strict=True)),
    )


def aggregated(sent: Sent, clients: int) -> Sent:
    """Return what secure aggregation leaves: of every `clients` consecutive messages their mean, as one.

    Images, targets and buffers of the clients are put one after another, so that a row is one of N / clients
    victims with a batch of all their images; bytes and memories are those of the first client.
    """
    if clients == 1:
        return sent

    def groups(tensor: Tensor) -> Tensor:
        return tensor.reshape(-1, clients, *tensor.shape[1:])

    return replace(
        sent,
        message={name: groups(tensor).mean(1) for name, tensor in sent.message.items()},
        update={name: groups(tensor).mean(1) for name, tensor in sent.update.items()},
        statistics={name: groups(tensor).mean(1) for name, tensor in sent.statistics.items()},
        buffers={name: groups(tensor).flatten(1, 2) for name, tensor in sent.buffers.items()},
        images=groups(sent.images).flatten(1, 2),
        targets=groups(sent.targets).flatten(1, 2),
        bytes=sent.bytes[::clients],
        memories=sent.memories[::clients],
    )


def seeds_for(victims: list[int], *context: object, clients: int = 1) -> list[int]:
    """Seed of each client's private randomness; the attack is not part of it, so all attacks see one message.

    With `clients` above 1 a victim's seed is followed by those of the others in its sum.
    """
    own = [seeds.derive("client", *context, victim) for victim in victims]
    return [seeds.derive("other client", seed, other) if other else seed for seed in own for other in range(clients)]


def _drew(generator: torch.Generator, seed: int) -> bool:
    return not torch.equal(generator.get_state(), torch.Generator().manual_seed(seed).get_state())


def _mixes(module: nn.Module) -> bool:
    return any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in module.modules())
