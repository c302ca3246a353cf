"""One cell: clients send messages, the attack answers, the truth is compared with the answer.

Only this module and `client` may hold a victim's images; the attack gets an `Observation`, which holds none.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import platform
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from .. import __version__, registry, seeds
from ..attack import Attack, Reconstruction
from ..board.store import CellResult, ImageRow
from ..chain import Chain
from ..dataset import Data
from ..defense import Defense, View
from ..engine import loop, memory
from ..errors import GradleakError
from ..federation import client, utility
from ..mechanisms import batch_statistics
from ..model import Model, initialise
from ..paths import conceal
from ..process import default_cache
from ..search.generators import Generator, load_generator
from ..seeds import Generators
from ..suite import UTILITY, Cell, Utility, attack_and_defense, build_defense_of, build_setting, check_files, unnamed
from ..threat import BatchNorm, Compute, Knowledge, Level, Observation, Setting, rank
from ..training import networks, priors
from ..update import LocalTraining, Network
from . import metrics

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resources:
    """Where things are on this machine; none of it changes a result."""

    data_root: Path | None = None
    download: bool = False
    cache: Path | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Refuse a device that is not there."""
        kind = self.device.partition(":")[0]
        if kind == "cuda" and not torch.cuda.is_available():
            raise GradleakError(f"device {self.device!r} is not there (torch sees no CUDA device; use cpu)")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise GradleakError(f"device {self.device!r} is not there ({reason}); use cpu or cuda") from error


Progress = Callable[[float, float], None]
"""Share of a cell done in [0, 1], and the attack's current mean loss."""


def digest(resources: Resources) -> Callable[[str, Mapping[str, Any]], tuple[str, str]]:
    """Return a function from a dataset's name and options to its version and digest."""

    def of(name: str, options: Mapping[str, Any]) -> tuple[str, str]:
        data = _data({"name": name, "options": options}, resources)
        return data.version, data.digest

    return of


def check(cells: Iterable[Cell], resources: Resources) -> list[Cell]:
    """Refuse cells that cannot run, before any of them does; return all but the optional ones that cannot.

    Raises:
        GradleakError: an attack needs knowledge that its setting does not grant, cannot run on a model or
            under a defense at all, more victims are asked for than the dataset holds, or a prior's generator cannot
            be had or makes other images than the victims'.
    """
    seen: dict[str, bool] = {}
    kept: list[Cell] = []
    for cell in cells:
        config = cell.config
        if cell.is_utility:
            recipe = Utility.model_validate(config["attack"]["options"])
            utility.check(_data(config["dataset"], resources), build_defense_of(config["defense"]), recipe)
            kept.append(cell)
            continue
        relevant = {key: config[key] for key in ("attack", "defense", "model", "dataset", "setting", "knowledge")}
        mark = json.dumps([relevant, config["victims"], config["candidates"], config.get("prior")], sort_keys=True)
        if mark in seen:
            if seen[mark]:
                kept.append(cell)
            continue
        seen[mark] = True
        attack, defense = attack_and_defense(config)
        setting = build_setting(config["setting"])
        data = _data(config["dataset"], resources)
        data.victim_indices(config["victims"] * defense.cohort, setting.batch_size, config["tuning"])
        data.candidates(config["candidates"], config["tuning"])
        missing = attack.needs.missing(_granted(attack, setting, config["knowledge"]))
        if missing:
            raise GradleakError(
                f"attack {config['attack']['label']!r} needs {', '.join(missing)}, which setting "
                f"{setting.name!r} does not grant; add it to the setting's `grants`"
            )
        if "prior" in config:
            _fitting_prior(config["prior"], data, resources)
        if attack.observes_other_victim and config["victims"] < 2:
            raise GradleakError(f"attack {config['attack']['label']!r} needs at least 2 victims")
        module = _untrained(json.dumps(config["model"], sort_keys=True), data.shape, data.classes)
        network = client.client_network(module, defense, setting)
        level = Level(config["knowledge"])
        faced = replace(setting, batch_size=_batch_size(attack, defense, setting, level))
        reason = attack.unsuited(network.module, faced, defense)
        if defense.cohort > 1 and setting.local_batch_size is not None:
            reason = "a sum of clients with local batches is no update of one batch; leave local_batch_size out"
        if reason is not None and cell.optional:
            seen[mark] = False
            continue
        if reason is not None:
            raise GradleakError(
                f"attack {config['attack']['label']!r} cannot run on model {config['model']['label']!r} under "
                f"defense {config['defense']['label']!r}: {reason}; restrict it with `only`"
            )
        kept.append(cell)
    return kept


