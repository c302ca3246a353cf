"""What each measured number means: unit, direction, range, version, success thresholds. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Metric:
    """Facts about one column of the per-image rows.

    >>> METRICS["psnr"].worst, METRICS["mse"].worst
    (0.0, 1.0)
    """

    name: str
    """Key of the row."""
    id: str
    """Name with the version of its definition; raised whenever a number would change."""
    unit: str
    """Unit of the values, empty for a pure number."""
    higher_is_better: bool
    """Better for the attacker: whether a larger value means a closer reconstruction."""
    low: float
    """Lowest value of the scale."""
    high: float
    """Highest value of the scale."""
    description: str
    """One line for reports."""

    @property
    def worst(self) -> float:
        """The attacker's worst value, the score of a trial that produced nothing."""
        return self.low if self.higher_is_better else self.high

    @property
    def best(self) -> float:
        """The attacker's best value."""
        return self.high if self.higher_is_better else self.low

    @property
    def is_rate(self) -> bool:
        """Whether an image either succeeds or fails, so that a mean is a share of images."""
        return self.name in ("reidentified", "label_correct", "label_found")


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """A stated line between failure and success on one metric."""

    metric: str
    """Key of `METRICS`."""
    value: float
    """The last value that still counts as a success."""

    @property
    def name(self) -> str:
        """The condition as text, e.g. `psnr >= 20`."""
        return f"{self.metric} {'>=' if METRICS[self.metric].higher_is_better else '<='} {self.value:g}"

    def reached(self, value: float) -> bool:
        """Return whether a value is a success; NaN is none (drop unmeasured rows first, not failed ones).

        >>> Threshold(metric="psnr", value=20.0).reached(20.0), Threshold(metric="lpips", value=0.1).reached(0.2)
        (True, False)
        """
        if math.isnan(value):
            return False
        return value >= self.value if METRICS[self.metric].higher_is_better else value <= self.value


CAP = 54.0
"""dB from which an image of 8 bits is exact: rounding to its 256 values restores it (20 log10(510) = 54.15 dB).

Boards cap PSNR here before averaging: what lies beyond is precision of arithmetic, not leakage.
"""

METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            name="mse",
            id="mse-1",
            unit="",
            higher_is_better=False,
            low=0.0,
            high=1.0,
            description="mean squared error over all pixels and channels of an image",
        ),
        Metric(
            name="psnr",
            id="psnr-1",
            unit="dB",
            higher_is_better=True,
            low=0.0,
            high=100.0,
            description="peak signal-to-noise ratio of an image, peak 1, capped at 100 dB",
        ),
        Metric(
            name="ssim",
            id="ssim-1",
            unit="",
            higher_is_better=True,
            low=-1.0,
            high=1.0,
            description="structural similarity, Gaussian window of 11 pixels or what fits",
        ),
        Metric(
            name="ms_ssim",
            id="ms-ssim-1",
            unit="",
            higher_is_better=True,
            low=0.0,
            high=1.0,
            description="multi-scale structural similarity over as many scales as fit, from 22 pixels",
        ),
        Metric(
            name="lpips",
            id="lpips-alex-0.1",
            unit="",
            higher_is_better=False,
            low=0.0,
            high=1.0,
            description="learned perceptual distance, AlexNet, version 0.1, from 31 pixels",
        ),
        Metric(
            name="lpips_64",
            id="lpips-64-alex-0.1",
            unit="",
            higher_is_better=False,
            low=0.0,
            high=1.0,
            description="the same on images enlarged to 64 pixels (bilinear), so that small ones have it too",
        ),
        Metric(
            name="reidentified",
            id="reidentified-1",
            unit="",
            higher_is_better=True,
            low=0.0,
            high=1.0,
            description="whether no candidate is as near (MSE) to the reconstruction as the true image",
        ),
        Metric(
            name="label_correct",
            id="label-correct-1",
            unit="",
            higher_is_better=True,
            low=0.0,
            high=1.0,
            description="whether the reconstruction matched to the true image carries its label",
        ),
        Metric(
            name="label_found",
            id="label-found-1",
            unit="",
            higher_is_better=True,
            low=0.0,
            high=1.0,
            description="whether the inferred multiset has the true label (mean: multiset accuracy)",
        ),
    )
}
"""Every metric by the key of its column."""

THRESHOLDS = (
    Threshold(metric="psnr", value=CAP),
    Threshold(metric="psnr", value=20.0),
    Threshold(metric="psnr", value=30.0),
    Threshold(metric="ssim", value=0.6),
    Threshold(metric="lpips", value=0.2),
    Threshold(metric="lpips", value=0.1),
    Threshold(metric="reidentified", value=1.0),
)
"""The success conditions that leaderboards state: the first is strict (exact to 8 bits), the second perceptual."""
