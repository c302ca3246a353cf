from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, vmap

from gradleak.search import penalties

PRIORS: dict[str, Callable[[Tensor], Tensor]] = {
    "anisotropic": penalties.total_variation,
    "isotropic": penalties.smooth_total_variation,
    "opponents": partial(penalties.smooth_total_variation, opponents=True),
    "powers": partial(penalties.smooth_total_variation, inner=2.0, outer=1.25),
    "norm": penalties.l2_norm,
}


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(
    seed=st.integers(0, 2**32), batch=st.integers(1, 3), channels=st.integers(1, 3),
    height=st.integers(2, 5), width=st.integers(2, 5),
)  # fmt: skip
@settings(max_examples=20, deadline=None)
def test_total_variation_is_the_naive_loop(seed: int, batch: int, channels: int, height: int, width: int) -> None:
    images = uniform(batch, channels, height, width, seed=seed)
    horizontal, vertical, isotropic = [], [], []
    for plane in images.flatten(0, 1).tolist():
        for i in range(height):
            for j in range(width):
                right = plane[i][j + 1] - plane[i][j] if j + 1 < width else None
                down = plane[i + 1][j] - plane[i][j] if i + 1 < height else None
                horizontal += [] if right is None else [abs(right)]
                vertical += [] if down is None else [abs(down)]
                isotropic.append(((right or 0) ** 2 + (down or 0) ** 2) ** 0.5)
    expected = sum(horizontal) / len(horizontal) + sum(vertical) / len(vertical)
    assert penalties.total_variation(images).item() == pytest.approx(expected)
    assert penalties.smooth_total_variation(images).item() == pytest.approx(sum(isotropic) / len(isotropic))


def test_values_by_hand() -> None:
    images = torch.tensor([[[[0.0, 1.0], [0.5, 0.5]]]])
    assert penalties.total_variation(images).item() == pytest.approx((1 + 0) / 2 + (0.5 + 0.5) / 2)
    assert penalties.smooth_total_variation(images).item() == pytest.approx((1.25**0.5 + 0.5 + 0 + 0) / 4)
    assert penalties.l2_norm(images).item() == pytest.approx(1.5**0.5)


def test_opponents_make_coloured_edges_cost_more_than_grey_ones() -> None:
    edge = torch.zeros(1, 3, 4, 4)
    edge[..., 2:] = 1
    coloured = edge * torch.tensor([1.0, -1.0, 1.0])[:, None, None] + torch.tensor([0.0, 1.0, 0.0])[:, None, None]
    colour = partial(penalties.smooth_total_variation, opponents=True)
    torch.testing.assert_close(penalties.smooth_total_variation(edge), penalties.smooth_total_variation(coloured))
    # Grey: three equal planes and three flat ones. Coloured: R - G and G - B step by 2, R - B stays flat.
    assert colour(coloured).item() / colour(edge).item() == pytest.approx(7 / 3, rel=1e-5)
    grey = uniform(1, 1, 4, 4)
    assert torch.equal(colour(grey), penalties.smooth_total_variation(grey))


@pytest.mark.parametrize("name", PRIORS)
def test_stacked_victims_and_single_ones_agree(name: str) -> None:
    images, prior = uniform(3, 2, 3, 5, 6), PRIORS[name]
    torch.testing.assert_close(vmap(prior)(images), torch.stack([prior(one) for one in images]))
    slopes = vmap(grad(prior))(images)
    torch.testing.assert_close(slopes, torch.stack([grad(prior)(one) for one in images]))
    assert slopes.isfinite().all() and slopes.abs().sum() > 0


@pytest.mark.parametrize("name", PRIORS)
def test_derivatives(name: str) -> None:
    images = uniform(1, 3, 3, 3).requires_grad_()
    assert torch.autograd.gradcheck(PRIORS[name], images)
    assert torch.autograd.gradgradcheck(PRIORS[name], images)


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flat_images_have_finite_slopes(name: str, dtype: torch.dtype) -> None:
    assert grad(PRIORS[name])(torch.full((1, 3, 4, 4), 0.5, dtype=dtype)).isfinite().all()


def test_clamp_to_box() -> None:
    images = torch.tensor([-0.5, 0.0, 0.25, 1.0, 7.0])
    assert penalties.clamp_to_box(images).tolist() == [0.0, 0.0, 0.25, 1.0, 1.0]
