from __future__ import annotations

import hashlib
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from skimage.data import astronaut, lfw_subset, retina
from skimage.transform import downscale_local_mean
from sklearn.datasets import load_digits
from torch import Tensor

from gradleak import registry
from gradleak.dataset import Data, Dataset, Images, Split
from gradleak.datasets import _cifar10_victims, frozen_cifar10, photos
from gradleak.datasets._images import divide
from gradleak.errors import GradleakError

torch.set_num_threads(1)

SHARED = Path(os.environ.get("GRADLEAK_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data: set GRADLEAK_SHARED_DATA to its folder")

# name: shape, classes, train and test sizes, digest (measured once; a change needs a new Dataset.version)
EMBEDDED = {
    "digits": ((1, 8, 8), 10, 1198, 599, "a29f9c928ac7042a3e21b04176bae760c14e2cdd8e1e7e6df66a59c5940e50ad"),
    "faces": ((1, 25, 25), 2, 120, 80, "46d2b4194a0f091709c5eca545e48b4ac2ac9545d34c18dc498ce65b570ae04f"),
    "mnist-5k": ((1, 28, 28), 10, 3500, 1500, "55feb21bd16e02fda3dfa4797a68ea774b1ca64eed484202b6ac0a23a5768079"),
    "photos": ((3, 32, 32), 10, 885, 440, "1027f64775910e49e3f734aeae9c1b3f6683ec2c56b2e392f7e5af3c2d252d0c"),
}


def data(name: str, root: Path | None = None, download: bool = False, **options: Any) -> Data:
    return Data(registry.build("datasets", name, options), name, root, download)


def rows(images: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def check_contract(part: Data) -> None:
    for images in (part.split.train, part.split.test):
        assert images.images.dtype == torch.float32
        assert images.labels.dtype == torch.int64
        assert images.images.shape == (len(images), *part.shape)
        assert images.images.is_contiguous()
        assert 0 <= images.images.min() and images.images.max() <= 1
        assert 0 <= images.labels.min() and images.labels.max() < part.classes


def write_png(path: Path, pixels: np.ndarray[Any, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def noise(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded(name: str) -> None:
    shape, classes, train, test, digest = EMBEDDED[name]
    part = data(name)
    check_contract(part)
    assert (part.shape, part.classes) == (shape, classes)
    assert (len(part.split.train), len(part.split.test)) == (train, test)
    assert part.digest == digest
    assert not rows(part.split.train.images) & rows(part.split.test.images)
    assert len(rows(part.split.test.images)) == test, "two victims are the same image"
    for images in (part.split.train, part.split.test):
        assert set(images.labels.tolist()) == set(range(classes))
        assert images.images.flatten(1).max() > 0.99, "the full range is used"


@pytest.mark.parametrize("name", EMBEDDED)
def test_reading_is_deterministic(name: str) -> None:
    dataset: Dataset = registry.build("datasets", name)
    torch.manual_seed(1)
    first = dataset.read(None, False)
    torch.manual_seed(2)
    second = dataset.read(None, False)
    assert first is not second
    assert first.digest == second.digest


def test_a_dataset_is_read_once_a_process() -> None:
    assert data("faces").split is data("faces").split


def test_digest_sees_one_pixel_one_label_and_the_shape() -> None:
    images = Images(torch.zeros(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64))
    pixel = Images(images.images.clone(), images.labels)
    pixel.images[1, 0, 1, 1] = 1e-6
    label = Images(images.images, torch.tensor([0, 1]))
    wide = Images(torch.zeros(2, 1, 1, 4), images.labels)
    variants = [Split(train, images, ("a", "b")) for train in (images, pixel, label, wide)]
    variants += [Split(images, test, ("a", "b")) for test in (pixel, label, wide)]
    assert len({variant.digest for variant in variants}) == len(variants)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.floats(0, 1))
def test_divide_is_a_partition_with_equal_shares(labels: list[int], share: float) -> None:
    tensor = torch.tensor(labels)
    train, test = divide(tensor, share, "seed")
    assert sorted(train.tolist() + test.tolist()) == list(range(len(labels)))
    for label in set(labels):
        assert int((tensor[test] == label).sum()) == round(share * labels.count(label))


def test_divide_depends_on_its_seed() -> None:
    labels = torch.zeros(50, dtype=torch.int64)
    assert divide(labels, 0.5, "a")[0].equal(divide(labels, 0.5, "a")[0])
    assert not divide(labels, 0.5, "a")[0].equal(divide(labels, 0.5, "b")[0])


def test_digits_and_faces_agree_with_their_sources() -> None:
    for name, images, labels in (
        ("digits", load_digits().images / 16, load_digits().target),
        ("faces", lfw_subset(), np.repeat([0, 1], 100)),
    ):
        split = data(name).split
        expected = {image.astype(np.float32).tobytes(): label for image, label in zip(images, labels, strict=True)}
        for half in (split.train, split.test):
            for image, label in zip(half.images, half.labels, strict=True):
                assert expected.pop(image.numpy().tobytes()) == label
        assert not expected, "every image is in one of the halves"


@pytest.mark.parametrize(("name", "source", "factor"), [("astronaut", astronaut, 1), ("retina", retina, 2)])
def test_photos_are_cells_of_the_photograph(name: str, source: Callable[[], Any], factor: int) -> None:
    split = data("photos").split
    label = split.classes.index(name)
    whole = source()[: 1411 // factor * factor, : 1411 // factor * factor] / 255
    photograph = downscale_local_mean(whole, (factor, factor, 1))
    height, width, _ = photograph.shape
    cells = np.stack(
        [
            photograph[top : top + 32, left : left + 32].transpose(2, 0, 1)
            for top in range(height % 32 // 2, height - 31, 32)
            for left in range(width % 32 // 2, width - 31, 32)
        ]
    )
    patches = torch.cat([half.images[half.labels == label] for half in (split.train, split.test)])
    used = []
    for patch in patches.numpy():
        distance = np.abs(cells - patch).max(axis=(1, 2, 3))
        used.append(int(distance.argmin()))
        assert distance.min() < 1e-6
    assert len(set(used)) == len(patches), "no cell is used twice"


def test_photo_tiles_do_not_overlap() -> None:
    marked = np.arange(70 * 100 * 3).reshape(70, 100, 3)
    cut = photos._centre(marked, 32)
    tiles = photos._tiles(cut, 32)
    assert tiles.shape == (2, 3, 32, 32, 3)
    assert len(np.unique(tiles)) == tiles.size, "each pixel lies in exactly one cell"
    assert (tiles[1, 2] == marked[3 + 32 : 3 + 64, 2 + 64 : 2 + 96]).all()


@given(st.sampled_from(list(EMBEDDED)), st.integers(1, 40), st.integers(1, 16))
def test_victims_and_tuning_victims_are_disjoint(name: str, count: int, batch_size: int) -> None:
    part = data(name)
    if count * batch_size > len(part.split.test) // 2:
        with pytest.raises(GradleakError, match=f"{name}.*{count} victims of {batch_size} images need"):
            part.victim_indices(count, batch_size)
        return
    victims = part.victim_indices(count, batch_size)
    tuning = part.victim_indices(count, batch_size, tuning=True)
    assert victims.shape == tuning.shape == (count, batch_size)
    both = victims.flatten().tolist() + tuning.flatten().tolist()
    assert len(set(both)) == 2 * count * batch_size
    assert max(both) < len(part.split.test)


@given(st.integers(1, 16), st.integers(1, 4), st.booleans())
def test_victim_lists_are_prefix_stable(count: int, batch_size: int, tuning: bool) -> None:
    part = data("digits")
    longest = part.victim_indices(16, batch_size, tuning)
    assert part.victim_indices(count, batch_size, tuning).equal(longest[:count])


def test_victims_are_pinned() -> None:
    assert data("digits").victim_indices(2, 3).tolist() == [[251, 205, 258], [411, 274, 147]]
    images, labels = data("photos").victims(4, 2)
    assert images.shape == (4, 2, 3, 32, 32)
    assert labels.shape == (4, 2)
    everything = data("photos").split.test
    assert images[1, 0].equal(everything.images[data("photos").victim_indices(4, 2)[1, 0]])


def test_folder_with_one_tree(tmp_path: Path) -> None:
    for index in range(9):
        write_png(tmp_path / "tree" / "cat" / f"{index}.png", noise(8, 8, 3, seed=index))
        write_png(tmp_path / "tree" / "dog" / f"{index}.png", noise(8, 8, 3, seed=100 + index))
    part = data("folder", tmp_path, path="tree", size=8)
    check_contract(part)
    assert part.split.classes == ("cat", "dog")
    assert part.split.train.labels.bincount().tolist() == [6, 6]
    assert part.split.test.labels.bincount().tolist() == [3, 3]
    # PNG at the wanted size comes back exactly, under its own label
    written = {(noise(8, 8, 3, seed=100 * k + i) / np.float32(255)).transpose(2, 0, 1).tobytes(): k
               for k in (0, 1) for i in range(9)}  # fmt: skip
    read = {
        image.numpy().tobytes(): int(label)
        for half in (part.split.train, part.split.test)
        for image, label in zip(half.images, half.labels, strict=True)
    }
    assert read == written


@pytest.mark.parametrize("second", ["test", "val"])
def test_folder_with_splits(tmp_path: Path, second: str) -> None:
    write_png(tmp_path / "train" / "cat" / "0.png", np.zeros((4, 4), np.uint8))
    write_png(tmp_path / "train" / "dog" / "deep" / "1.png", np.full((4, 4), 255, np.uint8))
    write_png(tmp_path / second / "dog" / "2.png", np.full((4, 4), 255, np.uint8))
    part = data("folder", tmp_path.parent, path=tmp_path.name, size=4, channels=1)
    check_contract(part)
    assert part.shape == (1, 4, 4)
    assert part.split.train.images.mean(dim=(1, 2, 3)).tolist() == [0, 1]
    assert part.split.train.labels.tolist() == [0, 1]
    assert part.split.test.labels.tolist() == [1], "numbered by train's classes"


def test_folder_takes_the_centre_of_a_wide_image(tmp_path: Path) -> None:
    wide = np.zeros((16, 48), np.uint8)
    wide[:, 16:32] = 255
    for index in range(6):
        write_png(tmp_path / "ab"[index % 2] / f"{index}.png", wide)
    part = data("folder", tmp_path.parent, path=tmp_path.name, size=4, channels=1)
    assert part.split.train.images.mean() > 0.95


def test_folder_limit_is_a_prefix_of_one_draw(tmp_path: Path) -> None:
    for index in range(30):
        write_png(tmp_path / "ab"[index % 2] / f"{index:02}.png", np.full((2, 2), index, np.uint8))
    whole = data("folder", tmp_path.parent, path=tmp_path.name, size=2, channels=1, limit=20).split.train
    some = data("folder", tmp_path.parent, path=tmp_path.name, size=2, channels=1, limit=5).split.train
    assert len(some) == 5
    assert some.images.equal(whole.images[:5])
    values = (whole.images[:, 0, 0, 0] * 255).tolist()
    assert len(set(values)) == 20 and values != sorted(values)


def test_folder_errors(tmp_path: Path) -> None:
    def refused(match: str, **options: Any) -> None:
        with pytest.raises(GradleakError, match=match) as caught:
            data("folder", tmp_path, **options)
        assert "\n" not in str(caught.value)

    refused("nowhere: no such folder", path="nowhere")
    (tmp_path / "empty").mkdir()
    refused("empty: no images", path="empty")
    (tmp_path / "hollow" / "cat").mkdir(parents=True)
    (tmp_path / "hollow" / "cat" / "notes.txt").write_text("no image")
    refused("hollow: no images", path="hollow")
    write_png(tmp_path / "half" / "train" / "cat" / "0.png", noise(4, 4))
    refused("train/ stands alone", path="half")
    write_png(tmp_path / "odd" / "train" / "cat" / "0.png", noise(4, 4))
    write_png(tmp_path / "odd" / "test" / "cot" / "0.png", noise(4, 4))
    refused("unknown class 'cot'; did you mean 'cat'", path="odd")
    (tmp_path / "broken" / "cat").mkdir(parents=True)
    (tmp_path / "broken" / "cat" / "0.png").write_bytes(b"not a picture")
    refused(r"0\.png: cannot be read as an image", path="broken")
    write_png(tmp_path / "deep" / "cat" / "0.png", np.full((4, 4), 40000, np.uint16))
    refused("mode 'I;16'", path="deep")
    refused("size = 0", path="half", size=0)
    refused("channels = 2", path="half", channels=2)
    refused("limit = 0", path="half", limit=0)


@needs_shared
def test_shared_cifar10_tree() -> None:
    part = data("folder", SHARED, path="cifar10")
    check_contract(part)
    assert (part.shape, part.classes) == ((3, 32, 32), 10)
    assert (len(part.split.train), len(part.split.test)) == (10000, 2000)
    assert part.split.classes[:3] == ("airplane", "automobile", "bird")
    assert part.split.test.labels.bincount().tolist() == [200] * 10
    assert len(part.digest) == 64


def save(path: Path, **arrays: np.ndarray[Any, Any]) -> None:
    np.savez(path, **arrays)  # type: ignore[arg-type]


def test_victims_keep_the_file_order(tmp_path: Path) -> None:
    images = noise(10, 5, 5, 3)
    save(tmp_path / "chosen.npz", images=images, labels=np.arange(10, dtype=np.uint8) % 4)
    part = data("victims", tmp_path, path="chosen.npz", public=4)
    check_contract(part)
    assert part.split.classes == ("0", "1", "2", "3")
    expected = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    assert part.split.test.images.equal(expected[:6])
    assert part.split.train.images.equal(expected[6:])
    assert part.split.test.labels.tolist() == [0, 1, 2, 3, 0, 1]


def test_victims_with_a_public_tree_drop_its_copies(tmp_path: Path) -> None:
    images = noise(4, 8, 8)
    save(tmp_path / "chosen.npz", images=images, labels=np.array([0, 1, 1, 0]))
    for index in range(4):
        write_png(tmp_path / "tree" / "train" / "no" / f"{index}.png", noise(8, 8, seed=10 + index))
    close = np.clip(images[2].astype(int) + np.where(noise(8, 8, seed=3) > 127, 4, -4), 0, 255)
    write_png(tmp_path / "tree" / "train" / "yes" / "copy.png", close.astype(np.uint8))
    write_png(tmp_path / "tree" / "train" / "yes" / "other.png", noise(8, 8, seed=20))
    write_png(tmp_path / "tree" / "test" / "yes" / "unused.png", noise(8, 8, seed=30))
    part = data("victims", tmp_path, path="chosen.npz", train="tree")
    check_contract(part)
    assert part.split.classes == ("no", "yes")
    assert len(part.split.test) == 4
    assert part.split.train.labels.tolist() == [0, 0, 0, 0, 1]


def test_victims_errors(tmp_path: Path) -> None:
    def refused(match: str, **options: Any) -> None:
        with pytest.raises(GradleakError, match=match) as caught:
            data("victims", tmp_path, **options)
        assert "\n" not in str(caught.value)

    refused("none.npz: no such file", path="none.npz")
    (tmp_path / "text.npz").write_text("no archive")
    refused("not an .npz file", path="text.npz")
    np.save(tmp_path / "bare.npy", noise(2, 2))
    refused("not an .npz file", path="bare.npy")
    save(tmp_path / "other.npz", pictures=noise(2, 4, 4))
    refused("not an .npz file with the arrays", path="other.npz")
    save(tmp_path / "float.npz", images=np.zeros((2, 4, 4)), labels=np.zeros(2, int))
    refused("found images float64", path="float.npz")
    save(tmp_path / "wide.npz", images=noise(2, 4, 5), labels=np.zeros(2, int))
    refused(r"found images uint8 \(2, 4, 5\)", path="wide.npz")
    save(tmp_path / "short.npz", images=noise(2, 4, 4), labels=np.zeros(3, int))
    refused(r"labels int64 \(3,\)", path="short.npz")
    save(tmp_path / "few.npz", images=noise(2, 4, 4), labels=np.array([0, 7]))
    refused("public = 2 leaves none of 2 images", path="few.npz", public=2)
    write_png(tmp_path / "tree" / "train" / "a" / "0.png", noise(4, 4, seed=5))
    write_png(tmp_path / "tree" / "test" / "a" / "0.png", noise(4, 4, seed=6))
    refused("label 7 has no class", path="few.npz", train="tree")
    save(tmp_path / "same.npz", images=noise(1, 4, 4, seed=5), labels=np.array([0]))
    refused("every train image copies a victim", path="same.npz", train="tree")


@needs_shared
@pytest.mark.parametrize(("file", "shape"), [("mnist_64", (1, 28, 28)), ("cifar10_64", (3, 32, 32))])
def test_shared_victims(file: str, shape: tuple[int, int, int]) -> None:
    part = data("victims", SHARED, path=f"victims/{file}.npz")
    check_contract(part)
    assert (part.shape, part.classes) == (shape, 10)
    assert (len(part.split.train), len(part.split.test)) == (16, 48)


@needs_shared
def test_shared_victims_are_not_public() -> None:
    # 15 of the 64 images lie in the tree's train half too, as JPEG copies of 28 to 36 dB
    part = data("victims", SHARED, path="victims/cifar10_64.npz", train="cifar10")
    assert (len(part.split.train), len(part.split.test)) == (10000 - 15, 64)


TORCHVISION = ["celeba", "cifar10", "cifar100", "fashion-mnist", "mnist", "svhn"]


@pytest.mark.parametrize("name", TORCHVISION)
def test_absent_set_names_folder_and_cure(name: str, tmp_path: Path) -> None:
    with pytest.raises(GradleakError, match=r"--data-root.*--download") as caught:
        data(name, tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not any(tmp_path.rglob("*.gz")), "nothing was downloaded"


def test_failed_download_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.svhn.download_url", offline)
    with pytest.raises(GradleakError, match=r"SVHN: the download to .* failed: no route to host"):
        data("svhn", tmp_path, download=True)


def _idx(array: np.ndarray[Any, Any]) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def _fake_mnist(root: Path, folder: str) -> None:
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    for prefix, count in (("train", 6), ("t10k", 4)):
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(_idx(noise(count, 28, 28)))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(_idx(np.arange(count, dtype=np.uint8)))


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_mnist_formats(name: str, folder: str, tmp_path: Path) -> None:
    _fake_mnist(tmp_path, folder)
    part = data(name, tmp_path)
    check_contract(part)
    assert (part.shape, part.classes) == ((1, 28, 28), 10)
    assert (len(part.split.train), len(part.split.test)) == (6, 4)
    assert part.split.train.images[0, 0].equal(torch.from_numpy(noise(6, 28, 28)[0]).float() / 255)
    assert part.split.test.labels.tolist() == [0, 1, 2, 3]


def _fake_cifar(root: Path, fine: bool) -> None:
    folder = root / ("cifar-100-python" if fine else "cifar-10-batches-py")
    folder.mkdir()
    key = "fine_labels" if fine else "labels"
    parts = ["train", "test"] if fine else [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for part in parts:
        batch = {"data": noise(2, 3072), key: [0, 9]}
        (folder / part).write_bytes(pickle.dumps(batch))
    names = [str(label) for label in range(100 if fine else 10)]
    meta = {"fine_label_names": names} if fine else {"label_names": names}
    (folder / ("meta" if fine else "batches.meta")).write_bytes(pickle.dumps(meta))


@pytest.mark.parametrize(("name", "train"), [("cifar10", 10), ("cifar100", 2)])
def test_cifar_formats(name: str, train: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    _fake_cifar(tmp_path, fine=name == "cifar100")
    part = data(name, tmp_path)
    check_contract(part)
    assert (part.shape, part.classes) == ((3, 32, 32), int(name.removeprefix("cifar")))
    assert (len(part.split.train), len(part.split.test)) == (train, 2)
    assert part.split.test.images[1].equal(torch.from_numpy(noise(2, 3072)[1]).reshape(3, 32, 32) / 255)
    assert part.split.test.labels.tolist() == [0, 9]


def test_svhn_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.svhn.check_integrity", lambda *_: True)
    for name, count in (("train", 3), ("test", 2)):
        labels = np.array([[10], [1], [5]], np.uint8)[:count]  # the files write the digit 0 as 10
        scipy.io.savemat(tmp_path / f"{name}_32x32.mat", {"X": noise(32, 32, 3, count), "y": labels})
    part = data("svhn", tmp_path)
    check_contract(part)
    assert part.split.train.labels.tolist() == [0, 1, 5]
    assert part.split.test.images[1, 2, 7, 9] == pytest.approx(noise(32, 32, 3, 2)[7, 9, 2, 1] / 255)


@pytest.fixture
def celeba(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Data]:
    monkeypatch.setattr("torchvision.datasets.CelebA._check_integrity", lambda _: True)
    folder = tmp_path / "celeba"
    names = [f"{index:06}.jpg" for index in range(6)]
    for index, name in enumerate(names):
        write_png(folder / "img_align_celeba" / name, np.full((218, 178, 3), 40 * index, np.uint8))
    flags = [(1, -1), (-1, 1), (1, 1), (-1, -1), (1, 1), (-1, 1)]

    def table(file: str, head: str, lines: list[str]) -> None:
        body = [f"{name} {line}\n" for name, line in zip(names, lines, strict=True)]
        (folder / file).write_text(head + "".join(body))

    table("list_eval_partition.txt", "", ["0", "0", "0", "1", "2", "2"])
    table("identity_CelebA.txt", "", ["1"] * 6)
    table("list_bbox_celeba.txt", "6\nimage_id x\n", ["1"] * 6)
    table("list_landmarks_align_celeba.txt", "6\nx y \n", ["1 2"] * 6)
    table("list_attr_celeba.txt", "6\nMale Smiling \n", [f"{a} {b}" for a, b in flags])
    return lambda **options: data("celeba", tmp_path, **options)


def test_celeba_format(celeba: Callable[..., Data]) -> None:
    part = celeba(size=16)
    check_contract(part)
    assert part.shape == (3, 16, 16)
    assert part.split.classes == ("not Male", "Male")
    train = part.split.train
    seen = {round(float(train.images[k].mean() * 255 / 40)): int(train.labels[k]) for k in range(len(train))}
    assert seen == {0: 1, 1: 0, 2: 1}
    smiling = celeba(size=16, attribute="Smiling", limit=1)
    assert len(smiling.split.train) == len(smiling.split.test) == 1
    assert smiling.split.test.labels.tolist() == [1]


def test_celeba_attribute_typo(celeba: Callable[..., Data]) -> None:
    with pytest.raises(GradleakError, match="attribute of dataset 'celeba' 'Smilin'; did you mean 'Smiling'"):
        celeba(attribute="Smilin")


def _frozen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray[Any, Any], list[tuple[str, int]]]:
    """Have four images of a file as the victims and tuning victims, and return the file's images."""
    images = noise(6, 32, 32, 3)
    save(folder / "some.npz", images=images, labels=np.zeros(6, int))
    listed = [(hashlib.sha256(images[index].tobytes()).hexdigest(), index) for index in (4, 1, 5, 2)]
    monkeypatch.setattr(frozen_cifar10, "EVALUATION", tuple(listed[:2]))
    monkeypatch.setattr(frozen_cifar10, "TUNING", tuple(listed[2:]))
    for index, name in enumerate(frozen_cifar10.CLASSES):
        write_png(folder / "copies" / "train" / name / "0.png", noise(32, 32, 3, seed=50 + index))
        write_png(folder / "copies" / "test" / name / "0.png", noise(32, 32, 3, seed=70 + index))
    write_png(folder / "copies" / "train" / "frog" / "1.png", images[4])
    return images, listed


def test_frozen_victims_are_those_of_the_digests_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    images, _ = _frozen(tmp_path, monkeypatch)
    part = data("frozen-cifar10", tmp_path, copies="copies")
    check_contract(part)
    for tuning, wanted in ((False, [4, 1]), (True, [5, 2])):
        found, labels = part.victims(2, 1, tuning)
        assert (found[:, 0] * 255).round().byte().permute(0, 2, 3, 1).numpy().tolist() == images[wanted].tolist()
        assert labels[:, 0].tolist() == wanted, "labels are the list's, not the file's"
    assert len(part.split.train) == 10, "the copy of a victim is not public"
    assert "JPEG copies" in caplog.text


def test_frozen_victims_are_found_in_torchvisions_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    _fake_cifar(tmp_path, fine=False)
    first = {"data": noise(2, 3072, seed=9), "labels": [0, 9]}
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps(first))
    whole = data("cifar10", tmp_path).split
    pixels = [(whole.train.images[k] * 255).round().byte().permute(1, 2, 0).numpy() for k in (0, 1)]
    listed = [(hashlib.sha256(each.tobytes()).hexdigest(), label) for each, label in zip(pixels, (3, 7), strict=True)]
    monkeypatch.setattr(frozen_cifar10, "EVALUATION", tuple(listed[:1]))
    monkeypatch.setattr(frozen_cifar10, "TUNING", tuple(listed[1:]))
    part = data("frozen-cifar10", tmp_path)
    assert part.victims(1, 1)[0][0, 0].equal(whole.train.images[0]) and part.victims(1, 1)[1].item() == 3
    assert part.victims(1, 1, tuning=True)[0][0, 0].equal(whole.train.images[1])
    assert part.split.train.images.equal(whole.train.images[2:]), "a victim is not public"
    assert len(data("frozen-cifar10", tmp_path, limit=4).split.train) == 4


def test_frozen_victims_that_are_not_there_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, listed = _frozen(tmp_path, monkeypatch)
    with pytest.raises(GradleakError, match=r"no CIFAR-10 in .* to take public images from.*option copies"):
        data("frozen-cifar10", tmp_path)
    with pytest.raises(GradleakError, match=r"classes airplane, .* are not CIFAR-10's|no such folder"):
        data("frozen-cifar10", tmp_path, copies="nowhere")
    monkeypatch.setattr(frozen_cifar10, "TUNING", (*listed[2:], ("0" * 64, 1)))
    with pytest.raises(GradleakError, match=r"4 of 5 victims found in .*--data-root"):
        data("frozen-cifar10", tmp_path, copies="copies", limit=9)


def test_the_frozen_lists_are_two_of_32() -> None:
    digests = [digest for digest, _ in (*_cifar10_victims.EVALUATION, *_cifar10_victims.TUNING)]
    assert len(_cifar10_victims.EVALUATION) == len(_cifar10_victims.TUNING) == 32 == len(set(digests)) // 2


@needs_shared
def test_frozen_victims_of_the_shared_file() -> None:
    part = data("frozen-cifar10", SHARED, copies="cifar10", limit=100)
    found, labels = part.victims(32, 1)
    pixels = (found[:, 0] * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    assert [hashlib.sha256(each.tobytes()).hexdigest() for each in pixels] == [
        d for d, _ in _cifar10_victims.EVALUATION
    ]
    assert labels[:, 0].tolist() == [label for _, label in _cifar10_victims.EVALUATION]
