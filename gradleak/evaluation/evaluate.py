"""One cell: clients send messages, the attack answers, the truth is compared with the answer.

Only this module and `client` may hold a victim's images; the attack gets an `Observation`, which holds none.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial

from .. import seeds
from ..board.store import CellResult
from ..federation import client, utility
from ..mechanisms import batch_statistics
from ..process import full_precision
from ..seeds import Generators
from ..suite import UTILITY, AttackCell, Cell, TrainingCell
from .answer import ask, guarded
from .apart import Apart
from .faults import MachineFault, machine_fault
from .identity import identity, provenance
from .observe import observe
from .score import of_victims, rows_of
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
    facts = identity(cell) if isinstance(cell, AttackCell) else {}
    return CellResult(key=cell.key, config=cell.stored(), status="failed", error=error, provenance=facts)


def _unheard(name: str) -> None:
    pass


def _attack(
    cell: AttackCell, workshop: Workshop, progress: Progress | None, phase: Phase, apart: Apart | None
) -> CellResult:
    defense, setting, device = cell.built_defense, cell.setting, workshop.resources.device
    data = workshop.data(cell.dataset)
    module, accuracy = workshop.network(cell)
    images, labels = data.cohorts(cell.victims, setting.batch_size, defense.cohort, cell.tuning)
    images, labels = images.to(device, setting.dtype), labels.to(device)
    network = client.freeze(module, defense, setting).to(device, setting.dtype)
    with guarded(f"defense {cell.defense.label!r}"):
        sent = client.send(
            network,
            images,
            labels,
            data.classes,
            defense,
            setting,
            seeds.derive("round", *cell.draws.messages),
            client.seeds_for(list(range(cell.victims)), *cell.draws.clients, clients=defense.cohort),
        )
    sent = client.aggregated(sent, defense.cohort)
    images, labels = (tensor.unflatten(0, (-1, defense.cohort)).flatten(1, 2) for tensor in (images, labels))
    generator = None if cell.prior is None else workshop.generator(cell.prior, data).to(device, setting.dtype)
    # Taken from the module: a network in train mode has forgotten them.
    running = {name: tensor.to(device, setting.dtype) for name, tensor in batch_statistics.running(module).items()}
    observation = observe(cell, data, network, sent, running, labels, generator, progress)
    # An attacker who takes a sum for one client's message guesses, and is held to, the victim's images only.
    size = observation.batch_size
    images, labels, sent = images[:, :size], labels[:, :size], sent.of_first(size)
    # Numbers that say nothing of whose they are.
    names = [seeds.derive(*cell.draws.attack, index) for index in range(len(images))]
    streams = Generators(names, device, setting.dtype, seeds.derive(*cell.draws.attack))
    phase("attack")
    part = cell.attack
    respond = None if apart is None else partial(apart, part.name, part.options, part.label, observation, streams)
    given = ask(part.label, cell.built_attack, observation, streams, respond)
    phase("scores")
    answer = given.reconstruction
    rows = rows_of(cell, data, observation, sent, images, labels, given, workshop)
    rows, guesses = of_victims(rows, None if answer is None else answer.images, setting.batch_size)
    return CellResult(
        key=cell.key,
        config=cell.stored(),
        error=given.error,
        provenance={
            **provenance(cell, sent, accuracy, answer),
            **({} if given.width is None else {"width": given.width}),
        },
        rows=rows,
        reconstructions={} if guesses is None else dict(enumerate(guesses.float().cpu().numpy())),
        traces={} if answer is None or answer.trace is None else dict(enumerate(answer.trace.cpu().numpy())),
    )


def _train(cell: TrainingCell, workshop: Workshop, progress: Progress | None) -> CellResult:
    """Measure the utility of a defense; the model starts with the weights that are attacked."""
    defense, data = cell.built_defense, workshop.data(cell.dataset)
    module, _ = workshop.network(cell)
    trained = utility.train(module, data, defense, cell.recipe, cell.seed, workshop.resources.device, progress)
    return CellResult(
        key=cell.key,
        config=cell.stored(),
        provenance={
            "attack_family": UTILITY,
            "defense_family": defense.family,
            "test_accuracy": trained.accuracy,
            "validation_accuracy": {f"{lr:g}": score for lr, score in trained.validation.items()},
            "lr": trained.lr,
            "bytes": trained.bytes,
            "dense_bytes": trained.dense_bytes,
            "participations": trained.participations,
            "training_epsilon": None if trained.guarantee is None else asdict(trained.guarantee),
        },
    )
