"""Image priors: generators as an ordered list of stages, gradleak's own decoder, and those of a user's file."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import GradleakError

Features = dict[str, Tensor]
"""What flows between two stages, each tensor [K, ...] with a row an image."""

IMAGES = "images"
"""Name of the last stage's output."""

Draw = Callable[[int], Tensor]
"""Standard normal numbers [..., size]."""


class Generator(nn.Module):
    """A generator G = G_n o ... o G_0; K rows of features go in, K images [K, C, H, W] in [0, 1] come out.

    Every stage is a module called with the features before it and with class probabilities [K, classes]; it
    returns the features after it. The first takes what `code` returns, the last returns `{"images": ...}`.
    Stages must treat every row by itself (batch normalisation in eval mode) and be known to torch.func.

    BigGAN is one stage a block, each returning `{"features": h, "condition": c}`, where c is the code's parts
    beside the class embedding that later blocks read; `held={"condition"}` keeps a feature search off c.
    StyleGAN2 is one stage a resolution, returning `{"styles": w, "noise": n, "features": h, "skip": rgb}`;
    `code` is overridden by the mapping network, or by a Gaussian fitted to its output.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        latent: int,
        shape: tuple[int, int, int],
        classes: int = 0,
        held: frozenset[str] = frozenset(),
    ):
        """Take the stages, the length of the code, the images' shape (C, H, W), and the classes (0: none).

        `held` names features that later stages read but no search may move.
        """
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.latent, self.shape, self.classes, self.held = latent, shape, classes, held
        self.labelled = classes > 0
        """Whether its classes are those of the victims; otherwise every class counts as unknown."""

    def code(self, normal: Draw) -> Features:
        """Draw what the first stage takes; `normal(size)` gives standard normal numbers [..., size]."""
        return {"latent": normal(self.latent)}

    def condition(self, targets: Tensor) -> Tensor:
        """Turn a victim's class probabilities [..., victim's classes] into the generator's; zeros: unknown."""
        if self.labelled and targets.shape[-1] == self.classes:
            return targets
        return targets.new_zeros(*targets.shape[:-1], self.classes)

    def advance(self, features: Features, targets: Tensor, stage: int) -> Features:
        """Push features through one stage."""
        return cast(Features, self.stages[stage](features, targets))

    def forward(self, features: Features, targets: Tensor, first: int = 0) -> Tensor:
        """Images [K, C, H, W] from the features before stage `first`."""
        for stage in range(first, len(self.stages)):
            features = self.advance(features, targets, stage)
        return features[IMAGES]

    def sample(self, targets: Tensor, generator: torch.Generator) -> Tensor:
        """Return a random image for each row of the generator's class probabilities [K, classes]."""

        def normal(size: int) -> Tensor:
            drawn = torch.randn(len(targets), size, generator=generator, dtype=torch.float64)
            return drawn.to(targets)

        return self.forward(self.code(normal), targets)

    def shapes(self) -> list[dict[str, tuple[int, ...]]]:
        """Shapes of one image's features before every stage."""
        like = next(self.parameters())
        features = self.code(lambda size: like.new_zeros(1, size))
        targets = like.new_zeros(1, self.classes)
        shapes = []
        for stage in range(len(self.stages)):
            shapes.append({name: tuple(tensor.shape[1:]) for name, tensor in features.items()})
            features = self.advance(features, targets, stage)
        return shapes


