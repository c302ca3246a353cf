"""Messages of public images, made as a client makes its own: what learned and statistical attacks compare with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak import structure
from gradleak.channel import Channel
from gradleak.dataset import Images
from gradleak.defense import Message
from gradleak.errors import GradleakError
from gradleak.search import labels as label_rules
from gradleak.search.public_images import class_means
from gradleak.threat import Observation, Setting
from gradleak.update import one_hot, stack


@dataclass(frozen=True)
class Imitations:
    """What was read of M messages of batches of public images."""

    messages: dict[str, Tensor]
    """[M, ...]."""
    images: Tensor
    """[M, B, C, H, W], sorted by label."""
    labels: Tensor
    """[M, B], ascending."""


def imitate(
    observation: Observation, count: int, stream: torch.Generator, read: Callable[[Message], dict[str, Tensor]]
) -> Imitations | None:
    """Return what is read of the messages of `count` random batches, sent as a client would; None if time runs out.

    `read` gets a message [1, ...], so that not all have to be kept. Where there are no more public images than
    messages and batches of one, every image is taken in turn. Where the round's public randomness is not known, each
    message has its own.
    """
    assert observation.auxiliary is not None and observation.view is not None
    rows, images, labels = [], [], []
    for index in _batches(observation.auxiliary, count, observation.batch_size, stream):
        if observation.compute.expired:
            return None
        order = observation.auxiliary.labels[index].argsort(stable=True)
        picked = observation.auxiliary[index[order]]
        batch = picked.images.to(observation.device, observation.dtype)
        targets = one_hot(picked.labels.to(observation.device), observation.classes, observation.dtype)
        channel = channel_of(observation, len(batch) // observation.view.defense.cohort, stream)
        rows.append({name: row[0] for name, row in read(stack([summed(channel, batch, targets, stream)])).items()})
        images.append(batch)
        labels.append(picked.labels)
    return Imitations(stack(rows), torch.stack(images), torch.stack(labels).to(observation.device))


def channel_of(observation: Observation, batch_size: int, stream: torch.Generator) -> Channel:
    """Return the way from a batch to its message, in the round observed or, where that is not known, in a new one."""
    assert observation.view is not None
    network, training = observation.network, observation.training
    if observation.view.public is None:
        return Channel.drawn(network, observation.view.defense, training, batch_size, stream)
    return Channel(network, observation.view.defense, observation.view.public, training)


class Hashing:
    """Shortens messages [M, ...] to at most `features` entries, each a sum of the message's with random signs.

    Inner products are kept on average (Weinberger et al., ICML 2009, arXiv:0902.2206).
    """

    def __init__(self, messages: Message, features: int, stream: torch.Generator, dtype: torch.dtype) -> None:
        """Draw where each entry goes, for messages shaped like these; those that are short stay as they are."""
        self.lengths = [tensor[0].numel() for tensor in messages.values()]
        self.features, self.dtype = features, dtype
        self.bucket: Tensor | None = None
        total, device = sum(self.lengths), next(iter(messages.values())).device
        if total > features:
            self.bucket = torch.randint(features, (total,), generator=stream).to(device)
            self.sign = (torch.randint(2, (total,), generator=stream) * 2.0 - 1).to(device, dtype)

    def flat(self, messages: Message) -> Tensor:
        """All entries of messages, [M, K]."""
        return torch.cat([tensor.detach().flatten(1).to(self.dtype) for tensor in messages.values()], dim=1)

    def shorten(self, rows: Tensor) -> Tensor:
        """What entries [M, K] are hashed to, [M, features] at most."""
        if self.bucket is None:
            return rows
        return rows.new_zeros(len(rows), self.features).index_add_(1, self.bucket, rows * self.sign)


def summed(channel: Channel, images: Tensor, targets: Tensor, stream: torch.Generator) -> Message:
    """Return what the server gets of these images: a client's message, or the mean of a cohort's, of equal shares."""
    clients = channel.defense.cohort
    mixed = torch.randperm(len(images), generator=stream).to(images.device)
    parts = zip(images[mixed].chunk(clients), targets[mixed].chunk(clients), strict=True)
    sent = stack([channel.message(*part, stream) for part in parts])
    return {name: tensor.mean(0) for name, tensor in sent.items()}


def sorted_labels(observation: Observation) -> tuple[Tensor, Tensor] | None:
    """Labels of every victim, ascending, and the place of each in the order to answer, [N, B] each; None if unknown."""
    labels = observation.labels
    if labels is None:
        head = structure.of(observation.network.module).head
        try:
            labels = label_rules.infer(observation.gradient, head, observation.batch_size)
        except GradleakError:
            return None
    order = labels.argsort(dim=1, stable=True)
    return labels.gather(1, order), order.argsort(dim=1)


def untold(setting: Setting) -> str | None:
    """Say what is not known of how the client trains, which an imitation has to repeat, or None."""
    if setting.local_lr is not None and not setting.grants.local_training:
        return "needs to know the client's local training (grants: {local_training: true})"
    return None


def class_prior(observation: Observation, labels: Tensor | None) -> Tensor:
    """Mean public image of every label [N, B], or of all images where labels are unknown, [N, B, C, H, W]."""
    assert observation.auxiliary is not None
    images = observation.auxiliary.images.to(observation.device, observation.dtype)
    if labels is None:
        return images.mean(0).expand(observation.victims, observation.batch_size, *observation.shape).clone()
    return class_means(Images(images, observation.auxiliary.labels.to(observation.device)), observation.classes)[labels]


def _batches(public: Images, count: int, size: int, stream: torch.Generator) -> list[Tensor]:
    """Indices of batches: a walk through random orders of all public images."""
    needed = count * size
    orders = [torch.randperm(len(public), generator=stream) for _ in range(-(-needed // len(public)))]
    return list(torch.cat(orders)[:needed].split(size))
