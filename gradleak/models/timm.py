"""The image classifiers of timm."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import GradleakError
from ..model import Model, Normalise
from ._foreign import MEAN, STD, digest_of, load, quieten, try_out


@dataclass(frozen=True, kw_only=True)
class Timm(Model):
    """A network of timm as it comes, with a head for the dataset's classes; nothing is downloaded.

    Images are normalised as the network's own configuration says. Dropout and stochastic depth are off.
    """

    reference = "timm, https://github.com/huggingface/pytorch-image-models"

    name: str
    """As timm calls it, e.g. `resnet10t`, `convnext_atto`, `vit_tiny_patch16_224`."""
    weights: str | None = None
    """A local safetensors file or state dict; a head for another number of classes is left as initialised."""
    digest: str = ""
    """SHA-256 of the weights; filled in where it is not given, so that results name what they were computed with."""

    def __post_init__(self) -> None:
        """Refuse weights that are not there or are others."""
        if self.weights is not None:
            object.__setattr__(self, "digest", digest_of(self.weights, self.digest, self._where))
        elif self.digest:
            raise GradleakError(f"{self._where}: digest: there are no weights")

    @property
    def _where(self) -> str:
        return f"model 'timm' {self.name!r}"

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Return the network; see `Model.build`."""
        try:
            timm: Any = importlib.import_module("timm")
        except ImportError as error:
            raise GradleakError(f"{self._where} needs timm: pip install 'gradleak[timm]'") from error
        if self.name not in timm.list_models():
            raise GradleakError(f"{self._where}: timm {timm.__version__} has no such network (timm.list_models())")
        channels, *size = shape
        options = {"pretrained": False, "num_classes": classes, "in_chans": channels}
        try:
            try:
                network = timm.create_model(self.name, img_size=tuple(size), **options)
            except TypeError:  # a network that takes any size has no such option
                network = timm.create_model(self.name, **options)
        except (ValueError, RuntimeError, AssertionError, TypeError) as error:
            raise GradleakError(f"{self._where} cannot be built for images {shape}: {error}") from error
        if self.weights is not None:
            load(network, self.weights, self._where)
        usual = network.default_cfg
        mean, std = usual.get("mean", MEAN), usual.get("std", STD)
        if channels != len(mean):
            mean, std = sum(mean) / len(mean), sum(std) / len(std)
        whole = nn.Sequential(Normalise(channels, mean, std), quieten(network))
        return try_out(whole, shape, classes, self._where)
