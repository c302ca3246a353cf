"""One cell: clients send messages, the attack answers, the truth is compared with the answer.

Only this module and `client` may hold a victim's images; the attack gets an `Observation`, which holds none.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime

from .. import seeds
from ..board.store import CellResult
from ..engine import loop
from ..federation import client, utility
from ..mechanisms import batch_statistics
from ..process import full_precision
from ..seeds import Generators
from ..suite import UTILITY, Cell, Utility, attack_and_defense, build_defense_of, build_setting, check_files, unnamed
from .answer import ask, guarded
from .faults import MachineFault, machine_fault
from .identity import identity, provenance
from .observe import observe
from .score import of_victims, rows_of
from .workshop import Progress, Resources, data_of, described, device_name, generator_of, network_of, versions

Phase = Callable[[str], None]
"""Told when the `attack` begins, and when the `scores` of its answer do: the first has a time limit of its own."""


def evaluate(
    cell: Cell, resources: Resources, progress: Progress | None = None, phase: Phase | None = None
) -> CellResult:
    """Run one cell and return all that is kept of it.

    An attack that raises makes a failed cell that carries the error; running out of memory or time marks the
    victims concerned.

    Raises:
        MachineFault: a full disk, say, which says nothing of the cell.
    """
    started = datetime.now(UTC).isoformat(timespec="seconds")
    clock = time.perf_counter()
    loop.forget_widths()
    full_precision()
    try:
        check_files(cell.config)
        with guarded(cell.title):
            result = (_train if cell.is_utility else _evaluate)(cell, resources, progress, phase or _unheard)
    except (Exception, SystemExit) as error:  # A plugin that exits ends its cell, and no more.
        if isinstance(error, Exception) and (fault := machine_fault(error)):
            raise MachineFault(fault) from error
        message = described(error, resources)
        facts = {} if cell.is_utility else identity(cell.config)
        result = CellResult(key=cell.key, config=cell.config, status="failed", error=message, provenance=facts)
    return replace(
        result,
        started=started,
        seconds=time.perf_counter() - clock,
        device=device_name(resources.device),
        versions=versions(),
    )


def _unheard(name: str) -> None:
    pass


def _evaluate(cell: Cell, resources: Resources, progress: Progress | None, phase: Phase) -> CellResult:
    config = cell.config
    attack, defense = attack_and_defense(config)
    setting = build_setting(config["setting"])
    data = data_of(config["dataset"], resources)
    module, accuracy = network_of(config, setting, resources)
    images, labels = data.cohorts(config["victims"], setting.batch_size, defense.cohort, config["tuning"])
    images, labels = images.to(resources.device, setting.dtype), labels.to(resources.device)
    network = client.freeze(module, defense, setting).to(resources.device, setting.dtype)
    # The attack is no part of these seeds: every attack faces the same messages.
    # Names are no part of them either, nor is what is granted or a file's wording: equal choices, equal draws.
    bare = unnamed(config)
    bare["setting"].pop("grants")
    for part in ("dataset", "model", "defense"):
        bare[part].pop("file", None)
    context = [json.dumps(bare[key], sort_keys=True) for key in ("dataset", "model", "setting")]
    guard = json.dumps(bare["defense"], sort_keys=True)
    with guarded(f"defense {config['defense']['label']!r}"):
        sent = client.send(
            network,
            images,
            labels,
            data.classes,
            defense,
            setting,
            seeds.derive("round", config["seed"], *context, guard),
            client.seeds_for(list(range(config["victims"])), config["seed"], *context, guard, clients=defense.cohort),
        )
    sent = client.aggregated(sent, defense.cohort)
    images, labels = (tensor.unflatten(0, (-1, defense.cohort)).flatten(1, 2) for tensor in (images, labels))
    generator = generator_of(config, data, resources).to(resources.device, setting.dtype) if "prior" in config else None
    # Taken from the module: a network in train mode has forgotten them.
    running = {
        name: tensor.to(resources.device, setting.dtype) for name, tensor in batch_statistics.running(module).items()
    }
    observation = observe(config, attack, defense, setting, data, network, sent, running, labels, generator, progress)
    # An attacker who takes a sum for one client's message guesses, and is held to, the victim's images only.
    size = observation.batch_size
    images, labels, sent = images[:, :size], labels[:, :size], sent.of_first(size)
    # Numbers that say nothing of whose they are.
    names = [seeds.derive(config["seed"], "attack", config["attack"]["name"], *context, i) for i in range(len(images))]
    shared = seeds.derive(config["seed"], "attack", config["attack"]["name"], *context)
    streams = Generators(names, resources.device, setting.dtype, shared)
    phase("attack")
    given = ask(config["attack"]["label"], attack, observation, streams)
    phase("scores")
    answer = given.reconstruction
    rows = rows_of(config, attack, data, observation, sent, images, labels, given, resources)
    rows, guesses = of_victims(rows, None if answer is None else answer.images, setting.batch_size)
    return CellResult(
        key=cell.key,
        config=config,
        error=given.error,
        provenance=provenance(config, attack, defense, setting, sent, accuracy, answer),
        rows=rows,
        reconstructions={} if guesses is None else dict(enumerate(guesses.float().cpu().numpy())),
        traces={} if answer is None or answer.trace is None else dict(enumerate(answer.trace.cpu().numpy())),
    )


def _train(cell: Cell, resources: Resources, progress: Progress | None, phase: Phase) -> CellResult:
    """Measure the utility of a defense; the model starts with the weights that are attacked."""
    config = cell.config
    defense = build_defense_of(config["defense"])
    module, _ = network_of(config, build_setting(config["setting"]), resources)
    recipe = Utility.model_validate(config["attack"]["options"])
    data = data_of(config["dataset"], resources)
    trained = utility.train(module, data, defense, recipe, config["seed"], resources.device, progress)
    return CellResult(
        key=cell.key,
        config=config,
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
