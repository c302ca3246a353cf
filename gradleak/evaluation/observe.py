"""What the attacker of a cell is given."""

from __future__ import annotations

import time

from torch import Tensor

from ..attack import Attack
from ..dataset import Data
from ..defense import Defense
from ..federation import observation
from ..federation.client import Sent
from ..mechanisms import batch_statistics
from ..reconstruction import granted_of
from ..search.generators import Generator
from ..suite import AttackCell
from ..threat import Compute, Level, Observation, Power, Setting
from ..update import Network
from .workshop import Progress


def observe(
    cell: AttackCell,
    data: Data,
    network: Network,
    sent: Sent,
    running: batch_statistics.Statistics,
    labels: Tensor,
    generator: Generator | None,
    progress: Progress | None,
) -> Observation:
    """Build what the attacker of a cell sees, and nothing more than is granted."""
    attack, defense, setting = cell.built_attack, cell.built_defense, cell.setting
    granted = granted_of(attack, setting, cell.knowledge)
    if attack.observes_other_victim:
        sent, labels = observation.of_others(sent, labels)
    engine, timeout = cell.engine, cell.engine.timeout
    return observation.observe(
        sent,
        network,
        defense,
        setting,
        data.shape,
        labels,
        data.classes,
        granted,
        batch_size=batch_size_of(attack, defense, setting, granted.defense),
        running=running,
        generator=generator,
        auxiliary=data.split.train,
        compute=Compute(
            backend=engine.backend,
            width=engine.width,
            deadline=None if timeout is None else time.monotonic() + timeout,
            progress=progress,
        ),
    )


def faced_of(cell: AttackCell) -> int:
    """Images that the attack of a cell looks for: one, where the server isolates it for attacks on single images."""
    if isolated(cell):
        return 1
    return batch_size_of(cell.built_attack, cell.built_defense, cell.setting, cell.knowledge)


def isolated(cell: AttackCell) -> bool:
    """Whether the attack of a cell is shown what the server isolates: it is one that any server could run."""
    attack = cell.built_attack
    return cell.built_server.isolates and attack.needs.server is Power.HONEST and attack.family != "control"


def batch_size_of(attack: Attack, defense: Defense, setting: Setting, level: Level) -> int:
    """How many images an attacker takes a message to be of.

    Those of all clients in a sum, unless the attack could adapt to the defense and is not told of it.
    """
    adapts = attack.adaptive and attack.family != "control"
    return setting.batch_size * (1 if adapts and level is Level.OBLIVIOUS else defense.cohort)
