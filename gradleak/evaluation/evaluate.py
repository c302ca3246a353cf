"""One cell: clients send messages, the attack answers, the truth is compared with the answer.

Only this module and `client` may hold a victim's images; the attack gets an `Observation`, which holds none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial

from torch import Tensor

from .. import seeds
from ..attack import Attack, Reconstruction
from ..board.provenance import Provenance, guaranteed
from ..board.store import CellResult
from ..dataset import Data
from ..federation import utility
from ..federation.serving import Round, Serving
from ..mechanisms import batch_statistics
from ..process import full_precision
from ..search.generators import Generator
from ..seeds import Generators
from ..suite import UTILITY, AttackCell, Cell, TrainingCell
from ..threat import Observation
from .answer import Answer, Asker, ask, guarded
from .apart import Apart
from .faults import MachineFault, machine_fault
from .identity import identity, provenance
from .inspection import Inspection, inspection
from .losses import losses_of
from .observe import observe
from .rounds import Attacked, attacked, inspected, served, told_of
from .workshop import Progress, Workshop, device_name, versions

Phase = Callable[[str], None]
"""Told when the `attack` begins, and when the `scores` of its answer do: the first has a time limit of its own."""


def evaluate(
    cell: Cell,
    workshop: Workshop,
    progress: Progress | None = None,
    phase: Phase | None = None,
    apart: Apart | None = None,
) -> CellResult:
    """Run one cell and return all that is kept of it.

    With `apart` its attack runs in a process where no victim is; else in this one.

    An attack that raises makes a failed cell that carries the error; running out of memory or time marks the
    victims concerned.

    Raises:
        MachineFault: a full disk, say, which says nothing of the cell.
    """
    started = datetime.now(UTC).isoformat(timespec="seconds")
    clock = time.perf_counter()
    full_precision()
    try:
        cell.check_code(workshop.resources.data_root)
        with guarded(cell.title):
            if isinstance(cell, TrainingCell):
                result = _train(cell, workshop, progress)
            else:
                assert isinstance(cell, AttackCell)
                result = _attack(cell, workshop, progress, phase or _unheard, apart)
    except MachineFault:
        raise
    except (Exception, SystemExit) as error:  # A plugin that exits ends its cell, and no more.
        if isinstance(error, Exception) and (fault := machine_fault(error)):
            raise MachineFault(fault) from error
        result = failed(cell, workshop.described(error))
    return replace(
        result,
        started=started,
        seconds=time.perf_counter() - clock,
        device=device_name(workshop.resources.device),
        versions=versions(),
    )


def failed(cell: Cell, error: str) -> CellResult:
    """Return the result of a cell that could not be computed."""
    facts = identity(cell).stored() if isinstance(cell, AttackCell) else {}
    return CellResult(key=cell.key, config=cell.stored(), status="failed", error=error, provenance=facts)


def _unheard(name: str) -> None:
    pass


@dataclass(frozen=True)
class Stage:
    """The clients' side of a cell before its attack: rounds with their messages, and the truth."""

    cell: AttackCell
    data: Data
    serving: Serving
    looks: Inspection | None
    """How clients look at models, if they do."""
    rounds: list[Round]
    images: Tensor
    """The truth, [N, B, C, H, W]; of sums, with the other clients' images after the victim's."""
    labels: Tensor
    """[N, B]."""
    accuracy: float
    """Test accuracy of the agreed model, in [0, 1]."""
    generator: Generator | None

    def observation(self, each: Round, progress: Progress | None = None) -> Observation:
        """Return what the attacker sees of a round."""
        setting, device = self.cell.setting, self.serving.device
        # Taken from the module: a network in train mode has forgotten them.
        running = batch_statistics.running(self.serving.module)
        known = {name: tensor.to(device, setting.dtype) for name, tensor in running.items()}
        labels = self.labels[list(each.victims)]
        return observe(self.cell, self.data, each.network, each.sent, known, labels, self.generator, progress)

    def facts(self, answer: Reconstruction | None) -> Provenance:
        """Return what is kept of a cell beside its rows."""
        queries = max(len(each.queries) or 1 for each in self.rounds)
        facts = provenance(self.cell, [each.sent for each in self.rounds], self.accuracy, answer, queries)
        server = served(self.cell, self.data, self.serving.module, self.rounds)
        return replace(facts, inspection=inspected(self.rounds, self.looks), server=server)


