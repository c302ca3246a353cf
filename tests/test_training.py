from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from gradleak import registry
from gradleak.dataset import Data, Dataset, Images, Split
from gradleak.errors import GradleakError
from gradleak.model import Model, initialise
from gradleak.process import default_cache
from gradleak.training.networks import accuracy, calibrated, prepare, train


@dataclass(frozen=True, kw_only=True)
class _Digits(Dataset):
    reference = "scikit-learn"
    images: int = 1797

    def read(self, root: Path | None, download: bool) -> Split:
        digits = load_digits()
        images = torch.tensor(digits.images[: self.images], dtype=torch.float32)[:, None] / 16
        labels = torch.tensor(digits.target[: self.images], dtype=torch.int64)
        cut = self.images * 3 // 4
        names = tuple(map(str, range(10)))
        return Split(Images(images[:cut], labels[:cut]), Images(images[cut:], labels[cut:]), names)


DIGITS = Data(_Digits(), "digits")
FEW = Data(_Digits(images=172), "digits")  # 129 images to train on: four full batches and one over


def network_of(name: str, seed: int = 0, **options: Any) -> nn.Module:
    return initialise(registry.build("models", name, options), (1, 8, 8), 10, seed)


def same(first: nn.Module, second: nn.Module) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(
    ("name", "options", "epochs", "least"),
    [
        ("linear", {}, 5, 0.6),
        ("mlp", {}, 5, 0.8),
        ("lenet", {}, 20, 0.6),
        ("convnet", {"width": 4}, 4, 0.8),
        ("resnet20", {"width": 4}, 4, 0.6),
        ("resnet18", {"width": 4}, 4, 0.6),
        ("vit", {"dim": 32, "depth": 2, "heads": 2}, 5, 0.75),
    ],
)
def test_training_learns(name: str, options: dict[str, Any], epochs: int, least: float) -> None:
    network = network_of(name, **options)
    untrained = accuracy(network, DIGITS.split.test)
    trained = train(network, DIGITS, epochs, seed=0)
    assert untrained < 0.35
    assert trained > least
    assert trained == accuracy(network, DIGITS.split.test)
    assert not network.training
    assert all(parameter.grad is None for parameter in network.parameters())


def test_training_is_deterministic_and_leaves_the_global_generator() -> None:
    before = torch.get_rng_state()
    first, again, other = (network_of("convnet", width=4) for _ in range(3))
    scores = [train(first, FEW, 2, seed=3), train(again, FEW, 2, seed=3)]
    train(other, FEW, 2, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(first, again)
    assert scores[0] == scores[1]
    assert not same(first, other)


def test_no_epochs_leave_the_weights() -> None:
    network = network_of("mlp")
    train(network, FEW, 0, seed=0)
    assert same(network, network_of("mlp"))


def test_progress_is_told_after_every_epoch() -> None:
    told: list[tuple[int, int]] = []
    train(network_of("linear"), FEW, 3, seed=0, progress=lambda epoch, epochs: told.append((epoch, epochs)))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_every_image_is_seen_once_an_epoch_in_batches_of_more_than_one() -> None:
    network = network_of("linear")
    seen: list[Tensor] = []

    def see(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if module.training:
            seen.append(inputs[0])

    network.register_forward_pre_hook(see)
    train(network, FEW, 1, seed=0)
    assert [len(batch) for batch in seen] == [26, 26, 26, 26, 25]
    expected = FEW.split.train.images.flatten(1)
    rows = torch.cat(seen).flatten(1)
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, expected.tolist()))


def test_divergence_is_an_error() -> None:
    network = network_of("linear")
    with torch.no_grad():
        next(network.parameters()).fill_(float("inf"))
    with pytest.raises(GradleakError, match="loss nan in epoch 1"):
        train(network, FEW, 1, seed=0)


def test_negative_epochs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GradleakError, match="epochs = -1"):
        prepare(registry.build("models", "linear"), "linear", FEW, -1, 0, tmp_path)


def test_accuracy_counts() -> None:
    class Echo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1) * self.scale

    labels = torch.arange(300) % 4
    wrong = labels.clone()
    wrong[:75] = (wrong[:75] + 1) % 4
    images = torch.eye(4)[labels].reshape(300, 1, 2, 2)
    assert accuracy(Echo(), Images(images, labels)) == 1.0
    assert accuracy(Echo(), Images(images, wrong)) == 0.75