def evaluate(cell: Cell, resources: Resources, progress: Progress | None = None) -> CellResult:
    """Run one cell and return all that is kept of it.

    An attack that raises makes a failed cell that carries the error; running out of memory or time marks the
    victims concerned.
    """
    started = datetime.now(UTC).isoformat(timespec="seconds")
    clock = time.perf_counter()
    loop.forget_widths()
    try:
        check_files(cell.config)
        result = (_train if cell.is_utility else _evaluate)(cell, resources, progress)
    except Exception as error:
        message = _described(error, resources)
        facts = {} if cell.is_utility else identity(cell.config)
        result = CellResult(key=cell.key, config=cell.config, status="failed", error=message, provenance=facts)
    return replace(
        result,
        started=started,
        seconds=time.perf_counter() - clock,
        device=_device_name(resources.device),
        versions=_versions(),
    )


def _described(error: Exception, resources: Resources) -> str:
    """Say what was raised and where, without the folders of this machine: stores are published."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(last.filename).name}:{last.lineno}"
    text = str(error) if isinstance(error, GradleakError) else f"{type(error).__name__}: {error} ({where})"
    return conceal(text, {"<cache>": resources.cache or default_cache(), "<data root>": resources.data_root})


def victims_of(cell: Cell, resources: Resources) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Images [N, B, C, H, W] and labels [N, B] of a cell's victims, for galleries."""
    config = cell.config
    batch_size = config["setting"]["batch_size"]
    data = _data(config["dataset"], resources)
    images, labels = data.victims(config["victims"], batch_size, config["tuning"])
    return images.numpy(), labels.numpy()


def _evaluate(cell: Cell, resources: Resources, progress: Progress | None) -> CellResult:
    config = cell.config
    attack, defense = attack_and_defense(config)
    setting = build_setting(config["setting"])
    data = _data(config["dataset"], resources)
    module, accuracy = _network(config, setting, resources)
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
    generator = _generator(config, data, resources).to(resources.device, setting.dtype) if "prior" in config else None
    # Taken from the module: a network in train mode has forgotten them.
    running = {
        name: tensor.to(resources.device, setting.dtype) for name, tensor in batch_statistics.running(module).items()
    }
    observation = _observe(config, attack, defense, setting, data, network, sent, running, labels, generator, progress)
    # An attacker who takes a sum for one client's message guesses, and is held to, the victim's images only.
    size = observation.batch_size
    images, labels, sent = images[:, :size], labels[:, :size], sent.of_first(size)
    # Numbers that say nothing of whose they are.
    names = [seeds.derive(config["seed"], "attack", config["attack"]["name"], *context, i) for i in range(len(images))]
    shared = seeds.derive(config["seed"], "attack", config["attack"]["name"], *context)
    clock = time.perf_counter()
    try:
        streams = Generators(names, resources.device, setting.dtype, shared)
        answer = attack.reconstruct(observation, streams)
        status = [state.value for state in answer.status] or ["ok"] * len(images)
    except (RuntimeError, MemoryError) as error:
        if not memory.is_out_of_memory(error):
            raise
        answer, status = None, ["oom"] * len(images)
    seconds = (time.perf_counter() - clock) / len(images)
    rows = _rows(config, attack, data, observation, sent, images, labels, answer, status, seconds, resources)
    rows, guesses = _of_victims(rows, None if answer is None else answer.images, setting.batch_size)
    return CellResult(
        key=cell.key,
        config=config,
        provenance=_provenance(config, attack, defense, setting, sent, accuracy, answer),
        rows=rows,
        reconstructions={} if guesses is None else dict(enumerate(guesses.float().cpu().numpy())),
        traces={} if answer is None or answer.trace is None else dict(enumerate(answer.trace.cpu().numpy())),
    )


