"""Training of the attacked models: one deterministic recipe, and a cache of what it made."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import seeds, structure
from ..dataset import Data, Images
from ..errors import GradleakError
from ..model import Model, initialise
from ..process import default_cache
from ..registry import options_of
from ..state import restored
from ..update import copied

RECIPE = "1"
"""Raised whenever training or a built-in architecture changes, so that no old checkpoint is used again."""

BATCH_SIZE = 32
LEARNING_RATE = 1e-3

Progress = Callable[[int, int], None]
"""Called after every epoch with (epochs done, epochs in all)."""


def prepare(
    model: Model,
    name: str,
    data: Data,
    epochs: int,
    seed: int,
    cache: Path | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    code: str = "",
) -> tuple[nn.Module, float]:
    """Return the network of a training state, on the CPU in eval mode, and its test accuracy in [0, 1].

    The result depends on the model and its options, the data, `epochs` and `seed`; it is kept in `cache`
    (by default `$GRADLEAK_CACHE`, else `~/.cache/gradleak`) and read from there the next time.

    Args:
        model: the architecture.
        name: its registry name.
        data: the dataset; the train split is trained on, the test split measured on.
        epochs: passes over the train split; 0 leaves the network untrained.
        seed: decides the initial weights and the order of the batches.
        cache: folder of the checkpoints.
        device: where to train; checkpoints of different kinds of device are different.
        progress: told about finished epochs.
        code: digest of the code of the architecture, so that an edited one does not find its old checkpoint.

    Raises:
        GradleakError: `epochs` is negative, training diverged, the cache cannot be written, or the checkpoint
            in it is damaged.
    """
    drawn = initial_seed(model, name, data, seed)
    network = initialise(model, data.shape, data.classes, *drawn)
    key = _key(network, drawn[1], data, epochs, seed, device, code)
    path = (cache or default_cache()) / f"{name}-{key}.safetensors"

    def trained() -> float:
        with restored():
            # Random layers, which a client in eval mode may have, draw from the global generator.
            torch.manual_seed(seeds.derive("random layers", data.name, seed))
            return train(network, data, epochs, seed, device, progress)

    return network, kept(network, path, trained)


def kept(network: nn.Module, path: Path, train: Callable[[], float]) -> float:
    """Load a network in place from a checkpoint, or train it in place and write one; return its accuracy in [0, 1].

    It is left on the CPU, in eval mode.

    Raises:
        GradleakError: the checkpoint cannot be written, or is damaged.
    """
    if path.exists():
        score = _load(network, path)
    else:
        score = train()
        network.cpu()
        _save(network, score, path)
    network.eval()
    return score


CALIBRATION = 512
"""Public images, at most, whose statistics a calibrated model has."""


def calibrated(network: nn.Module, data: Data) -> nn.Module:
    """Return a copy whose batch normalisation has the statistics of public images, layer by layer as they arrive.

    They are averaged over batches of 64 in the train split's own order; no weight is changed.
    """
    found = copied(network)
    structure.mark(found, data.shape)
    kinds = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d
    layers = [layer for layer in found.modules() if isinstance(layer, kinds) and layer.running_mean is not None]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a plain average
        layer.train()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for images in data.split.train.images[:CALIBRATION].split(64):
            if len(images) > 1:
                found(images)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    return found.eval()


def initial_seed(model: Model, name: str, data: Data, seed: int) -> tuple[str, ...]:
    """What the initial weights of a model depend on: its name, its options, the dataset's name, and `seed`."""
    return name, json.dumps(options_of(model), sort_keys=True, default=str), data.name, str(seed)


def train(
    network: nn.Module,
    data: Data,
    epochs: int,
    seed: int,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> float:
    """Train a network in place and return its test accuracy in [0, 1]; it stays on `device`, in eval mode.

    Cross-entropy, Adam (Kingma and Ba 2015, arXiv:1412.6980), a cosine from 1e-3 to 0, batches of about 32
    images, no augmentation. The global generator is not used. On a CPU, equal numbers of threads give equal
    bits.

    Raises:
        GradleakError: `epochs` is negative or the loss became infinite or NaN.
    """
    if epochs < 0:
        raise GradleakError(f"training: epochs = {epochs} (allowed: 0 or more)")
    network.to(device).train()
    images, labels = data.split.train.images.to(device), data.split.train.labels.to(device)
    # Even parts, so that no batch is left with the single image that batch normalisation refuses.
    batches = math.ceil(len(labels) / BATCH_SIZE)
    optimiser = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, epochs * batches))
    stream = seeds.generator("training", data.name, seed)
    for epoch in range(epochs):
        order = torch.randperm(len(labels), generator=stream).to(device)
        total = torch.zeros((), device=device)
        with torch.backends.cudnn.flags(benchmark=False, deterministic=True, allow_tf32=False):
            for batch in order.tensor_split(batches):
                loss = F.cross_entropy(network(images[batch]), labels[batch])
                loss.backward()
                optimiser.step()
                optimiser.zero_grad()  # last, so that the network leaves without gradients
                schedule.step()
                total += loss.detach()
        if not total.isfinite():
            raise GradleakError(f"training on {data.name!r}: loss {total.item()} in epoch {epoch + 1}")
        if progress is not None:
            progress(epoch + 1, epochs)
    return accuracy(network, data.split.test)


def accuracy(network: nn.Module, images: Images) -> float:
    """Return the share of images whose label has the largest logit, in [0, 1]; leaves eval mode on."""
    network.eval()
    device = next(network.parameters()).device
    correct = 0
    with torch.inference_mode():
        for start in range(0, len(images), 256):
            batch = images[start : start + 256]
            correct += int((network(batch.images.to(device)).argmax(1).cpu() == batch.labels).sum())
    return correct / len(images)


def _key(
    network: nn.Module, options: str, data: Data, epochs: int, seed: int, device: torch.device | str, code: str
) -> str:
    # Layers and initial weights are in it for those whose code nobody gives.
    parts = (
        RECIPE,
        options,
        repr(network),
        digest_of(network),
        data.name,
        data.digest,
        epochs,
        seed,
        torch.device(device).type,
        torch.__version__,
        *([code] if code else []),
    )
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def digest_of(network: nn.Module) -> str:
    """Hash of a network's weights and buffers."""
    return _digest(network.state_dict())


def _digest(tensors: Mapping[str, Tensor]) -> str:
    hasher = hashlib.sha256()
    for name in sorted(tensors):
        hasher.update(name.encode())
        hasher.update(tensors[name].contiguous().numpy().tobytes())
    return hasher.hexdigest()


def _save(network: nn.Module, score: float, path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(tensors, temporary, {"accuracy": repr(score), "digest": _digest(tensors)})
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        message = f"cannot write checkpoint {path}: {error}; GRADLEAK_CACHE chooses another folder"
        raise GradleakError(message) from error


def _load(network: nn.Module, path: Path) -> float:
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if facts.get("digest") != _digest(tensors):
            raise ValueError("its weights do not have the recorded hash")
        network.load_state_dict(tensors)
        return float(facts["accuracy"])
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise GradleakError(f"damaged checkpoint {path}: {error}; delete it to train again") from error
