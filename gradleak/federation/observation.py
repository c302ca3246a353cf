"""What an attacker is given of a round: the only door to an observation."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.func import vmap

from ..dataset import Images
from ..defense import Defense, View
from ..engine import answers
from ..mechanisms import batch_statistics
from ..search.generators import Generator
from ..threat import BatchNorm, Compute, Knowledge, Level, Observation, Setting, rank
from ..update import LocalTraining, Network, Update
from .client import Sent


def observe(
    sent: Sent,
    network: Network,
    defense: Defense,
    setting: Setting,
    shape: tuple[int, int, int],
    labels: Tensor,
    classes: int,
    knowledge: Knowledge | None = None,
    *,
    batch_size: int | None = None,
    running: batch_statistics.Statistics | None = None,
    generator: Generator | None = None,
    auxiliary: Images | None = None,
    compute: Compute | None = None,
) -> Observation:
    """Build what the attacker sees of N victims' messages, and nothing more than is granted.

    Args:
        sent: what clients have sent, and what stays with them.
        network: as the attacker runs it.
        defense: of the clients.
        setting: how they train.
        shape: of an image, (C, H, W).
        labels: the true ones, [N, B]; only what is granted of them is shown.
        classes: how many there are.
        knowledge: what is granted; by default, what the setting grants.
        batch_size: images that the attacker takes a message to be of; by default the setting's.
        running: running statistics of batch normalisation; by default the network's, which has none in train mode.
        generator: the image prior.
        auxiliary: public images.
        compute: how the attack may compute.

    Raises:
        PluginError: the defense decodes a message to something else than an update of the model.
    """
    granted, size = knowledge or setting.grants, batch_size or setting.batch_size
    labels = labels[:, :size]
    if running is None:
        running = batch_statistics.running(network.module)
    return Observation(
        network=network,
        message=sent.message,
        update=decoded(sent, network, defense),
        view=_view(sent, defense, granted.defense),
        shape=shape,
        classes=classes,
        batch_size=size,
        training=setting.local_training if granted.local_training else LocalTraining(),
        weight_difference=setting.local_lr is not None,
        labels={"known": labels, "counts": labels.sort(-1).values}.get(granted.labels.value),
        running_statistics=None if granted.batch_norm is BatchNorm.NONE else running,
        batch_statistics=sent.statistics if granted.batch_norm is BatchNorm.BATCH else None,
        generator=generator,
        auxiliary=auxiliary if granted.auxiliary else None,
        private=sent.buffers if granted.defense is Level.ORACLE else None,
        compute=compute or Compute(),
    )


def decoded(sent: Sent, network: Network, defense: Defense) -> Update:
    """Return the updates [N, ...] that the server decodes.

    Raises:
        PluginError: the defense decodes a message to something else than an update of the model.
    """
    update = dict(vmap(lambda row: answers.tensors(defense.decode(row, sent.public), defense, "decode"))(sent.message))
    return answers.shaped(update, network.parameters, "the model's parameters", defense, "decode", "protect", skip=1)


def _view(sent: Sent, defense: Defense, level: Level) -> View | None:
    if level is Level.OBLIVIOUS:
        return None
    return View(defense, sent.public if rank(level) >= rank(Level.PUBLIC) or not sent.public else None)


def of_others(sent: Sent, labels: Tensor) -> tuple[Sent, Tensor]:
    """Return what each victim's neighbour has sent, and its labels: what a control is shown that attacks the wrong one.

    Images, targets and updates stay where they are.
    """
    other = torch.arange(len(labels), device=labels.device).roll(-1)
    shown = replace(
        sent,
        message={name: tensor[other] for name, tensor in sent.message.items()},
        buffers={name: tensor[other] for name, tensor in sent.buffers.items()},
        statistics={name: tensor[other] for name, tensor in sent.statistics.items()},
    )
    return shown, labels[other]
