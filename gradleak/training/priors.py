"""Training of gradleak's own generators: a variational autoencoder's decoder, one recipe, and its cache."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, cast

import torch
import torch.nn.functional as F
from annotated_types import Ge
from PIL import Image
from torch import Tensor, nn

from .. import seeds
from ..dataset import Data, Images
from ..errors import GradleakError
from ..process import default_cache
from ..search.generators import Decoder, Generator
from .networks import _digest, _load, _save

RECIPE = "1"
"""Raised whenever training or the architecture changes, so that no old checkpoint is used again."""

BATCH_SIZE = 64
LEARNING_RATE = 2e-3
UNLABELLED = 0.1
"""Share of images trained on with their class hidden, so that the decoder also works without one."""

Progress = Callable[[int, int], None]
"""Called after every epoch with (epochs done, epochs in all)."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a prior is trained."""

    latent: Annotated[int, Ge(1)] = 64
    """Length of the code."""
    width: Annotated[int, Ge(1)] = 16
    """Channels at the images' resolution; twice as many at every halving."""
    epochs: Annotated[int, Ge(1)] = 30
    seed: int = 0


class Autoencoder(nn.Module):
    """Encoder and `decoder` of a variational autoencoder (Kingma and Welling, arXiv:1312.6114)."""

    def __init__(self, shape: tuple[int, int, int], classes: int, recipe: Recipe):
        """Build both for images of shape (C, H, W); the encoder mirrors the decoder."""
        super().__init__()
        self.decoder = Decoder(shape, classes, recipe.latent, recipe.width)
        coarse = self.decoder.shapes()
        channels = [shape[0]] + [stage["features"][0] for stage in reversed(coarse[1:])]
        layers: list[nn.Module] = []
        for index, (inputs, outputs) in enumerate(itertools.pairwise(channels)):
            stride = 1 if index == 0 else 2
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.SiLU()]
        self.encoder = nn.Sequential(*layers, nn.Flatten())
        size = math.prod(coarse[1]["features"])
        self.moments = nn.Linear(size + classes, 2 * recipe.latent)

    def encode(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance [K, latent] of the code of images [K, C, H, W]."""
        mean, log_variance = self.moments(torch.cat([self.encoder(images - 0.5), targets], dim=1)).chunk(2, dim=1)
        return mean, log_variance.clamp(-10, 4)


def train_prior(
    data: Data,
    recipe: Recipe | None = None,
    cache: Path | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Generator:
    """Return a generator trained on the public train split, on the CPU in eval mode; from the cache if it is there.

    It never sees a victim: victims come from the test split. Equal data, recipe, kind of device and number of
    threads give equal weights.

    Args:
        data: the dataset whose train split is learned.
        recipe: how; the defaults when None.
        cache: folder of the checkpoints (by default `$GRADLEAK_CACHE`, else `~/.cache/gradleak`).
        device: where to train.
        progress: told about finished epochs.

    Raises:
        GradleakError: training diverged, the cache cannot be written, or the checkpoint in it is damaged.
    """
    recipe = recipe or Recipe()
    with seeds.drawing(seeds.derive("prior", recipe.seed)):
        autoencoder = Autoencoder(data.shape, data.classes, recipe)
    start = _digest(autoencoder.state_dict())  # so that an edited architecture does not find an old checkpoint
    parts = (RECIPE, asdict(recipe), start, data.name, data.digest, torch.device(device).type, torch.__version__)
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    path = (cache or default_cache()) / f"prior-{data.name}-{key}.safetensors"
    decoder = autoencoder.decoder
    if path.exists():
        _load(decoder, path)
    else:
        fit(autoencoder, data.split.train, recipe, data.name, device, progress)
        decoder.cpu()
        _save(decoder, 0.0, path)
    return decoder.eval().requires_grad_(False)


def fit(
    autoencoder: Autoencoder,
    images: Images,
    recipe: Recipe,
    name: str,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> None:
    """Train in place: squared error at its own best scale plus KL, Adam, a cosine from 2e-3 to 0.

    With the noise of the pixels at its maximum likelihood the error enters as log(MSE) times half the pixels,
    which leaves no weight to tune (Rybkin et al., arXiv:2006.13202). Afterwards a Gaussian is fitted to the
    codes of each class, so that a random code is one of its class (Ghosh et al., arXiv:1903.12436).

    Raises:
        GradleakError: the loss became infinite or NaN.
    """
    autoencoder.to(device).train()
    pixels, labels = images.images.to(device), images.labels.to(device)
    batches = math.ceil(len(images) / BATCH_SIZE)
    optimiser = torch.optim.Adam(autoencoder.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, recipe.epochs * batches)
    stream = seeds.generator("prior-training", name, recipe.seed)
    classes = autoencoder.decoder.classes
    for epoch in range(recipe.epochs):
        order = torch.randperm(len(images), generator=stream).to(device)
        total = torch.zeros((), device=device)
        with torch.backends.cudnn.flags(benchmark=False, deterministic=True, allow_tf32=False):
            for batch in order.tensor_split(batches):
                shown = torch.rand(len(batch), 1, generator=stream) >= UNLABELLED
                noise = torch.randn(len(batch), recipe.latent, generator=stream).to(device)
                targets = F.one_hot(labels[batch], classes) * shown.to(device).float()
                loss = _loss(autoencoder, pixels[batch], targets, noise)
                loss.backward()
                optimiser.step()
                optimiser.zero_grad()
                schedule.step()
                total += loss.detach()
        if not total.isfinite():
            raise GradleakError(f"prior of {name!r}: loss {total.item()} in epoch {epoch + 1}")
        if progress is not None:
            progress(epoch + 1, recipe.epochs)
    autoencoder.eval()
    _whiten(autoencoder, pixels, labels)


@torch.no_grad()
def _whiten(autoencoder: Autoencoder, images: Tensor, labels: Tensor) -> None:
    """Give the decoder the Gaussian of each class's codes, its covariance drawn towards that of all codes."""
    decoder = autoencoder.decoder
    known = F.one_hot(labels, decoder.classes).to(images)
    latent = decoder.latent
    common = torch.zeros(latent, latent).to(images)
    for label in [decoder.classes, *range(decoder.classes)]:  # the unknown class, all images, comes first
        chosen = (labels == label) | (label == decoder.classes)
        if not chosen.any():
            continue
        parts = zip(images[chosen].split(256), (known[chosen] * (label < decoder.classes)).split(256), strict=True)
        moments = [autoencoder.encode(some, targets) for some, targets in parts]
        mean, log_variance = (torch.cat(column) for column in zip(*moments, strict=True))
        centre = mean.mean(0)
        scatter = (mean - centre).T @ (mean - centre) + log_variance.exp().sum(0).diag()
        if label == decoder.classes:
            common = scatter / len(mean)
        decoder.seed.mean[label] = centre
        decoder.seed.factor[label] = torch.linalg.cholesky((scatter + latent * common) / (len(mean) + latent))


def _loss(autoencoder: Autoencoder, images: Tensor, targets: Tensor, noise: Tensor) -> Tensor:
    mean, log_variance = autoencoder.encode(images, targets)
    code = mean + (log_variance / 2).exp() * noise
    made = autoencoder.decoder({"latent": code}, targets)
    divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean() / 2
    error = (made - images).square().mean()
    return cast(Tensor, images[0].numel() / 2 * (error + 1e-6).log() + divergence)


def sample_sheet(generator: Generator, path: Path, columns: int = 10, rows: int = 8, zoom: int = 3) -> None:
    """Write random samples as a PNG: a column a class (the first `columns`), or unlabelled ones.

    Raises:
        GradleakError: the file cannot be written.
    """
    like = next(generator.parameters())
    columns = min(columns, generator.classes) or columns
    targets = like.new_zeros(columns, generator.classes)
    if generator.classes:
        targets = torch.eye(generator.classes).to(like)[:columns]
    with torch.no_grad():
        images = generator.sample(targets.repeat(rows, 1), seeds.generator("sample sheet")).cpu()
    channels, height, width = generator.shape
    sheet = (
        images.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, channels)
    )
    pixels = (255 * sheet.clamp(0, 1)).round().to(torch.uint8).numpy()
    picture = Image.fromarray(pixels if channels == 3 else pixels[..., 0])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.resize((columns * width * zoom, rows * height * zoom), Image.Resampling.NEAREST).save(path)
    except (OSError, ValueError) as error:
        raise GradleakError(f"cannot write sample sheet {path}: {error}") from error
