"""What an attacker is given of a round: the only door to an observation."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import Tensor
from torch.func import vmap

from ..attack import Attack
from ..dataset import Data
from ..defense import Defense, View
from ..engine import answers
from ..federation import client
from ..mechanisms import batch_statistics
from ..search.generators import Generator
from ..suite import AttackCell
from ..threat import BatchNorm, Compute, Knowledge, Level, Observation, Setting, rank
from ..update import LocalTraining, Network
from .workshop import Progress


def observe(
    cell: AttackCell,
    data: Data,
    network: Network,
    sent: client.Sent,
    running: batch_statistics.Statistics,
    labels: Tensor,
    generator: Generator | None,
    progress: Progress | None,
) -> Observation:
    """Build what the attacker sees, and nothing more than is granted."""
    attack, defense, setting = cell.built_attack, cell.built_defense, cell.setting
    granted = granted_of(attack, setting, cell.knowledge)
    message, private, statistics = sent.message, sent.buffers, sent.statistics
    if attack.observes_other_victim:
        other = torch.arange(len(labels), device=labels.device).roll(-1)
        labels = labels[other]
        message = {name: tensor[other] for name, tensor in message.items()}
        private = {name: tensor[other] for name, tensor in private.items()}
        statistics = {name: tensor[other] for name, tensor in statistics.items()}
    update = dict(vmap(lambda row: answers.tensors(defense.decode(row, sent.public), defense, "decode"))(message))
    answers.shaped(update, network.parameters, "the model's parameters", defense, "decode", "protect", skip=1)
    size = batch_size_of(attack, defense, setting, granted.defense)
    labels = labels[:, :size]
    known = {"known": labels, "counts": labels.sort(-1).values}.get(granted.labels.value)
    view = None
    if granted.defense is not Level.OBLIVIOUS:
        complete = rank(granted.defense) >= rank(Level.PUBLIC) or not sent.public
        view = View(defense, sent.public if complete else None)
    engine, timeout = cell.engine, cell.engine.timeout
    return Observation(
        network=network,
        message=message,
        update=update,
        view=view,
        shape=data.shape,
        classes=data.classes,
        batch_size=size,
        training=setting.local_training if granted.local_training else LocalTraining(),
        weight_difference=setting.local_lr is not None,
        labels=known,
        running_statistics=None if granted.batch_norm is BatchNorm.NONE else running,
        batch_statistics=statistics if granted.batch_norm is BatchNorm.BATCH else None,
        generator=generator,
        auxiliary=data.split.train if granted.auxiliary else None,
        private=private if granted.defense is Level.ORACLE else None,
        compute=Compute(
            backend=engine.backend,
            width=engine.width,
            compile=engine.compile,
            deadline=None if timeout is None else time.monotonic() + timeout,
            progress=progress,
        ),
    )


def granted_of(attack: Attack, setting: Setting, level: Level) -> Knowledge:
    """What a setting grants; controls are yardsticks and always have the public images."""
    auxiliary = setting.grants.auxiliary or attack.family == "control"
    return replace(setting.grants, defense=level, auxiliary=auxiliary)


def batch_size_of(attack: Attack, defense: Defense, setting: Setting, level: Level) -> int:
    """Images that an attacker takes a message to be of.

    Those of all clients in a sum, unless the attack could adapt to the defense and is not told of it.
    """
    adapts = attack.adaptive and attack.family != "control"
    return setting.batch_size * (1 if adapts and level is Level.OBLIVIOUS else defense.cohort)
