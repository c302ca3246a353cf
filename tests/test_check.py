"""What is refused before anything runs: data, models and clients that keep no promise."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from gradleak import registry, structure
from gradleak.dataset import Data, Dataset, Images, Split
from gradleak.defense import Defense, Message, Public
from gradleak.errors import GradleakError
from gradleak.evaluation.checks import clients, generators
from gradleak.federation import client
from gradleak.model import Normalise
from gradleak.search.generators import IMAGES, Features, Generator
from gradleak.threat import Setting
from gradleak.update import Update

torch.set_num_threads(1)

SHAPE, CLASSES = (1, 4, 4), 3

STREAM = torch.Generator()


def _pixels(*sizes: int, seed: int = 0) -> Tensor:
    return torch.rand(*sizes, generator=torch.Generator().manual_seed(seed))


class _Own(nn.Module):
    """A small network with something of one's own between its layers."""

    def __init__(self, between: Callable[[Any, Tensor], Any], **parts: nn.Module):
        super().__init__()
        self.first, self.head = nn.Linear(16, 8), nn.Linear(8, CLASSES)
        self.between, self.calls = between, 0
        self.register_buffer("average", torch.zeros(8))
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, images: Tensor) -> Any:
        return self.head(self.between(self, self.first(images.flatten(1)).sigmoid()))


def _refusal(
    module: nn.Module, mode: str = "train", batch: int = 2, defense: Defense | None = None, **setting: Any
) -> str | None:
    guard = defense or registry.build("defenses", "none")
    chosen = Setting(batch_size=batch, mode=cast(Any, mode), **setting)
    whole = nn.Sequential(Normalise(1), module)
    structure.mark(whole, SHAPE)
    network = client.client_network(whole, guard, chosen)
    images, labels = _pixels(3, batch, *SHAPE), torch.arange(3 * batch).view(3, batch) % CLASSES
    return clients.refusal(network, images, labels, _pixels(batch, *SHAPE, seed=1), CLASSES, guard, chosen)


def _counted(own: _Own, z: Tensor) -> Tensor:
    own.calls += 1
    return z / own.calls


def _averaged(own: _Own, z: Tensor) -> Tensor:
    cast(Tensor, own.average).mul_(0.9).add_(0.1 * z.detach().mean(0))
    return z


def _part(name: str) -> Callable[[Any, Tensor], Any]:
    return lambda own, z: getattr(own, name)(z)


DRAWING = {
    "functional dropout": (lambda own, z: F.dropout(z, 0.5, own.training), {}, r"'1' \(_Own\) draws from torch's"),
    "stochastic depth": (
        _part("depth"),
        {"depth": StochasticDepth(0.5, "row")},
        r"'1.depth' \(StochasticDepth\) draws",
    ),
    "rrelu": (lambda own, z: own.rrelu(z - 0.5), {"rrelu": nn.RReLU()}, r"'1.rrelu' \(RReLU\) draws"),
    "noise": (lambda own, z: z + 0.1 * torch.randn_like(z), {}, "draws from torch's generator"),
    "noise of numpy": (lambda own, z: z + float(np.random.rand()), {}, "draws from numpy's generator"),
    "noise of Python": (lambda own, z: z + random.random(), {}, "draws from Python's generator"),
    "own stream": (
        lambda own, z: z + torch.rand(z.shape, generator=STREAM),
        {},
        "something else when called again",
    ),
    "counter": (_counted, {}, "something else when called again"),
    "moving average": (_averaged, {}, "changes its buffer '1.average'"),
}


@pytest.mark.parametrize("name", DRAWING)
def test_a_model_that_is_no_function_is_refused_by_its_layer(name: str) -> None:
    between, parts, message = cast(Any, DRAWING[name])
    reason = _refusal(_Own(between, **parts))
    assert reason is not None and re.search(message, reason), reason
    assert "mode 'eval'" in reason


def test_spectral_norm_iterates_in_train_mode_only() -> None:
    module = _Own(lambda own, z: z)
    nn.utils.parametrizations.spectral_norm(module.first)
    assert "changes its buffer" in (_refusal(module) or "")
    assert _refusal(module, "eval") is None


def test_random_layers_are_functions_in_eval_mode_and_noise_is_not() -> None:
    assert _refusal(_Own(lambda own, z: F.dropout(z, 0.5, own.training)), "eval") is None
    assert _refusal(_Own(_part("rrelu"), rrelu=nn.RReLU()), "eval") is None
    assert "private_buffers" in (_refusal(_Own(lambda own, z: z + torch.randn_like(z)), "eval") or "")