class Decoder(Generator):
    """Convolutional decoder: a linear layer to at most 4x4, doubled with 3x3 convolutions up to the image.

    The code is whitened: standard normal numbers become a draw of the class's own Gaussian first (`seed`).
    Channels halve with every doubling down to `width`. Stages: code to the coarsest features, one a doubling,
    and the last convolution with a sigmoid.
    """

    def __init__(self, shape: tuple[int, int, int], classes: int, latent: int, width: int):
        """Build for images of shape (C, H, W)."""
        channels, height, width_of_image = shape
        sizes = [(height, width_of_image)]
        while max(sizes[0]) > 4:
            sizes.insert(0, ((sizes[0][0] + 1) // 2, (sizes[0][1] + 1) // 2))
        depth = [width * 2 ** (len(sizes) - 1 - index) for index in range(len(sizes))]
        stages: list[nn.Module] = [Seed(latent, classes, depth[0], sizes[0])]
        for index in range(1, len(sizes)):
            stages.append(_Doubling(depth[index - 1], depth[index], sizes[index]))
        super().__init__([*stages, _Paint(depth[-1], channels)], latent, shape, classes)

    @property
    def seed(self) -> Seed:
        """The first stage."""
        return cast(Seed, self.stages[0])


class Seed(nn.Module):
    """First stage of a decoder: N(0, 1) to the class's Gaussian, then a linear layer to the coarsest features."""

    mean: Tensor
    factor: Tensor

    def __init__(self, latent: int, classes: int, channels: int, size: tuple[int, int]):
        """Start with N(0, 1) for every class and for the unknown one, the last."""
        super().__init__()
        self.linear = nn.Linear(latent + classes, channels * size[0] * size[1])
        self.shape = (channels, *size)
        self.norm = nn.BatchNorm2d(channels)
        self.register_buffer("mean", torch.zeros(classes + 1, latent))
        self.register_buffer("factor", torch.eye(latent).repeat(classes + 1, 1, 1))

    def forward(self, features: Features, targets: Tensor) -> Features:
        """Coarsest features of whitened codes [K, latent]."""
        weights = torch.cat([targets, 1 - targets.sum(-1, keepdim=True)], dim=-1)
        spread = torch.einsum("kc,cij,kj->ki", weights, self.factor, features["latent"])
        flat = self.linear(torch.cat([weights @ self.mean + spread, targets], dim=-1))
        return {"features": nn.functional.silu(self.norm(flat.unflatten(-1, self.shape)))}


class _Doubling(nn.Module):
    def __init__(self, inputs: int, outputs: int, size: tuple[int, int]):
        super().__init__()
        self.size = size
        self.convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, features: Features, targets: Tensor) -> Features:
        height, width = self.size
        larger = features["features"].repeat_interleave(2, -2).repeat_interleave(2, -1)[..., :height, :width]
        return {"features": nn.functional.silu(self.norm(self.convolution(larger)))}


class _Paint(nn.Module):
    def __init__(self, inputs: int, channels: int):
        super().__init__()
        self.convolution = nn.Conv2d(inputs, channels, 3, padding=1)

    def forward(self, features: Features, targets: Tensor) -> Features:
        return {IMAGES: self.convolution(features["features"]).sigmoid()}


def load_generator(source: str, weights: Path | None, shape: tuple[int, int, int]) -> Generator:
    """Return a user's generator in eval mode.

    Args:
        source: `module:function`, importable; called with the image shape (C, H, W), returns a `Generator`.
        weights: safetensors file of its state; None keeps what the function returned.
        shape: shape of the victims' images.

    Raises:
        GradleakError: nothing importable, not a `Generator`, weights that do not fit, or images of another shape.
    """
    name, separator, attribute = source.partition(":")
    if not (name and separator and attribute):
        raise GradleakError(f"prior {source!r}: expected module:function")
    try:
        build = getattr(importlib.import_module(name), attribute)
    except (ImportError, AttributeError) as error:
        raise GradleakError(f"prior {source!r}: cannot be imported ({error})") from error
    generator = build(shape)
    if not isinstance(generator, Generator):
        raise GradleakError(f"prior {source!r}: returned {type(generator).__name__}, not a gradleak Generator")
    if weights is not None:
        try:
            generator.load_state_dict(load_file(weights))
        except (OSError, SafetensorError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise GradleakError(f"prior {source!r}: weights {weights} do not fit: {reason}") from error
    if generator.shape != shape:
        raise GradleakError(f"prior {source!r}: makes images {generator.shape}; the victims' are {shape}")
    return generator.eval().requires_grad_(False)
