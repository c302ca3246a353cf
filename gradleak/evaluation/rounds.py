"""Rounds of clients and a server: each attacked, and told as rows; and what the server did to its model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..board.provenance import Inspected, Served
from ..board.schema import REFUSED
from ..board.store import ImageRow
from ..dataset import Data, Images
from ..federation.serving import Round
from ..seeds import Generators
from ..suite import AttackCell
from ..threat import Observation, Power
from ..update import Network
from .answer import Answer, Asker, ask
from .inspection import Inspection
from .isolation import ask_isolated, residue
from .losses import LossesOf
from .observe import isolated
from .score import of_victims, rows_of
from .workshop import Workshop

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Attacked:
    """A round with what was answered."""

    round: Round
    observation: Observation
    given: Answer


@dataclass(frozen=True)
class Told:
    """What is kept of a round, by victim."""

    rows: list[ImageRow]
    reconstructions: dict[int, Array]
    traces: dict[int, Array]


def attacked(
    cell: AttackCell,
    round_: Round,
    observation: Observation,
    streams: Generators,
    data: Data,
    images: Tensor,
    asker: Asker = ask,
) -> Attacked:
    """Let the attack of a cell answer a round; the true images [N, B, C, H, W] judge what was isolated."""
    label, attack = cell.attack.label, cell.built_attack
    if not isolated(cell):
        return Attacked(round_, observation, asker(label, attack, observation, streams))
    public = data.split.train
    given, shown = ask_isolated(label, attack, cell.built_server, round_, observation, streams, public, asker)
    if shown is not None and shown.batch_size == 1 and given.reconstruction is not None:
        share, nearest = residue(shown, images[0])
        found = {"residue": torch.tensor([share]), "isolated": torch.tensor([nearest])}
        given.reconstruction.details.update(found)
    return Attacked(round_, observation, given)


def told_of(
    cell: AttackCell,
    data: Data,
    each: Attacked,
    images: Tensor,
    labels: Tensor,
    workshop: Workshop,
    losses_of: LossesOf,
) -> Told:
    """Compare a round's answer with the truth: images [N, B, C, H, W] and labels [N, B] of all victims."""
    rows_here, answer = list(each.round.victims), each.given.reconstruction
    # An attacker who takes a sum for one client's message guesses, and is held to, the victim's images only.
    size = each.observation.batch_size
    truth, known, sent = images[rows_here][:, :size], labels[rows_here][:, :size], each.round.sent.of_first(size)
    rows = rows_of(cell, data, each.observation, sent, truth, known, each.given, workshop, losses_of, isolated(cell))
    rows, guesses = of_victims(rows, None if answer is None else answer.images, cell.setting.batch_size)
    refused = _refused(cell, each.round)
    pictures = {} if guesses is None else dict(zip(rows_here, guesses.float().cpu().numpy(), strict=True))
    traces = {}
    if answer is not None and answer.trace is not None:
        traces = dict(zip(rows_here, answer.trace.cpu().numpy(), strict=True))
    rows = [replace(row, victim=rows_here[row.victim]) for row in rows]
    return Told(
        rows=[_silent(row) if row.victim in refused else row for row in rows],
        reconstructions={victim: image for victim, image in pictures.items() if victim not in refused},
        traces={victim: trace for victim, trace in traces.items() if victim not in refused},
    )


def _refused(cell: AttackCell, round_: Round) -> set[int]:
    """Victims that sent nothing; a control, which reads nothing, has its guess all the same."""
    if cell.built_attack.family == "control" or not round_.refused:
        return set()
    return {victim for victim, refused in zip(round_.victims, round_.refused, strict=True) if refused}


def _silent(row: ImageRow) -> ImageRow:
    return ImageRow(victim=row.victim, image=row.image, status=REFUSED, seconds=row.seconds)


def inspected(rounds: list[Round], looks: Inspection | None) -> Inspected | None:
    """What is known of clients who looked at the model; None where none did."""
    if looks is None:
        return None
    refused = [each for round_ in rounds for each in round_.refused]
    return Inspected(
        refused=float(np.mean(refused)) if refused else 0.0,
        false_alarms=looks.false_alarms,
        honest_rounds=looks.rounds,
        thresholds=[each.value for each in looks.thresholds],
    )


def served(cell: AttackCell, data: Data, module: nn.Module, rounds: list[Round]) -> Served | None:
    """What is known of a server that changed the agreed model; None of one that did not."""
    server = cell.built_server
    if server.surface is Power.HONEST:
        return None
    network = rounds[0].network
    agreed = sum(tensor.numel() for tensor in module.parameters())
    sent = sum(tensor.numel() for tensor in network.module.parameters())
    asked = [len(round_.queries) or 1 for round_ in rounds]
    plain = Network.of(module)
    trained = sum(tensor.numel() for tensor in plain.parameters.values())
    return Served(
        queries=float(np.mean(asked)),
        most_queries=max(asked),
        expected=server.expected(cell.setting, cell.built_defense.cohort),
        added_parameters=sent - agreed,
        added_bytes=rounds[0].sent.dense_bytes - 4 * trained,
        accuracy=_accuracy(network, data.split.test),
        counts=server.counts,
    )


def _accuracy(network: Network, images: Images) -> float:
    """Share of images that a network as clients run it tells right."""
    like = next(iter(network.parameters.values()))
    right = 0
    with torch.inference_mode():
        for start in range(0, len(images), 256):
            part = images[start : start + 256]
            right += int((network.logits(part.images.to(like)).argmax(1).cpu() == part.labels).sum())
    return right / len(images)