def stage(cell: AttackCell, workshop: Workshop) -> Stage:
    """Let the clients of a cell answer its server."""
    defense, setting, device = cell.built_defense, cell.setting, workshop.resources.device
    data = workshop.data(cell.dataset)
    module, accuracy = workshop.network(cell)
    images, labels = data.cohorts(cell.victims, setting.batch_size, defense.cohort, cell.tuning)
    images, labels = images.to(device, setting.dtype), labels.to(device)
    looks = inspection(cell, workshop)
    serving = Serving(
        server=cell.built_server,
        defense=defense,
        setting=setting,
        module=module,
        auxiliary=data.split.train,
        classes=data.classes,
        identity=cell.draws.messages,
        private=cell.draws.clients,
        seed=cell.draws.server,
        device=device,
        suspicious=None if looks is None else looks.suspicious,
    )
    with guarded(f"defense {cell.defense.label!r}"):
        rounds = serving.rounds(images, labels)
    images, labels = (tensor.unflatten(0, (-1, defense.cohort)).flatten(1, 2) for tensor in (images, labels))
    generator = None if cell.prior is None else workshop.generator(cell.prior, data).to(device, setting.dtype)
    return Stage(cell, data, serving, looks, rounds, images, labels, accuracy, generator)


def _attack(
    cell: AttackCell, workshop: Workshop, progress: Progress | None, phase: Phase, apart: Apart | None
) -> CellResult:
    found = stage(cell, workshop)
    data, images, labels = found.data, found.images, found.labels
    # The attack gets these names: derived, so that they do not tell which victim is whose.
    names = [seeds.derive(*cell.draws.attack, index) for index in range(len(images))]
    streams = Generators(names, workshop.resources.device, cell.setting.dtype, seeds.derive(*cell.draws.attack))
    phase("attack")
    asked, asker = [], _asker(cell, apart)
    for each in found.rounds:
        rows = list(each.victims)
        observation = found.observation(each, progress)
        asked.append(attacked(cell, each, observation, streams.select(rows), data, images[rows], asker))
    phase("scores")
    told = [told_of(cell, data, each, images, labels, workshop, losses_of(cell, apart)) for each in asked]
    return CellResult(
        key=cell.key,
        config=cell.stored(),
        error=next((each.given.error for each in asked if each.given.error), ""),
        provenance=replace(found.facts(asked[0].given.reconstruction), width=_width(asked)).stored(),
        rows=[row for each in told for row in each.rows],
        reconstructions={victim: image for each in told for victim, image in each.reconstructions.items()},
        traces={victim: trace for each in told for victim, trace in each.traces.items()},
    )


def _asker(cell: AttackCell, apart: Apart | None) -> Asker:
    """Return what asks the attack of a cell."""
    if apart is None:
        return ask
    part = cell.attack

    def asked(label: str, attack: Attack, observation: Observation, streams: Generators) -> Answer:
        respond = partial(apart, part.name, part.options, label, observation, streams)
        return ask(label, attack, observation, streams, respond)

    return asked


def _width(asked: Sequence[Attacked]) -> int | None:
    """Return the least width that memory held, if it was not the one that was asked for."""
    return min((each.given.width for each in asked if each.given.width is not None), default=None)


def _train(cell: TrainingCell, workshop: Workshop, progress: Progress | None) -> CellResult:
    """Measure the utility of a defense; the model starts with the weights that are attacked."""
    defense, data = cell.built_defense, workshop.data(cell.dataset)
    module, _ = workshop.network(cell)
    trained = utility.train(module, data, defense, cell.recipe, cell.seed, workshop.resources.device, progress)
    return CellResult(
        key=cell.key,
        config=cell.stored(),
        provenance=Provenance(
            attack_family=UTILITY,
            defense_family=defense.family,
            test_accuracy=trained.accuracy,
            validation_accuracy={f"{lr:g}": score for lr, score in trained.validation.items()},
            lr=trained.lr,
            bytes=trained.bytes,
            dense_bytes=trained.dense_bytes,
            participations=trained.participations,
            training_epsilon=guaranteed(trained.guarantee),
        ).stored(),
    )