def _train(cell: Cell, resources: Resources, progress: Progress | None) -> CellResult:
    """Measure the utility of a defense; the model starts with the weights that are attacked."""
    config = cell.config
    defense = build_defense_of(config["defense"])
    module, _ = _network(config, build_setting(config["setting"]), resources)
    recipe = Utility.model_validate(config["attack"]["options"])
    data = _data(config["dataset"], resources)
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


def _observe(
    config: Mapping[str, Any],
    attack: Attack,
    defense: Defense,
    setting: Setting,
    data: Data,
    network: Network,
    sent: client.Sent,
    running: batch_statistics.Statistics,
    labels: Tensor,
    generator: Generator | None,
    progress: Progress | None,
) -> Observation:
    """Build what the attacker sees, and nothing more than is granted."""
    granted = _granted(attack, setting, config["knowledge"])
    message, private, statistics = sent.message, sent.buffers, sent.statistics
    if attack.observes_other_victim:
        other = torch.arange(len(labels), device=labels.device).roll(-1)
        labels = labels[other]
        message = {name: tensor[other] for name, tensor in message.items()}
        private = {name: tensor[other] for name, tensor in private.items()}
        statistics = {name: tensor[other] for name, tensor in statistics.items()}
    size = _batch_size(attack, defense, setting, granted.defense)
    labels = labels[:, :size]
    known = {"known": labels, "counts": labels.sort(-1).values}.get(granted.labels.value)
    view = None
    if granted.defense is not Level.OBLIVIOUS:
        complete = rank(granted.defense) >= rank(Level.PUBLIC) or not sent.public
        view = View(defense, sent.public if complete else None)
    engine = config["engine"]
    timeout = engine["timeout"]
    return Observation(
        network=network,
        message=message,
        update=vmap(lambda row: defense.decode(row, sent.public))(message),
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
            backend=engine["backend"],
            width=engine["width"],
            compile=engine.get("compile", False),
            deadline=None if timeout is None else time.monotonic() + timeout,
            progress=progress,
        ),
    )


def _granted(attack: Attack, setting: Setting, level: str) -> Knowledge:
    """What a setting grants; controls are yardsticks and always have the public images."""
    auxiliary = setting.grants.auxiliary or attack.family == "control"
    return replace(setting.grants, defense=Level(level), auxiliary=auxiliary)


def _batch_size(attack: Attack, defense: Defense, setting: Setting, level: Level) -> int:
    """Images that an attacker takes a message to be of.

    Those of all clients in a sum, unless the attack could adapt to the defense and is not told of it.
    """
    adapts = attack.adaptive and attack.family != "control"
    return setting.batch_size * (1 if adapts and level is Level.OBLIVIOUS else defense.cohort)


def _of_victims(rows: list[ImageRow], guesses: Tensor | None, size: int) -> tuple[list[ImageRow], Tensor | None]:
    """Keep of a sum's images the victim's own, the first `size`, and of its guesses [N, B, ...] those matched to them.

    The assignment was one of all images of the sum, so a guess at another client's image is no guess at the victim's.
    """
    rows = [row for row in rows if row.image < size]
    if guesses is None or guesses.shape[1] == size:
        return rows, guesses
    matched = torch.tensor([row.matched for row in rows], device=guesses.device).view(-1, size)
    victims = torch.arange(len(guesses), device=guesses.device)[:, None]
    return [replace(row, matched=row.image) for row in rows], guesses[victims, matched]