def test_prepare_trains_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = registry.build("models", "convnet", {"width": 4})
    first, score = prepare(model, "convnet", FEW, 2, 0, tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
    monkeypatch.setattr("gradleak.training.networks.train", None)  # a second training would fail
    again, kept = prepare(model, "convnet", FEW, 2, 0, tmp_path)
    assert same(first, again)
    assert score == kept
    assert not first.training
    assert not again.training
    assert {parameter.device.type for parameter in again.parameters()} == {"cpu"}


def test_prepare_equals_training_by_hand(tmp_path: Path) -> None:
    model = registry.build("models", "mlp", {"widths": (8,)})
    untrained, chance = prepare(model, "mlp", FEW, 0, 5, tmp_path)
    trained, score = prepare(model, "mlp", FEW, 2, 5, tmp_path)
    assert chance == accuracy(untrained, FEW.split.test)
    assert score == train(untrained, FEW, 2, seed=5)
    assert same(trained, untrained)


def test_the_key_tells_everything_apart(tmp_path: Path) -> None:
    def files(name: str = "mlp", data: Data = FEW, epochs: int = 0, seed: int = 0, **options: Any) -> int:
        prepare(registry.build("models", name, options), name, data, epochs, seed, tmp_path)
        return len(list(tmp_path.iterdir()))

    counts = [
        files(),
        files(widths=(256, 256)),  # the default, spelled out
        files("linear"),
        files(activation="tanh"),
        files(epochs=1),
        files(seed=1),
        files(data=Data(_Digits(images=200), "digits")),
    ]
    assert counts == [1, 1, 2, 3, 4, 5, 6]


def test_the_seed_decides_the_initial_weights(tmp_path: Path) -> None:
    model = registry.build("models", "linear")
    first, _ = prepare(model, "linear", FEW, 0, 0, tmp_path)
    other, _ = prepare(model, "linear", FEW, 0, 1, tmp_path)
    assert not same(first, other)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, damage: str) -> None:
    model = registry.build("models", "linear")
    prepare(model, "linear", FEW, 0, 0, tmp_path)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[:-10]
    elif damage == "flipped":
        content[-10] ^= 1
    else:
        content.clear()
    path.write_bytes(content)
    with pytest.raises(GradleakError, match=r"damaged checkpoint .*delete it to train again"):
        prepare(model, "linear", FEW, 0, 0, tmp_path)
    path.unlink()
    prepare(model, "linear", FEW, 0, 0, tmp_path)


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("gradleak.training.networks.os.replace", refuse)
    with pytest.raises(GradleakError, match=r"cannot write checkpoint .*disk full.*GRADLEAK_CACHE"):
        prepare(registry.build("models", "linear"), "linear", FEW, 0, 0, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_cache_that_is_a_file_is_one_clear_line(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("")
    with pytest.raises(GradleakError, match="cannot write checkpoint"):
        prepare(registry.build("models", "linear"), "linear", FEW, 0, 0, place)


def test_default_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADLEAK_CACHE", str(tmp_path / "models"))
    assert default_cache() == tmp_path / "models"
    prepare(registry.build("models", "linear"), "linear", FEW, 0, 0)
    assert len(list((tmp_path / "models").iterdir())) == 1
    monkeypatch.delenv("GRADLEAK_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "gradleak"


@dataclass(frozen=True, kw_only=True)
class _Dropping(Model):
    reference = "own"

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Dropout(0.5), nn.Linear(16, classes))


def test_random_layers_are_trained_alike_whatever_was_drawn_before(tmp_path: Path) -> None:
    trained = []
    for index in range(2):
        torch.manual_seed(index)
        before = torch.get_rng_state()
        trained.append(prepare(_Dropping(), "dropping", FEW, 1, 0, tmp_path / str(index))[0])
        assert torch.get_rng_state().equal(before)
    assert same(*trained)


def test_calibrated_statistics_are_those_of_public_images_layer_by_layer() -> None:
    plain = network_of("convnet", width=4)
    found = calibrated(plain, DIGITS)
    assert {
        name for name, tensor in found.state_dict().items() if not torch.equal(tensor, plain.state_dict()[name])
    } == {name for name in plain.state_dict() if "running" in name or "tracked" in name}
    # In eval mode what leaves each layer has, over public images, about the mean and the variance that it should have.
    seen: list[Tensor] = []
    for layer in found.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert not layer.training and layer.momentum == 0.1
            layer.register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        found(DIGITS.split.train.images[:512])
    assert len(seen) == 8
    for output in seen:
        assert output.mean((0, 2, 3)).abs().max() < 0.05
        assert (output.var((0, 2, 3)) - 1).abs().max() < 0.15


def test_a_calibrated_network_looks_at_its_images() -> None:
    plain = network_of("convnet", width=4)
    images, labels = DIGITS.split.test.images[:2], torch.tensor([3])

    def contrast(network: nn.Module) -> float:
        network.eval()
        parts = []
        for image in images:
            loss = nn.functional.cross_entropy(network(image[None]), labels)
            parts.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))]))
        return 1 - float(nn.functional.cosine_similarity(parts[0], parts[1], dim=0))

    assert contrast(calibrated(plain, DIGITS)) > 10 * contrast(plain)


def test_what_has_no_statistics_stays_as_it_is() -> None:
    plain = network_of("lenet")
    assert same(calibrated(plain, DIGITS), plain)
