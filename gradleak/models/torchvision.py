"""The image classifiers of torchvision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torchvision
from torch import nn

from ..errors import GradleakError, unknown
from ..model import Model, Normalise
from ._foreign import MEAN, STD, Colours, digest_of, load, quieten, try_out


@dataclass(frozen=True, kw_only=True)
class TorchVision(Model):
    """A network of torchvision as it comes, with a head for the dataset's classes; nothing is downloaded.

    Images are normalised by ImageNet's mean and deviation; grey ones by their averages, and then given three times.
    Dropout and stochastic depth are off. Vision transformers are built for the size of the images. Networks made for
    large images may leave nothing of small ones: `resnet18` of this package has a stem for those.
    """

    reference = "torchvision, https://pytorch.org/vision/stable/models.html"

    name: str
    """As torchvision calls it, e.g. `resnet18`, `mobilenet_v2`, `convnext_tiny`."""
    weights: str | None = None
    """A local safetensors file or state dict; a head for another number of classes is left as initialised."""
    digest: str = ""
    """SHA-256 of the weights; filled in where it is not given, so that results name what they were computed with."""

    def __post_init__(self) -> None:
        """Refuse an unknown network, and weights that are not there or are others."""
        known = torchvision.models.list_models(module=torchvision.models)
        if self.name not in known:
            raise unknown("torchvision network", self.name, known)
        if self.weights is not None:
            object.__setattr__(self, "digest", digest_of(self.weights, self.digest, self._where))
        elif self.digest:
            raise GradleakError(f"{self._where}: digest: there are no weights")

    @property
    def _where(self) -> str:
        return f"model 'torchvision' {self.name!r}"

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Return the network; see `Model.build`."""
        channels, height, width = shape
        if channels not in (1, 3):
            raise GradleakError(f"{self._where} takes images of 1 or 3 channels, not {channels}")
        options: dict[str, Any] = {"num_classes": classes}
        if self.name in ("googlenet", "inception_v3"):
            options |= {"aux_logits": False, "init_weights": True}
        if self.name.startswith("vit_"):
            if height != width:
                raise GradleakError(f"{self._where} takes square images, not {height}x{width}")
            options["image_size"] = height
        try:
            network = torchvision.models.get_model(self.name, weights=None, **options)
        except (ValueError, RuntimeError, TypeError) as error:
            raise GradleakError(f"{self._where} cannot be built for images {shape}: {error}") from error
        if self.weights is not None:
            load(network, self.weights, self._where)
        mean, std = (MEAN, STD) if channels == 3 else (sum(MEAN) / 3, sum(STD) / 3)
        whole = nn.Sequential(Normalise(channels, mean, std), Colours(), quieten(network))
        return try_out(whole, shape, classes, self._where)