def _rows(
    config: Mapping[str, Any],
    attack: Attack,
    data: Data,
    observation: Observation,
    sent: client.Sent,
    images: Tensor,
    labels: Tensor,
    answer: Reconstruction | None,
    status: list[str],
    seconds: float,
    resources: Resources,
) -> list[ImageRow]:
    norms = _norms(sent.message)
    shared = [
        {"status": state, "seconds": seconds, "message_norm": norm} for state, norm in zip(status, norms, strict=True)
    ]
    if answer is None:
        return [
            ImageRow.of({"victim": victim, "image": image, **shared[victim]})
            for victim in range(len(images))
            for image in range(images.shape[1])
        ]
    candidates = data.candidates(config["candidates"], config["tuning"])
    scored = metrics.score(answer.images, answer.labels, images, labels, candidates)
    truth, notes = None, {}
    if not attack.observes_other_victim:
        try:
            truth = attack.loss(observation, sent.images, sent.targets, sent.buffers)
        except Exception as error:
            # A diagnostic: without it the answer still counts, so the rows say what is missing, and why.
            notes["note"] = f"no loss at the truth: {_described(error, resources)}"
            log.warning("%s: %s", config["attack"]["label"], notes["note"])
    oracle = _oracle(answer, images)
    matched = torch.tensor([row["matched"] for row in scored]).view(len(images), -1)
    columns = {
        "loss": answer.loss,
        "loss_at_truth": truth,
        "iterations": answer.iterations,
        "gradient_evaluations": answer.gradient_evaluations,
        **answer.details,
        **_guessed(answer, sent, observation.network, matched),
    }
    values = {name: column.tolist() for name, column in columns.items() if column is not None}
    rows = []
    for row in scored:
        victim, image = row["victim"], row["image"]
        own = {name: column[victim] for name, column in values.items()}
        best = {} if oracle is None else {"oracle_psnr": oracle[victim][image]}
        rows.append(ImageRow.of({**row, **shared[victim], **own, **best, **notes}))
    return rows


def _oracle(answer: Reconstruction, images: Tensor) -> list[list[float]] | None:
    """PSNR [N][B] of the restart that the truth would have picked: a ceiling."""
    if answer.candidates is None:
        return None
    best = []
    for tries, truth in zip(answer.candidates, images, strict=True):
        scores = []
        for attempt in tries:
            cleaned = metrics.clean(attempt)[0]
            order = metrics.assign(attempt, truth)
            scores.append(metrics.psnr(cleaned[order], truth.double()))
        best.append(max(scores, key=lambda values: float(values.mean())).tolist())
    return best


def _guessed(answer: Reconstruction, sent: client.Sent, network: Network, matched: Tensor) -> dict[str, Tensor]:
    """Accuracy [N] of recovered private randomness (dropout masks, a row an image), rounded, over its live units.

    A unit is live if the client's loss depends on its mask: of others (silent ones, and those that only feed such) no
    message can tell it. NaN where there is none. `matched` [N, B] is the reconstruction of each true image, whose
    order the rows follow.
    """
    shared = [name for name in answer.guessed if name in sent.buffers]
    if not shared:
        return {}
    victims = torch.arange(len(matched))[:, None]
    hits = [
        (answer.guessed[name].cpu()[victims, matched].round() == sent.buffers[name].cpu().round()).flatten(1)
        for name in shared
    ]
    slopes = vmap(grad(lambda drawn, batch, targets: network.loss(batch, targets, buffers=drawn)))(
        sent.buffers, sent.images, sent.targets
    )
    live = torch.cat([slopes[name].cpu().flatten(1) != 0 for name in shared], dim=1)
    return {"mask_accuracy": (torch.cat(hits, dim=1) & live).sum(1) / live.sum(1)}


