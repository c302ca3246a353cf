"""What an audit is asked for: a model, data, how the clients train, and how long it may take."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from torch import nn

from .. import structure
from ..dataset import Data
from ..errors import GradleakError
from ..evaluation.workshop import Resources
from ..federation.trainable import Trainable
from ..intake import network_of
from ..model import Normalise
from ..suite import DatasetPart, Part, build_setting
from ..threat import Setting
from .inputs import Labels, Shape, Source, data_of, read
from .plan import Bench, Own

_P = ParamSpec("_P")
_R = TypeVar("_R")

BUDGET = 600.0
"""Seconds."""
_VICTIMS, _LARGE = 8, 5_000_000
"""Clients that are attacked, and parameters of a model from which half as many are."""

Guard = str | tuple[str, dict[str, Any]]
"""A defense by its name, or with its options."""
Tell = Callable[[str, float], None]
"""Told in a few words what is done now, and the seconds that are left."""


def _untold(what: str, left: float) -> None:
    pass


@dataclass(frozen=True, eq=False)
class Request:
    """All that `gradleak.audit` takes."""

    model: nn.Module
    """Images [B, C, H, W] in [0, 1] to logits; as it is, its weights are those that clients are sent."""
    data: Source | Data
    """A folder, tensors (images, labels), pairs of image and label, or `Data`."""
    _: KW_ONLY
    labels: Labels = None
    """Of a folder's files: a CSV, a mapping, a function of the file's name; by default its class folders."""
    shape: Shape | None = None
    """(C, H, W) to which files are fitted."""
    batch_size: int = 1
    """Images of a client."""
    client: str | dict[str, Any] | None = None
    """Loss and optimiser, as in a suite: a name of `gradleak list clients`, or {name: {options}}."""
    local_steps: int = 1
    """Of FedAvg; with `local_lr`."""
    local_batch_size: int | None = None
    """Images of a local step; by default the whole batch."""
    local_lr: float | None = None
    """Rate of local steps; None is one gradient (FedSGD)."""
    trainable: Trainable = "all"
    """What is trained and sent: all, head, or names."""
    mode: str = "eval"
    """Of batch normalisation: eval or train."""
    defense: Guard = "none"
    """Of the training, by name or with options; `a + b` chains several."""
    normalise: tuple[Sequence[float], Sequence[float]] | None = None
    """Mean and standard deviation by channel, where the model expects normalised images."""
    budget: float = BUDGET
    """Seconds for all of it."""
    victims: int | None = None
    """Clients that are attacked; by default up to 8 as the data allows, of large models up to 4."""
    remedies: Sequence[Guard] | None = None
    """Defenses to try if it leaks; by default those of the registry."""
    seed: int = 0
    """Of the clients' and the attacks' draws."""
    device: str = "cpu"
    """cpu or cuda."""
    store: Path | None = None
    """Where finished cells are kept, for `gradleak leaderboard` and `gradleak report`."""
    tell: Tell | None = None
    """Told what is done now."""

    @property
    def guard(self) -> tuple[str, dict[str, Any]]:
        """The defense of the training with its options."""
        return (self.defense, {}) if isinstance(self.defense, str) else self.defense

    @property
    def told(self) -> Tell:
        """Who is told what is done now; nobody where none is named."""
        return self.tell or _untold

    def bench(self) -> Bench:
        """Return what the cells of the audit are made of.

        Raises:
            GradleakError: model, data and client do not fit each other.
        """
        module, images = self._fitted()
        setting = self._setting()
        there = len(images.split.test) // 2
        most = there // self.batch_size
        if most < 1:
            raise GradleakError(
                f"batch_size {self.batch_size}: only {there} images can be attacked (allowed: 1 to {there})"
            )
        size = sum(tensor.numel() for tensor in module.parameters())
        weights = hashlib.sha256(b"".join(t.detach().cpu().numpy().tobytes() for t in module.state_dict().values()))
        return Bench(
            workshop=Own(module, images, Resources(device=self.device)),
            setting=setting,
            victims=min(_VICTIMS if size < _LARGE else _VICTIMS // 2, most) if self.victims is None else self.victims,
            seed=self.seed,
            model=Part("own", type(self.model).__name__, {"weights": weights.hexdigest()}),
            dataset=DatasetPart("own", images.name, {}, "1", "", images.digest),
        )

    def _setting(self) -> Setting:
        given = {
            "batch_size": self.batch_size,
            "mode": self.mode,
            "trainable": self.trainable,
            "local_steps": self.local_steps,
            "local_batch_size": self.local_batch_size,
            "local_lr": self.local_lr,
            "client": self.client or None,
        }
        return build_setting({key: value for key, value in given.items() if value is not None}, "audit")

    def _fitted(self) -> tuple[nn.Module, Data]:
        """Return the model, ready to be frozen, and the data that it takes."""
        if not isinstance(self.model, nn.Module):
            raise GradleakError(f"model: {type(self.model).__name__} (allowed: torch.nn.Module)")
        module: nn.Module = self.model.eval()
        if isinstance(self.data, Data):
            size = self.data.shape
        else:
            pixels, numbers = read(self.data, self.labels, self.shape)
            channels, height, width = pixels.shape[1:]
            size = (int(channels), int(height), int(width))
        if self.normalise is not None:
            mean, std = self.normalise
            if len(mean) not in (1, size[0]) or len(std) not in (1, size[0]):
                raise GradleakError(
                    f"normalise: {len(mean)} means and {len(std)} deviations (allowed: {size[0]} of each, or 1)"
                )
            module = nn.Sequential(Normalise(size[0], tuple(mean), tuple(std)), module).eval()
        classes = structure.of(network_of(module, size).module).classes
        structure.mark(module, size)
        return module, self.data if isinstance(self.data, Data) else data_of(pixels, numbers, classes)


def taking(made: Callable[_P, Request]) -> Callable[[Callable[[Request], _R]], Callable[_P, _R]]:
    """Let a function of a request be called with what requests are made of, so that no list of it is written twice."""

    def changed(function: Callable[[Request], _R]) -> Callable[_P, _R]:
        @wraps(function)
        def called(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            return function(made(*args, **kwargs))

        result = inspect.signature(function).return_annotation
        called.__signature__ = inspect.signature(made).replace(return_annotation=result)  # type: ignore[attr-defined]
        return called

    return changed
