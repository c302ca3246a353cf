"""The victim's side: a client trains on its batch under a defense and sends a message.

Only this module and `evaluate` may hold a victim's images.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from . import batch_statistics, seeds
from .defense import Defense, Message, Public
from .errors import GradleakError
from .threat import BatchNorm, Setting
from .update import Network, Update, local_update, one_hot, stack


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


def client_network(module: nn.Module, defense: Defense, setting: Setting) -> Network:
    """Return the network that clients run, from the undefended model: the defense's change, mode and precision."""
    return freeze(defense.prepare_model(module), defense, setting)


def freeze(prepared: nn.Module, defense: Defense, setting: Setting) -> Network:
    """Return the network that clients run, from a model that the defense has prepared.

    Raises:
        GradleakError: clipping per example with batch normalisation on the batch, which mixes examples.
    """
    if defense.per_example_gradients and setting.mode == "train" and _mixes(prepared):
        raise GradleakError(
            f"setting {setting.name!r}: mode 'train' mixes the examples of a batch in batch normalisation, "
            "but the defense clips each example's gradient; use mode 'eval' or a model without it"
        )
    return Network.of(copy.deepcopy(prepared).to(setting.dtype), setting.mode)


def send(
    network: Network,
    images: Tensor,
    labels: Tensor,
    classes: int,
    defense: Defense,
    setting: Setting,
    round_seed: int,
    client_seeds: list[int],
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
    """
    template = {name: tensor for name, tensor in network.parameters.items()}
    public = defense.public(template, setting.batch_size, torch.Generator().manual_seed(round_seed))
    per_example = partial(defense.per_example, public=public) if defense.per_example_gradients else None
    started = time.perf_counter()
    messages, updates, drawn, encoded, soft, seen = [], [], [], [], [], []
    for batch, classes_of, seed in zip(images, labels, client_seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)
        inputs, targets = defense.encode(batch, one_hot(classes_of, classes, batch.dtype), generator)
        buffers = defense.private_buffers(network.module, inputs, generator)
        update = local_update(
            network, inputs, targets, setting.local_training, per_example=per_example, buffers=buffers
        )
        update = {name: tensor.detach() for name, tensor in update.items()}
        loss = partial(_loss_after, network, inputs, targets, buffers)
        messages.append({name: t.detach() for name, t in defense.release(update, public, generator, loss).items()})
        updates.append(update)
        drawn.append(buffers)
        encoded.append(inputs)
        soft.append(targets)
        if setting.grants.batch_norm is BatchNorm.BATCH:
            with torch.no_grad():
                seen.append(batch_statistics.of_batch(network, inputs, buffers))
    seconds = (time.perf_counter() - started) / len(images)
    return Sent(
        message=stack(messages),
        public=public,
        update=stack(updates),
        buffers=stack(drawn),
        images=torch.stack(encoded),
        targets=torch.stack(soft),
        statistics=stack(seen) if seen else {},
        bytes=[len(defense.pack(message, public)) for message in messages],
        dense_bytes=4 * sum(tensor.numel() for tensor in template.values()),
        seconds=seconds,
    )


def seeds_for(victims: list[int], *context: object) -> list[int]:
    """Seed of each client's private randomness; the attack is not part of it, so all attacks see one message."""
    return [seeds.derive("client", *context, victim) for victim in victims]


def _loss_after(
    network: Network, images: Tensor, targets: Tensor, buffers: dict[str, Tensor], step: Update
) -> Tensor:
    with torch.no_grad():
        parameters = {name: tensor + step[name] for name, tensor in network.parameters.items()}
        return network.loss(images, targets, parameters, buffers)


def _mixes(module: nn.Module) -> bool:
    return any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in module.modules())
