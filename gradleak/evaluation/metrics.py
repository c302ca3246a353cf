"""How close a reconstruction is to the truth, per image, after one assignment per victim.

Images are cleaned once, by `clean`; every other function takes clean images [B, C, H, W] in [0, 1] and
returns one value an image, [B]. `gradleak.scales.METRICS` states unit, direction, range and version of each.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from ..errors import GradleakError
from ..scales import METRICS
from . import perceptual

_SIGMA, _RADIUS = 1.5, 5  # of the Gaussian window of SSIM, 11 pixels wide
_TRUNCATE = 3.5  # torchmetrics cuts its windows at this many sigmas, rounded to whole pixels
_SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang, Simoncelli and Bovik 2003
_SMALLEST_FOR_SCALES = {5: 176, 4: 99, 3: 44, 2: 22}  # the coarsest scale still holds a whole window
_ENLARGED = 64  # pixels of the shorter side for lpips_64
_SMALLEST_FOR_LPIPS = 31  # below it, AlexNet's second pooling has nothing left


def clean(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return images as float64 clamped to [0, 1], and which of them were finite [...].

    Non-finite pixels become mid-grey (0.5): a diverged reconstruction is scored, never dropped.

    Args:
        images: [..., C, H, W] of any floating dtype.
    """
    finite = images.isfinite()
    grey = torch.where(finite, images, 0.5)
    return grey.double().clamp(0, 1), finite.flatten(-3).all(-1)


def assign(reconstruction: Tensor, truth: Tensor) -> Tensor:
    """Return for each true image the index of its reconstruction, [B] int64: the least total MSE, one to one.

    Takes raw reconstructions; one that is not finite costs as much as the worst image, MSE 1.
    """
    images, finite = clean(reconstruction)
    return _assign(images, finite, clean(truth)[0])


def mse(reconstruction: Tensor, truth: Tensor) -> Tensor:
    """Mean squared error of each image, in [0, 1]."""
    return (reconstruction - truth).square().flatten(1).mean(1)