def test_declared_randomness_is_allowed() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    for name in ("dropout", "vib", "mixup", "instahide", "gaussian-noise", "censor"):
        assert _refusal(module, defense=registry.build("defenses", name)) is None, name


OUTPUTS = {
    "tuple": (lambda own, z: (own.head(z), z), "returns tuple .* return the logits alone"),
    "dictionary": (lambda own, z: {"out": own.head(z)}, "returns dict"),
    "too few": (lambda own, z: own.head(z)[:, :2], r"returns \[2, 2\] for 2 images of 3 classes"),
    "not finite": (lambda own, z: own.head(z) / 0, "not finite"),
    "labels": (lambda own, z: own.head(z).argmax(1, keepdim=True).expand(-1, CLASSES), "returns int64"),
    "constant": (lambda own, z: own.head(torch.ones_like(z)), "does not depend on the images"),
    "of a fixed batch": (lambda own, z: own.head(z.view(7, 8)), r"cannot take images \[2, 1, 4, 4\] \(RuntimeError"),
}


class _Ends(_Own):
    def forward(self, images: Tensor) -> Any:
        return self.between(self, self.first(images.flatten(1)).sigmoid())


@pytest.mark.parametrize("name", OUTPUTS)
def test_what_is_no_logits_of_the_images_is_refused(name: str) -> None:
    between, message = cast(Any, OUTPUTS[name])
    reason = _refusal(_Ends(between), "eval")
    assert reason is not None and re.search(message, reason), reason


ERASING = {
    "BatchNorm1d of one example": (nn.BatchNorm1d(8), "train", 1, True),
    "BatchNorm1d of two examples": (nn.BatchNorm1d(8), "train", 2, False),
    "BatchNorm1d with its statistics": (nn.BatchNorm1d(8), "eval", 1, False),
    "BatchNorm2d at spatial size 1": (
        nn.Sequential(nn.Unflatten(1, (8, 1, 1)), nn.BatchNorm2d(8), nn.Flatten()),
        "train",
        1,
        True,
    ),
    "BatchNorm2d at spatial size 4": (
        nn.Sequential(nn.Unflatten(1, (2, 2, 2)), nn.BatchNorm2d(2), nn.Flatten()),
        "train",
        1,
        False,
    ),
    "GroupNorm of one value": (nn.GroupNorm(8, 8), "eval", 2, True),
    "GroupNorm of two values": (nn.GroupNorm(4, 8), "eval", 1, False),
    "InstanceNorm of one value": (
        nn.Sequential(nn.Unflatten(1, (8, 1, 1)), nn.InstanceNorm2d(8), nn.Flatten()),
        "eval",
        2,
        True,
    ),
    "LayerNorm of one value": (nn.Sequential(nn.Unflatten(1, (8, 1)), nn.LayerNorm(1), nn.Flatten()), "eval", 2, True),
    "LayerNorm": (nn.LayerNorm(8), "eval", 1, False),
}


@pytest.mark.parametrize("name", ERASING)
def test_normalisation_over_one_value_is_refused(name: str) -> None:
    layer, mode, batch, refused = ERASING[name]
    reason = _refusal(_Own(_part("norm"), norm=layer), mode, batch)
    assert (reason is not None and "normalises over one value" in reason) == refused, reason


def test_local_batches_of_one_count_as_batches_of_one() -> None:
    module = _Own(_part("norm"), norm=nn.BatchNorm1d(8))
    assert _refusal(module, batch=4, local_lr=0.1, local_steps=2, local_batch_size=2) is None
    assert "1 image a step" in (_refusal(module, batch=4, local_lr=0.1, local_steps=2, local_batch_size=1) or "")


def test_erasing_by_functions_is_found_by_what_is_left() -> None:
    centred = _Own(lambda own, z: z - z.mean(0, keepdim=True))
    assert "does not depend on the images" in (_refusal(centred, batch=1) or "")
    assert _refusal(centred, batch=4) is None, "a batch that is mixed is still a function"


def test_mixing_is_refused_where_each_example_is_clipped() -> None:
    mixing = _Own(lambda own, z: z + z.mean(0, keepdim=True))
    assert _refusal(mixing, batch=4) is None
    reason = _refusal(mixing, batch=4, defense=registry.build("defenses", "dp-sgd"))
    assert "mixes the examples" in (reason or "")


def test_a_gradient_of_zero_for_every_victim_is_refused() -> None:
    certain = _Own(lambda own, z: z)
    certain.head.bias.data[:] = torch.tensor([1e4, 0.0, 0.0])
    assert _refusal(certain, batch=1) is None, "the first victim's only"
    silent = _Own(lambda own, z: z)
    silent.register_forward_hook(lambda layer, inputs, logits: logits * 0)
    assert "exactly zero for all of 3 victims" in (_refusal(silent) or "")


