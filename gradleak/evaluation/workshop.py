"""What a worker makes once and keeps: data, networks, generators, and what the machine is."""

from __future__ import annotations

import copy
import functools
import json
import os
import platform
import traceback
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy.typing as npt
import torch
from torch import nn

from .. import __version__, registry, structure
from ..dataset import Data
from ..defense import Defense
from ..errors import GradleakError
from ..federation import client, utility
from ..model import Model, initialise, try_out
from ..paths import conceal, printable
from ..plugins import place_of, said
from ..process import default_cache
from ..search.generators import Generator, load_generator
from ..suite import AttackCell, Cell, GivenPrior, LearnedPrior, Part, build_defense
from ..threat import Knowledge, Power, Setting, Tampering
from ..training import networks, priors
from ..update import Network

Shape = tuple[int, int, int]
Prior = LearnedPrior | GivenPrior
_K = TypeVar("_K")
_V = TypeVar("_V")


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
            raise GradleakError(f"device {self.device!r} is not available (torch sees no CUDA device; use cpu)")
        try:
            float(torch.zeros((), device=self.device))  # A device without numbers (meta) cannot say what they are.
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise GradleakError(f"device {self.device!r} is not available ({reason}); use cpu or cuda") from error


Progress = Callable[[float, float], None]
"""Share of a cell done in [0, 1], and the attack's current mean loss."""


