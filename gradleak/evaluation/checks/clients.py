"""A client is a function: its update and its message follow from its batch and its seed, and there is one."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ...defense import Defense
from ...federation import client
from ...state import random_states
from ...threat import Setting
from ...update import Network, Update
from . import networks


def refusal(
    network: Network, images: Tensor, labels: Tensor, others: Tensor, classes: int, defense: Defense, setting: Setting
) -> str | None:
    """Say why a client cannot be attacked, or None.

    Args:
        network: as clients run it.
        images: of the victims, [N, B, C, H, W].
        labels: theirs, [N, B].
        others: public images of as many batches as one client has, [B, C, H, W].
        classes: number of classes.
        defense: of the clients.
        setting: of the clients.
    """
    # A further step repeats the second.
    brief = replace(setting, local_steps=min(setting.local_steps, 2))
    send = partial(client.send, network, classes=classes, defense=defense, setting=brief, round_seed=0)
    buffers = defense.private_buffers(network.module, images[0], torch.Generator().manual_seed(0))
    wrong = _of_network(network, images[0], others, classes, defense, setting, buffers)
    if wrong is not None:
        return f"the model: {wrong}"
    before = random_states()
    first, second = (send(images=images[:1], labels=labels[:1], client_seeds=[0]) for _ in range(2))
    moved = [whose for whose, state in before.items() if random_states()[whose] != state]
    if moved:
        return f"the defense: draws from {' and '.join(moved)} (allowed: the generator that it is given)"
    if not first.drew and not all(tensor.isfinite().all() for tensor in first.update.values()):
        return "the model: its gradient is not finite"
    if not _same(first.update, second.update):
        return "the model: two updates of one batch differ (allowed: randomness that a defense declares)"
    if not _same(first.message, second.message):
        return "the defense: two messages of one update and one seed differ (allowed: its generator's draws)"
    if _is_zero(first.update) and all(
        _is_zero(send(images=batch[None], labels=own[None], client_seeds=[index]).update)
        for index, (batch, own) in enumerate(zip(images[1:], labels[1:], strict=True), start=1)
    ):
        return f"the model: the update is exactly zero for all of {len(images)} victims; there is nothing to attack"
    return None


def _of_network(
    network: Network,
    images: Tensor,
    others: Tensor,
    classes: int,
    defense: Defense,
    setting: Setting,
    buffers: dict[str, Tensor],
) -> str | None:
    step = setting.local_batch_size or len(images)
    sizes = {step, 1} if defense.per_example_gradients else {step}
    for size in sorted(sizes, reverse=True):
        wrong = networks.refusal(network, images, classes, buffers, size)
        if wrong is not None:
            return wrong
    if defense.per_example_gradients and len(images) > 1:
        wrong = networks.mixes_examples(network, images, buffers)
        if wrong is not None:
            return wrong
    return networks.ignores_images(network, images[:step], others[:step], classes)


def _same(left: Update, right: Update) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(tensor.nan_to_num(), right[name].nan_to_num()) for name, tensor in left.items()
    )


def _is_zero(update: Update) -> bool:
    return not any(tensor.any() for tensor in update.values())