class _Loud(Defense):
    family, reference = "noise", "own"

    def protect(self, update: Update, public: Public, generator: torch.Generator) -> Message:
        return {name: tensor + torch.randn_like(tensor) for name, tensor in update.items()}


def test_a_defense_that_draws_from_the_global_generator_is_refused() -> None:
    with pytest.raises(GradleakError, match="protect drew from the global generator"):
        _refusal(_Own(lambda own, z: z), defense=_Loud())


def _read(kind: str) -> Split:
    def half(count: int, seed: int) -> Images:
        x, y = _pixels(count, *SHAPE, seed=seed), torch.arange(count) % CLASSES
        images = {
            "signed": x * 2 - 1,
            "bytes": (x * 255).round(),
            "uint8": (x * 255).to(torch.uint8),
            "float64": x.double(),
            "nan": x.masked_fill(x > 0.9, torch.nan),
            "infinite": x.masked_fill(x > 0.9, torch.inf),
            "flat": x.flatten(1),
            "graph": x.clone().requires_grad_(),
            "array": x.numpy(),
            "empty": x[: count * (seed != 1)],
            "other shape": x[..., : 4 - seed],
        }
        labels = {"from one": y + 1, "negative": y - 1, "int32": y.int(), "one-hot": F.one_hot(y)}
        y = labels.get(kind, y)
        return Images(cast(Tensor, images.get(kind, x)), y[: count * (seed != 1)] if kind == "empty" else y)

    return Split(half(12, 0), half(8, 1), ("a",) if kind == "one class" else tuple("abc"))


class _Odd(Dataset):
    reference = "own"

    def __init__(self, kind: str):
        self.kind = kind

    __hash__ = object.__hash__

    def read(self, root: Path | None, download: bool) -> Split:
        return _read(self.kind)


DATA = {
    "signed": r"train images lie in \[-0\.\d+, 0\.\d+\] \(allowed: \[0, 1\]",
    "bytes": r"train images lie in \[\d+, 255\]|train images lie in \[\d+, 25\d\]",
    "uint8": "train images are uint8",
    "float64": "train images are float64",
    "nan": "train images hold NaN or infinity",
    "infinite": "train images hold NaN or infinity",
    "flat": r"\[K, channels, height, width\]",
    "graph": "want a gradient",
    "array": "are ndarray and Tensor",
    "empty": "no test images",
    "other shape": r"\(1, 4, 4\), test images \(1, 4, 3\)",
    "from one": r"train labels lie in 1 to 3 \(allowed: 0 to 2",
    "negative": "train labels lie in -1 to 1",
    "int32": "train labels are int32",
    "one-hot": r"and labels \[12, 3\]",
    "one class": "1 class, of which every gradient is zero",
}


@pytest.mark.parametrize("kind", DATA)
def test_data_of_another_kind_is_refused_when_read(kind: str) -> None:
    with pytest.raises(GradleakError, match=DATA[kind]) as caught:
        Data(_Odd(kind), "odd")
    assert str(caught.value).startswith("dataset 'odd': ") and "\n" not in str(caught.value)
    assert "(allowed: " in str(caught.value)


def test_private_images_that_are_public_too_are_named() -> None:
    split = Data(_Odd("fine"), "fine").split
    both = torch.cat([split.train.images, split.test.images[2:4]])
    twins = Split(Images(both, torch.zeros(14, dtype=torch.int64)), split.test, split.classes)
    assert twins.copies(torch.arange(8)).tolist() == [2, 3]
    assert not len(split.copies(torch.arange(8)))


class _Paint(nn.Module):
    def __init__(self, shape: tuple[int, ...], gain: float):
        super().__init__()
        self.shape, self.gain = shape, gain
        self.linear = nn.Linear(2, int(torch.Size(shape).numel()))

    def forward(self, features: Features, targets: Tensor) -> Features:
        return {IMAGES: self.gain * self.linear(features["latent"]).sigmoid().unflatten(1, self.shape)}


@pytest.mark.parametrize(
    ("shape", "gain", "message"),
    [((1, 4, 4), 1.0, None), ((1, 4, 5), 1.0, "makes images"), ((1, 4, 4), 9.0, r"makes images in \[.*allowed")],
)
def test_a_generator_is_held_to_the_shape_of_the_data(shape: tuple[int, ...], gain: float, message: str | None) -> None:
    data = Data(_Odd("fine"), "fine")
    made = Generator([_Paint(shape, gain)], 2, SHAPE)
    if message is None:
        generators.check(made, "own:build", data)
        return
    with pytest.raises(GradleakError, match=message):
        generators.check(made, "own:build", data)