def _norms(message: dict[str, Tensor]) -> list[float]:
    squares = torch.stack([tensor.flatten(1).double().square().sum(1) for tensor in message.values()])
    norms: list[float] = squares.sum(0).sqrt().tolist()
    return norms


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a cell before it runs: families, threat model, and whether the attack adapts to the defense.

    An attack adapts if it knows the defense and that makes a difference: it learns what the defense does, was made
    against it, or matches through what the defense publishes (which takes the round's randomness, if it has any).
    """
    attack, defense = attack_and_defense(config)
    level = Level(config["knowledge"])
    parts = defense.defenses if isinstance(defense, Chain) else (defense,)
    blind = level is Level.PARAMETERS and any(type(part).public is not Defense.public for part in parts)
    answers = attack.family == "learned" or config["attack"]["name"] in defense.counter_attacks
    adapts = answers or (defense.is_adaptive_target and not blind)
    return {
        "attack_family": attack.family,
        "adaptive": attack.adaptive and level is not Level.OBLIVIOUS and adapts,
        "threat_model": attack.threat_model,
        "defense_family": defense.family,
    }


def _provenance(
    config: Mapping[str, Any],
    attack: Attack,
    defense: Defense,
    setting: Setting,
    sent: client.Sent,
    accuracy: float,
    answer: Reconstruction | None,
) -> dict[str, Any]:
    guarantee = defense.guarantee(setting)
    return {
        **identity(config),
        "stochastic": sent.drew,
        "bytes": float(np.mean(sent.bytes)),
        "dense_bytes": sent.dense_bytes,
        "epsilon": None if guarantee is None else asdict(guarantee),
        "client_seconds": sent.seconds,
        "model_accuracy": accuracy,
        "backend": "" if answer is None else answer.backend,
    }


def _data(config: Mapping[str, Any], resources: Resources) -> Data:
    options = json.dumps(config["options"], sort_keys=True)
    return _read(config["name"], options, resources.data_root, resources.download)


@functools.lru_cache(maxsize=8)
def _read(name: str, options: str, root: Path | None, download: bool) -> Data:
    return Data(registry.build("datasets", name, json.loads(options)), name, root, download)


@functools.lru_cache(maxsize=64)
def _untrained(model: str, shape: tuple[int, int, int], classes: int) -> nn.Module:
    config = json.loads(model)
    return initialise(registry.build("models", config["name"], config["options"]), shape, classes, 0)


def _network(config: Mapping[str, Any], setting: Setting, resources: Resources) -> tuple[nn.Module, float]:
    model, dataset, defense = (json.dumps(config[key], sort_keys=True) for key in ("model", "dataset", "defense"))
    prepares = type(build_defense_of(config["defense"])).prepare_model is not Defense.prepare_model
    return _prepared(model, dataset, defense if prepares else "", setting.epochs, config["seed"], resources)


@functools.lru_cache(maxsize=16)
def _prepared(
    model: str, dataset: str, defense: str, epochs: int, seed: int, resources: Resources
) -> tuple[nn.Module, float]:
    """Build and train the model; one that a defense changes is changed first and then trained."""
    config = json.loads(model)
    plugin: Model = registry.build("models", config["name"], config["options"])
    data = _data(json.loads(dataset), resources)
    if defense:
        weights = networks.initial_seed(plugin, config["name"], data, seed)
        plugin = _Changed(model=plugin, defense=build_defense_of(json.loads(defense)), weights=weights)
    return networks.prepare(plugin, config["name"], data, epochs, seed, resources.cache, resources.device)


@dataclass(frozen=True, kw_only=True)
class _Changed(Model):
    """A model that a defense has prepared, from the initial weights that it has without the defense."""

    reference = "gradleak"
    model: Model
    defense: Defense
    weights: tuple[str, ...]

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        return self.defense.prepare_model(initialise(self.model, shape, classes, *self.weights))


def _generator(config: Mapping[str, Any], data: Data, resources: Resources) -> Generator:
    """Return a copy of the granted generator; its labels mean something only if it learned the same classes."""
    prior = config["prior"]
    fitting = _fitting_prior(prior, data, resources)
    if isinstance(fitting, Generator):
        return fitting
    generator = copy.deepcopy(_trained_prior(json.dumps(prior, sort_keys=True), resources))
    generator.labelled = fitting.split.classes == data.split.classes
    return generator


def _fitting_prior(prior: Mapping[str, Any], data: Data, resources: Resources) -> Generator | Data:
    """Return the user's generator, or the dataset whose train split one learns; checked against the victims'."""
    if "source" in prior:
        weights = prior["weights"] and (resources.data_root or Path()) / prior["weights"]
        return load_generator(prior["source"], weights, data.shape)
    public = _data(prior["dataset"], resources)
    if public.shape != data.shape:
        raise GradleakError(
            f"prior: dataset {public.name!r} has images {public.shape}; those of {data.name!r} are {data.shape}"
        )
    return public


@functools.lru_cache(maxsize=4)
def _trained_prior(prior: str, resources: Resources) -> Generator:
    config = json.loads(prior)
    recipe = priors.Recipe(**config["options"])
    return priors.train_prior(_data(config["dataset"], resources), recipe, resources.cache, resources.device)


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


@functools.cache
def _versions() -> dict[str, str]:
    packages = ("torch", "torchvision", "torchmetrics", "numpy", "opacus")
    return {"gradleak": __version__, "python": platform.python_version(), **{p: version(p) for p in packages}}
