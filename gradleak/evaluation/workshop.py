"""What a worker makes once and keeps: data, networks, generators, and what the machine is."""

from __future__ import annotations

import copy
import functools
import json
import os
import platform
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import nn

from .. import __version__, registry
from ..dataset import Data
from ..defense import Defense
from ..errors import GradleakError
from ..federation import client
from ..model import Model, initialise, try_out
from ..paths import conceal, printable
from ..plugins import place_of, said
from ..process import default_cache
from ..search.generators import Generator, load_generator
from ..suite import Cell, build_defense_of, build_setting
from ..threat import Setting
from ..training import networks, priors
from ..update import Network


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
            float(torch.zeros((), device=self.device))  # A device without numbers (meta) cannot say what they are.
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise GradleakError(f"device {self.device!r} is not there ({reason}); use cpu or cuda") from error


Progress = Callable[[float, float], None]
"""Share of a cell done in [0, 1], and the attack's current mean loss."""


def digest(resources: Resources) -> Callable[[str, Mapping[str, Any]], tuple[str, str]]:
    """Return a function from a dataset's name and options to its version and digest."""

    def of(name: str, options: Mapping[str, Any]) -> tuple[str, str]:
        data = data_of({"name": name, "options": options}, resources)
        return data.version, data.digest

    return of


def described(error: BaseException, resources: Resources) -> str:
    """Say what was raised and where, without the folders of this machine: stores are published."""
    text = printable(said(error))
    if not isinstance(error, GradleakError) and not place_of(error):
        last = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{text} ({Path(last.filename).name}:{last.lineno})"
    return conceal(text, {"<cache>": resources.cache or default_cache(), "<data root>": resources.data_root})


def victims_of(cell: Cell, resources: Resources) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Images [N, B, C, H, W] and labels [N, B] of a cell's victims, for galleries."""
    config = cell.config
    batch_size = config["setting"]["batch_size"]
    data = data_of(config["dataset"], resources)
    images, labels = data.victims(config["victims"], batch_size, config["tuning"])
    return images.numpy(), labels.numpy()


def data_of(config: Mapping[str, Any], resources: Resources) -> Data:
    """Return the data of a cell; read once in a worker."""
    options = json.dumps(config["options"], sort_keys=True)
    return _read(config["name"], options, resources.data_root, resources.download)


@functools.lru_cache(maxsize=8)
def _read(name: str, options: str, root: Path | None, download: bool) -> Data:
    return Data(registry.build("datasets", name, json.loads(options)), name, root, download)


@functools.lru_cache(maxsize=64)
def untrained(model: str, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Return an untrained model, to look at its structure only."""
    config = json.loads(model)
    plugin: Model = registry.build("models", config["name"], config["options"])
    _refuse_too_large(plugin, config["name"], shape, classes)
    try:
        module = initialise(plugin, shape, classes, 0)
    except (RuntimeError, MemoryError, OverflowError) as error:
        raise GradleakError(f"model {config['name']!r}: {said(error)}") from error
    try_out(module, plugin, shape, classes)
    return module


def client_of(config: Mapping[str, Any], data: Data) -> Network:
    """Return the untrained network of a cell's clients, to look at its structure only."""
    model, defense, setting = (json.dumps(config[key], sort_keys=True) for key in ("model", "defense", "setting"))
    prepares = type(build_defense_of(config["defense"])).prepare_model is not Defense.prepare_model
    per_example = build_defense_of(config["defense"]).per_example_gradients
    return _client(model, defense if prepares or per_example else "", setting, data.shape, data.classes)


@functools.lru_cache(maxsize=32)
def _client(model: str, defense: str, setting: str, shape: tuple[int, int, int], classes: int) -> Network:
    guard = build_defense_of(json.loads(defense)) if defense else Defense()
    return client.client_network(untrained(model, shape, classes), guard, build_setting(json.loads(setting)))


def _refuse_too_large(plugin: Model, name: str, shape: tuple[int, int, int], classes: int) -> None:
    """Refuse a model whose weights this machine cannot hold, before any memory is touched."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            module = plugin.build(shape, classes)
    except (Exception, SystemExit):  # Not every model can be built without memory; the real one says what is wrong.
        return
    if not isinstance(module, nn.Module):
        return
    tensors = [t for t in (*module.parameters(), *module.buffers()) if not nn.parameter.is_lazy(t)]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**30
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    if size > memory:
        raise GradleakError(f"model {name!r}: its weights take {size:,.0f} GiB; this machine has {memory:,.0f} GiB")


def network_of(config: Mapping[str, Any], setting: Setting, resources: Resources) -> tuple[nn.Module, float]:
    """Return the model that a client is sent, and the accuracy it was trained to."""
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
    data = data_of(json.loads(dataset), resources)
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


def generator_of(config: Mapping[str, Any], data: Data, resources: Resources) -> Generator:
    """Return a copy of the granted generator; its labels mean something only if it learned the same classes."""
    prior = config["prior"]
    fitting = fitting_prior(prior, data, resources)
    if isinstance(fitting, Generator):
        return fitting
    generator = copy.deepcopy(_trained_prior(json.dumps(prior, sort_keys=True), resources))
    generator.labelled = fitting.split.classes == data.split.classes
    return generator


def fitting_prior(prior: Mapping[str, Any], data: Data, resources: Resources) -> Generator | Data:
    """Return the user's generator, or the dataset whose train split one learns; checked against the victims'."""
    if "source" in prior:
        weights = prior["weights"] and (resources.data_root or Path()) / prior["weights"]
        return load_generator(prior["source"], weights, data.shape)
    public = data_of(prior["dataset"], resources)
    if public.shape != data.shape:
        raise GradleakError(
            f"prior: dataset {public.name!r} has images {public.shape}; those of {data.name!r} are {data.shape}"
        )
    return public


@functools.lru_cache(maxsize=4)
def _trained_prior(prior: str, resources: Resources) -> Generator:
    config = json.loads(prior)
    recipe = priors.Recipe(**config["options"])
    return priors.train_prior(data_of(config["dataset"], resources), recipe, resources.cache, resources.device)


def device_name(device: str) -> str:
    """Return what the device calls itself."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of what computes numbers."""
    packages = ("torch", "torchvision", "torchmetrics", "numpy", "opacus")
    return {"gradleak": __version__, "python": platform.python_version(), **{p: version(p) for p in packages}}