class Workshop:
    """What a worker makes once and keeps: a dataset read, a network trained, a generator."""

    def __init__(self, resources: Resources | None = None) -> None:
        """Start with nothing made."""
        self.resources = resources or Resources()
        self._data = _Kept[Part, Data](8)
        self._untrained = _Kept[tuple[Part, Shape, int], nn.Module](64)
        self._defended = _Kept[tuple[Part, Part, Part, int, str, int], tuple[nn.Module, float]](16)
        self._clients = _Kept[tuple[Part, Part | None, Setting, Part, Shape, int], Network](32)
        self._inspections = _Kept[tuple[Part, Part, Part, Setting, int], Any](32)
        self._networks = _Kept[tuple[Part, Part, Part | None, int, int, str], tuple[nn.Module, float]](24)
        self._generators = _Kept[LearnedPrior, Generator](4)

    def digest(self, name: str, options: Mapping[str, Any]) -> tuple[str, str, int]:
        """Return version, digest and number of train images of a dataset by its name and options."""
        data = self.data(Part(name, options=options))
        return data.version, data.digest, len(data.split.train)

    def described(self, error: BaseException) -> str:
        """Say what was raised and where, without the folders of this machine: stores are published."""
        text = described(error)
        folders = {"<cache>": self.resources.cache or default_cache(), "<data root>": self.resources.data_root}
        return conceal(text, folders)

    def victims_of(self, cell: AttackCell) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Images [N, B, C, H, W] and labels [N, B] of a cell's victims, for galleries."""
        images, labels = self.data(cell.dataset).victims(cell.victims, cell.setting.batch_size, cell.tuning)
        return images.numpy(), labels.numpy()

    def data(self, part: Part) -> Data:
        """Return the data of a dataset."""
        source = Part(part.name, options=part.options)  # Version and digest are what comes out.
        root, download = self.resources.data_root, self.resources.download
        return self._data.get(
            source,
            lambda: Data(registry.build("datasets", part.name, part.options), part.name, root, download),
        )

    def untrained(self, part: Part, shape: Shape, classes: int) -> nn.Module:
        """Return an untrained model, to look at its structure only."""

        def make() -> nn.Module:
            plugin: Model = registry.build("models", part.name, part.options)
            _refuse_too_large(plugin, part.name, shape, classes)
            try:
                module = initialise(plugin, shape, classes, 0)
            except (RuntimeError, MemoryError, OverflowError) as error:
                raise GradleakError(f"model {part.name!r}: {said(error)}") from error
            try_out(module, plugin, shape, classes)
            return module

        return self._untrained.get((part, shape, classes), make)

    def client(self, cell: AttackCell, data: Data) -> Network:
        """Return the untrained network of a cell's clients, as the server sends it, to look at its structure only."""
        changes = cell.built_defense.prepares or cell.built_defense.per_example_gradients
        guard, shape, classes = cell.built_defense if changes else Defense(), data.shape, data.classes

        def make() -> Network:
            module = self.untrained(cell.model, shape, classes)
            if cell.setting.server.surface is not Power.HONEST:
                prepared = guard.prepare_model(module)
                structure.mark(prepared, shape)
                module = cell.built_server.tamper(prepared, data.split.train, torch.Generator().manual_seed(0))
                return client.freeze(module, guard, cell.setting)
            return client.client_network(module, guard, cell.setting)

        key = (cell.model, cell.defense if changes else None, cell.setting, cell.dataset, shape, classes)
        return self._clients.get(key, make)

    def inspection(self, cell: Cell, make: Callable[[], _V]) -> _V:
        """Return how clients look at models, made now if it was not made before."""
        honest = replace(cell.setting, server=Tampering(), name="", grants=Knowledge())
        found: _V = self._inspections.get((cell.defense, cell.model, cell.dataset, honest, cell.seed), make)
        return found

    def network(self, cell: Cell, epochs: int | None = None) -> tuple[nn.Module, float]:
        """Return the model that an honest server sends, and the accuracy it was trained to.

        One that a defense changes is changed first and then trained, for so many epochs; by default the setting's.
        """
        changed = cell.defense if cell.built_defense.prepares else None
        epochs, seed = cell.setting.epochs if epochs is None else epochs, cell.seed

        def make() -> tuple[nn.Module, float]:
            plugin: Model = registry.build("models", cell.model.name, cell.model.options)
            data = self.data(cell.dataset)
            if changed is not None:
                weights = networks.initial_seed(plugin, cell.model.name, data, seed)
                plugin = _Changed(model=plugin, defense=cell.built_defense, weights=weights)
            plugin = self.begun(cell, plugin)
            cache, device = self.resources.cache, self.resources.device
            code = cell.model.code + ("" if changed is None else changed.code)
            module, score = networks.prepare(plugin, cell.model.name, data, epochs, seed, cache, device, code=code)
            return (networks.calibrated(module, data) if statistics == "calibrated" else module), score

        statistics = cell.setting.statistics if epochs == 0 else "initial"
        network = self._networks.get((cell.model, cell.dataset, changed, epochs, seed, statistics), make)
        if isinstance(cell, AttackCell) and cell.before is not None:
            return self._under_defense(cell, network[0])
        return network

    def begun(self, cell: Cell, plugin: Model) -> Model:
        """Return the model whose initial weights training begins with: as it is; a twin begins elsewhere."""
        return plugin

    def _under_defense(self, cell: AttackCell, module: nn.Module) -> tuple[nn.Module, float]:
        """Return the model of an attacked round that comes after others under the same defense, and its accuracy."""
        before = cell.before
        assert before is not None
        recipe, seed, text = before.recipe, cell.seed, before.recipe.model_dump_json()

        def make() -> tuple[nn.Module, float]:
            defense = build_defense(cell.defense.name, cell.defense.options)
            mark = json.dumps(cell.defense.stored(), sort_keys=True)
            data, cache, device = self.data(cell.dataset), self.resources.cache, self.resources.device
            return utility.prepare(module, data, defense, recipe, seed, mark, cache, device)

        return self._defended.get((cell.model, cell.dataset, cell.defense, cell.setting.epochs, text, seed), make)

    def generator(self, prior: Prior, data: Data) -> Generator:
        """Return a copy of a granted generator; its labels mean something only if it learned the same classes."""
        fitting = self.fitting(prior, data)
        if isinstance(prior, GivenPrior) or isinstance(fitting, Generator):
            assert isinstance(fitting, Generator)
            return fitting
        generator = copy.deepcopy(self._generators.get(prior, lambda: self._learned(prior)))
        generator.labelled = fitting.split.classes == data.split.classes
        return generator

    def fitting(self, prior: Prior, data: Data) -> Generator | Data:
        """Return the user's generator, or the dataset whose train split one learns.

        Raises:
            GradleakError: it makes, or holds, other images than the victims'.
        """
        if isinstance(prior, GivenPrior):
            weights = prior.weights and (self.resources.data_root or Path()) / prior.weights
            return load_generator(prior.source, weights or None, data.shape)
        public = self.data(prior.dataset)
        if public.shape != data.shape:
            raise GradleakError(
                f"prior: dataset {public.name!r} has images {public.shape}; those of {data.name!r} are {data.shape}"
            )
        return public

    def _learned(self, prior: LearnedPrior) -> Generator:
        recipe = priors.Recipe(**prior.options)
        return priors.train_prior(self.data(prior.dataset), recipe, self.resources.cache, self.resources.device)


def described(error: BaseException) -> str:
    """Say what was raised and where, in one line."""
    text = printable(said(error))
    if not isinstance(error, GradleakError) and not place_of(error):
        last = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{text} ({Path(last.filename).name}:{last.lineno})"
    return text


class _Kept(Generic[_K, _V]):
    """The last things made, each under what it was made of."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._things: OrderedDict[_K, _V] = OrderedDict()

    def get(self, key: _K, make: Callable[[], _V]) -> _V:
        """Return what is kept under a key, made now if there is nothing."""
        if key not in self._things:
            thing = make()
            while len(self._things) >= self._most:
                self._things.popitem(last=False)
            self._things[key] = thing
        self._things.move_to_end(key)
        return self._things[key]


def _refuse_too_large(plugin: Model, name: str, shape: Shape, classes: int) -> None:
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


@dataclass(frozen=True, kw_only=True)
class _Changed(Model):
    """A model that a defense has prepared, from the initial weights that it has without the defense."""

    reference = "gradleak"
    model: Model
    defense: Defense
    weights: tuple[str, ...]

    def build(self, shape: Shape, classes: int) -> nn.Module:
        return self.defense.prepare_model(initialise(self.model, shape, classes, *self.weights))


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
