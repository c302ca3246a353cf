"""Generators are stages that compose; training sees public images only and is remembered."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from gradleak import registry, suite
from gradleak.cli.prior import app
from gradleak.dataset import Data, Dataset, Images, Split
from gradleak.errors import GradleakError
from gradleak.evaluation.check import check
from gradleak.evaluation.evaluate import evaluate
from gradleak.evaluation.workshop import Resources, Workshop
from gradleak.search.generators import Decoder, Generator, load_generator
from gradleak.training.priors import Recipe, sample_sheet, train_prior

SMALL = Recipe(latent=8, width=8, epochs=10)
DIGITS = Data(registry.build("datasets", "digits"), "digits")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Changed(Dataset):
    """Digits with other private images."""

    reference = "scikit-learn"

    def read(self, root: Path | None, download: bool) -> Split:
        split = DIGITS.split
        return dataclasses.replace(split, test=Images(1 - split.test.images, split.test.labels))


def tiny_decoder(shape: tuple[int, int, int]) -> Decoder:
    """A user's function, named by tests as module:function."""
    torch.manual_seed(0)
    return Decoder(shape, classes=3, latent=4, width=2)


def not_a_generator(shape: tuple[int, int, int]) -> object:
    return object()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("priors")


@pytest.fixture(scope="module")
def prior(cache: Path) -> Generator:
    return train_prior(DIGITS, SMALL, cache)


def decoder(shape: tuple[int, int, int]) -> Decoder:
    with torch.random.fork_rng(devices=[]):
        return tiny_decoder(shape).eval().requires_grad_(False)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 25, 25), (1, 28, 28), (3, 9, 5), (1, 3, 3)])
def test_stages_compose_to_images_of_the_shape(shape: tuple[int, int, int]) -> None:
    generator = decoder(shape)
    targets = torch.eye(3)
    code = generator.code(lambda size: torch.linspace(-2, 2, 3 * size).view(3, size))
    images = generator(code, targets)
    assert images.shape == (3, *shape) and images.min() >= 0 and images.max() <= 1
    features = code
    for stage, shapes in enumerate(generator.shapes()):
        assert {name: tuple(tensor.shape[1:]) for name, tensor in features.items()} == shapes
        torch.testing.assert_close(generator(features, targets, stage), images)
        features = generator.advance(features, targets, stage)
    assert generator.shapes()[1]["features"][1] <= 4
    alone = generator({"latent": code["latent"][1:2]}, targets[1:2])
    torch.testing.assert_close(alone[0], images[1])


def test_other_classes_count_as_unknown() -> None:
    generator = decoder((1, 8, 8))
    assert torch.equal(generator.condition(torch.eye(3)), torch.eye(3))
    assert torch.equal(generator.condition(torch.eye(5)), torch.zeros(5, 3))
    generator.labelled = False
    assert torch.equal(generator.condition(torch.eye(3)), torch.zeros(3, 3))


def test_sample_depends_on_the_generator_and_the_class_alone() -> None:
    generator = decoder((1, 8, 8))

    def draw(seed: int, label: int) -> Tensor:
        return generator.sample(torch.eye(3)[[label]], torch.Generator().manual_seed(seed))

    assert torch.equal(draw(0, 1), draw(0, 1))
    assert not torch.equal(draw(0, 1), draw(1, 1))
    assert not torch.equal(draw(0, 1), draw(0, 2))


def test_user_generator_with_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "users_file", __import__("sys").modules[__name__])
    trained = decoder((1, 8, 8))
    for parameter in trained.parameters():
        parameter.add_(1)
    save_file(trained.state_dict(), tmp_path / "weights.safetensors")
    loaded = load_generator("users_file:tiny_decoder", tmp_path / "weights.safetensors", (1, 8, 8))
    assert not loaded.training
    assert all(torch.equal(tensor, trained.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(GradleakError, match="do not fit"):
        load_generator("users_file:tiny_decoder", tmp_path / "other.safetensors", (1, 8, 8))
    with pytest.raises(GradleakError, match="do not fit"):
        load_generator("users_file:tiny_decoder", tmp_path / "missing.safetensors", (1, 8, 8))
    with pytest.raises(GradleakError, match="returned object"):
        load_generator("users_file:not_a_generator", None, (1, 8, 8))


@pytest.mark.parametrize("source", ["users_file", "no_such_module_here:f", "gradleak.search.generators:nothing"])
def test_user_generator_that_cannot_be_imported(source: str) -> None:
    with pytest.raises(GradleakError, match="prior"):
        load_generator(source, None, (1, 8, 8))


def test_prior_learns_the_classes(prior: Generator) -> None:
    train = DIGITS.split.train
    means = torch.stack([train.images[train.labels == label].mean(0) for label in range(10)])
    targets = torch.eye(10).repeat_interleave(20, 0)
    samples = prior.sample(targets, torch.Generator().manual_seed(0))
    nearest = torch.cdist(samples.flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == targets.argmax(1)).double().mean() > 0.75


def test_prior_comes_from_the_cache(prior: Generator, cache: Path) -> None:
    def never(done: int, total: int) -> None:
        raise AssertionError("trained again")

    again = train_prior(DIGITS, SMALL, cache, progress=never)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in prior.state_dict().items())


def test_prior_sees_no_private_image_and_no_global_randomness(prior: Generator, tmp_path: Path) -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    epochs: list[tuple[int, int]] = []
    changed = train_prior(
        Data(_Changed(), "digits"), SMALL, tmp_path, progress=lambda done, total: epochs.append((done, total))
    )
    assert all(torch.equal(tensor, changed.state_dict()[name]) for name, tensor in prior.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), before)
    assert epochs == [(epoch, 10) for epoch in range(1, 11)]


