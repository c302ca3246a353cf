"""Whitened first layers, and the way back."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradleak.mechanisms.whitening import restore, whiten


@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(0, 7), st.floats(1e-3, 2.0))
@settings(deadline=None, max_examples=60)
def test_restoring_undoes_whitening_of_singular_values_that_are_large(
    seed: int, count: int, more: int, damping: float
) -> None:
    stream = torch.Generator().manual_seed(seed)
    left, values, right = torch.linalg.svd(
        torch.randn(3, count, count + more, generator=stream, dtype=torch.float64), full_matrices=False
    )
    least = (count * damping) ** 0.5
    rows = (left * (values + 1.1 * least).unsqueeze(-2)) @ right
    torch.testing.assert_close(restore(whiten(rows, damping), damping), rows, atol=1e-6, rtol=1e-6)


def test_restoring_takes_the_larger_of_two_explanations() -> None:
    small = torch.tensor([[0.1]], dtype=torch.float64)
    larger = restore(whiten(small, 1.0), 1.0)
    torch.testing.assert_close(larger, torch.tensor([[10.0]], dtype=torch.float64))
    torch.testing.assert_close(whiten(larger, 1.0), whiten(small, 1.0))


def test_of_nothing_nothing_is_restored() -> None:
    assert not restore(torch.zeros(2, 3, 4), 0.1).any()
