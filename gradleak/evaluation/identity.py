"""What a finished cell's numbers depend on, and where they were computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..attack import Reconstruction
from ..board.provenance import Provenance, guaranteed
from ..federation import client
from ..reconstruction import threat_model
from ..suite import AttackCell
from ..threat import Level


def identity(cell: AttackCell) -> Provenance:
    """What is known of a cell before it runs: families, threat model, and whether the attack adapts to the defense.

    An attack adapts if it knows the defense and that makes a difference: it learns what the defense does, was made
    against it, or matches through what the defense publishes (which takes the round's randomness, if it has any).
    """
    attack, defense, level = cell.built_attack, cell.built_defense, cell.knowledge
    blind = level is Level.PARAMETERS and defense.publishes
    answers = attack.family == "learned" or cell.attack.name in defense.counter_attacks
    adapts = answers or (defense.is_adaptive_target and not blind)
    return Provenance(
        attack_family=attack.family,
        adaptive=attack.adaptive and level is not Level.OBLIVIOUS and adapts,
        threat_model=threat_model(cell.setting.server.surface),
        defense_family=defense.family,
    )


def provenance(
    cell: AttackCell, rounds: Sequence[client.Sent], accuracy: float, answer: Reconstruction | None, queries: int = 1
) -> Provenance:
    """What a finished cell was computed with: code, versions, machine, times.

    The guarantee is of all that was seen of a client which the server asked up to `queries` times.
    """
    asked = replace(cell.setting, rounds=cell.setting.rounds * queries)
    return replace(
        identity(cell),
        stochastic=any(sent.drew for sent in rounds),
        bytes=float(np.mean([size for sent in rounds for size in sent.bytes])),
        dense_bytes=rounds[0].dense_bytes,
        epsilon=guaranteed(cell.built_defense.guarantee(asked)),
        client_seconds=float(np.mean([sent.seconds for sent in rounds])),
        model_accuracy=accuracy,
        backend="" if answer is None else answer.backend,
        backend_reason="" if answer is None else answer.backend_reason,
    )