def test_sample_sheet_shows_a_column_a_class(prior: Generator, tmp_path: Path) -> None:
    sample_sheet(prior, tmp_path / "new" / "sheet.png", columns=4, rows=3, zoom=2)
    with Image.open(tmp_path / "new" / "sheet.png") as picture:
        assert picture.size == (4 * 8 * 2, 3 * 8 * 2)
        assert np.asarray(picture).std() > 10
    with pytest.raises(GradleakError, match="sample sheet"):
        sample_sheet(prior, tmp_path / "sheet.unknown")


def test_command_trains_and_writes_the_sheet(prior: Generator, cache: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    arguments = ["--dataset", "digits", "--latent", "8", "--width", "8", "--epochs", "10"]
    result = CliRunner().invoke(app, [*arguments, "--cache", str(cache), "--sheet", str(sheet)])
    assert result.exit_code == 0, result.output
    assert sheet.exists() and "digits" in result.output


def written(path: Path, **changes: Any) -> Path:
    import yaml

    content: dict[str, Any] = {
        "name": "tiny",
        "victims": 2,
        "prior": {"options": {"latent": 8, "width": 8, "epochs": 10}},
        "controls": "listed",
        "datasets": ["digits"],
        "models": ["lenet"],
        "settings": [{"grants": {"generator": True}}],
        "attacks": [{"gifd": {"iterations": 3, "restarts": 1}}, "generator-sample", "mean-image"],
        "defenses": ["none"],
        **changes,
    }
    (path / "suite.yaml").write_text(yaml.safe_dump(content))
    return path / "suite.yaml"


def test_suite_grants_the_generator_to_those_that_need_it(prior: Generator, cache: Path, tmp_path: Path) -> None:
    workshop = Workshop(Resources(cache=cache))
    cells = suite.expand(suite.read(written(tmp_path)), workshop.digest)
    check(cells, workshop)
    assert [("prior" in cell.stored()) for cell in cells] == [True, True, False]
    results = [evaluate(cell, workshop) for cell in cells[:2]]
    assert [result.status for result in results] == ["ok", "ok"], [result.error for result in results]
    assert all(len(result.rows) == 2 for result in results)
    other = suite.expand(suite.read(written(tmp_path, prior={"options": {"latent": 9}})), workshop.digest)
    assert other[0].key != cells[0].key and other[2].key == cells[2].key
    ungranted = suite.expand(suite.read(written(tmp_path, settings=[{}])), workshop.digest)
    with pytest.raises(GradleakError, match="generator"):
        check(ungranted, workshop)


@pytest.mark.parametrize(
    ("prior_of_suite", "message"),
    [
        ({"options": {"latnet": 3}}, "latent"),
        ({"options": {"latent": 0}}, "latent"),
        ({"dataset": "digit"}, "digits"),
        ({"weights": "w.safetensors"}, "needs source"),
        ({"source": "a:b", "dataset": "digits"}, "takes no dataset"),
        ({"source": "a:b", "weights": "/no/such/file"}, "relative to --data-root"),
    ],
)
def test_suite_refuses_a_wrong_prior(prior_of_suite: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(GradleakError, match=message):
        suite.read(written(tmp_path, prior=prior_of_suite))


def test_out_of_distribution_prior_is_told_no_class_and_must_fit(tmp_path: Path) -> None:
    faces = {"dataset": "faces", "options": {"latent": 2, "width": 2, "epochs": 1}}
    workshop = Workshop(Resources(cache=tmp_path))
    cells = suite.expand(suite.read(written(tmp_path, prior=faces)), workshop.digest)
    with pytest.raises(GradleakError, match=r"\(1, 25, 25\)"):
        check(cells, workshop)
    result = evaluate(cells[0], workshop)
    assert result.status == "failed" and result.error is not None and "(1, 25, 25)" in result.error