def psnr(reconstruction: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, peak 1; a perfect image has the cap, 100 dB."""
    value: Tensor = peak_signal_noise_ratio(reconstruction, truth, data_range=1.0, dim=(1, 2, 3), reduction="none")
    return value.clamp(max=METRICS["psnr"].high)


def ssim(reconstruction: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity of each image, in [-1, 1] (Wang et al. 2004), mean over all pixels and channels.

    The Gaussian window has sigma 1.5 and 11 pixels, borders are mirrored. Images below 11 pixels take the
    largest odd window that fits and a sigma in proportion (8 pixels: window 7, sigma 6/7); below 3 pixels the
    value is NaN.
    """
    radius = (min(truth.shape[-2:]) - 1) // 2
    if radius < 1:
        return _missing(truth)
    sigma = _SIGMA if radius >= _RADIUS else radius / _TRUNCATE
    value = structural_similarity_index_measure(reconstruction, truth, sigma=sigma, reduction="none", data_range=1.0)
    return cast(Tensor, value).reshape(len(truth))


def ms_ssim(reconstruction: Tensor, truth: Tensor) -> Tensor:
    """Multi-scale structural similarity of each image, in [0, 1] (Wang, Simoncelli and Bovik 2003).

    Two scales from 22 pixels, three from 44, four from 99, five from 176; the first weights of the paper are
    taken and scaled to sum to one, negative terms count as 0. Smaller images are NaN: values compare at one
    size only.
    """
    size = min(truth.shape[-2:])
    scales = next((scales for scales, smallest in _SMALLEST_FOR_SCALES.items() if size >= smallest), None)
    if scales is None:
        return _missing(truth)
    total = sum(_SCALE_WEIGHTS[:scales])
    weights = tuple(weight / total for weight in _SCALE_WEIGHTS[:scales])
    value = multiscale_structural_similarity_index_measure(
        reconstruction, truth, sigma=_SIGMA, reduction="none", data_range=1.0, betas=weights, normalize="relu"
    )
    return value.reshape(len(truth))


def lpips(reconstruction: Tensor, truth: Tensor) -> Tensor:
    """Learned perceptual distance of each image, AlexNet, version 0.1 (Zhang et al. 2018, arXiv:1801.03924).

    Grey images are repeated to three channels. NaN when the backbone's weights are not on this machine (one
    warning a process says which file to put where; nothing is downloaded), below 31 pixels, and for other
    channel counts.
    """
    return _missing(truth) if min(truth.shape[-2:]) < _SMALLEST_FOR_LPIPS else _perceptual(reconstruction, truth)


def lpips_64(reconstruction: Tensor, truth: Tensor) -> Tensor:
    """`lpips` of both images enlarged so that their shorter side has 64 pixels; larger ones stay as they are.

    Bilinear, pixel centres aligned, without antialiasing. Values do not compare with `lpips` of the same images.
    """
    shorter = min(truth.shape[-2:])
    if shorter < _ENLARGED:
        size = [round(side * _ENLARGED / shorter) for side in truth.shape[-2:]]
        reconstruction, truth = (
            nn.functional.interpolate(images, size=size, mode="bilinear", align_corners=False)
            for images in (reconstruction, truth)
        )
    return _perceptual(reconstruction, truth)


@torch.no_grad()
def _perceptual(reconstruction: Tensor, truth: Tensor) -> Tensor:
    network = perceptual.network("alex") if truth.shape[1] in (1, 3) else None
    if network is None:
        return _missing(truth)
    pair = (2 * images.float().expand(-1, 3, -1, -1) - 1 for images in (reconstruction, truth))
    return cast(Tensor, network.to(truth.device)(*pair)).reshape(len(truth)).to(truth.dtype)


def reidentified(reconstruction: Tensor, truth: Tensor, candidates: Tensor) -> Tensor:
    """Return whether each true image is nearer (MSE) to its reconstruction than every candidate, [B] bool.

    Ties count as not. A candidate equal to the true image, pixel by pixel, is that image and no rival.

    Args:
        reconstruction: [B, C, H, W], in the order of `truth`.
        truth: [B, C, H, W].
        candidates: [K, C, H, W], K >= 1.

    Raises:
        GradleakError: there is no candidate.
    """
    if len(candidates) == 0:
        raise GradleakError("re-identification: 0 candidates given, at least 1 is needed")
    rivals = candidates.to(truth).flatten(1)
    distance = _distances(reconstruction.flatten(1), rivals)
    same = _distances(truth.flatten(1), rivals) == 0
    own = _distances(reconstruction.flatten(1)[:, None], truth.flatten(1)[:, None]).flatten()
    return own < distance.masked_fill(same, torch.inf).amin(1)


def labels_found(labels: Tensor, truth: Tensor) -> Tensor:
    """Return for each true label whether the inferred multiset has it, [B] bool; mean: multiset accuracy.

    The k-th occurrence of a class among the true labels is found if the class was inferred at least k times.

    Args:
        labels: inferred labels [B], in any order.
        truth: true labels [B].
    """
    occurrence = (truth[:, None] == truth).tril().sum(1)
    return (truth[:, None] == labels).sum(1) >= occurrence


def score(
    images: Tensor, labels: Tensor | None, truth_images: Tensor, truth_labels: Tensor, candidates: Tensor
) -> list[dict[str, Any]]:
    """Return one row per victim and true image, all metrics on the same assignment.

    A reconstruction with non-finite pixels is scored with those pixels mid-grey and marked `finite` False.

    Args:
        images: reconstructions [N, B, C, H, W].
        labels: labels of the reconstructions [N, B], or None where the attack gives none.
        truth_images: [N, B, C, H, W] in [0, 1].
        truth_labels: [N, B].
        candidates: [K, C, H, W] in [0, 1], rivals for re-identification.

    Returns:
        N * B rows in order, plain Python values: `victim`, `image` (indices of the true image), `matched`
        (index of its reconstruction), `finite`, `label_correct` and `label_found` (None without labels) and
        the other keys of `gradleak.scales.METRICS`.

    Raises:
        GradleakError: shapes disagree, true images or candidates leave [0, 1], or there is no candidate.
    """
    if images.shape != truth_images.shape or (labels is not None and labels.shape != truth_labels.shape):
        given = [tuple(images.shape), None if labels is None else tuple(labels.shape)]
        expected = [tuple(truth_images.shape), tuple(truth_labels.shape)]
        raise GradleakError(f"reconstructed images and labels have shapes {given}, the truth has {expected}")
    for name, tensor in (("true images", truth_images), ("candidates", candidates)):
        if not ((tensor >= 0) & (tensor <= 1)).all():
            raise GradleakError(f"{name} must be finite and in [0, 1] to be scored")
    rivals = candidates.to(truth_images.device).double()
    rows = []
    # One victim at a time, so that a score never depends on the other victims.
    for victim, (raw, truth, truth_label) in enumerate(zip(images, truth_images, truth_labels, strict=True)):
        reconstruction, finite = clean(raw.to(truth.device))
        truth = truth.double()
        matched = _assign(reconstruction, finite, truth)
        reconstruction = reconstruction[matched]
        columns = {
            "matched": matched,
            "finite": finite[matched],
            "mse": mse(reconstruction, truth),
            "psnr": psnr(reconstruction, truth),
            "ssim": ssim(reconstruction, truth),
            "ms_ssim": ms_ssim(reconstruction, truth),
            "lpips": lpips(reconstruction, truth),
            "lpips_64": lpips_64(reconstruction, truth),
            "reidentified": reidentified(reconstruction, truth, rivals),
        }
        if labels is not None:
            label = labels[victim].to(truth_label.device)
            columns["label_correct"] = label[matched.to(label.device)] == truth_label
            columns["label_found"] = labels_found(label, truth_label)
        values = {name: column.tolist() for name, column in columns.items()}
        missing = {} if labels is not None else {"label_correct": None, "label_found": None}
        for image in range(len(truth)):
            row = {name: column[image] for name, column in values.items()}
            rows.append({"victim": victim, "image": image, **row, **missing})
    return rows


def _assign(images: Tensor, finite: Tensor, truth: Tensor) -> Tensor:
    pixels = truth[0].numel()
    cost = _distances(truth.flatten(1), images.flatten(1)).square() / pixels
    cost[:, ~finite] = 1.0
    _, matched = linear_sum_assignment(cost.cpu().numpy())
    return torch.as_tensor(matched, device=truth.device)


def _distances(left: Tensor, right: Tensor) -> Tensor:
    # Without the matrix product, whose cancellation would hide exact ties and perfect images.
    distances: Tensor = torch.cdist(left, right, compute_mode="donot_use_mm_for_euclid_dist")
    return distances


def _missing(truth: Tensor) -> Tensor:
    return truth.new_full((len(truth),), torch.nan)
