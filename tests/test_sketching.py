from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard as scipy_hadamard
from torch import Tensor
from torch.func import grad, vmap

from gradleak.mechanisms.sketching import FAMILIES, CountSketch, Operator, hadamard

families = pytest.mark.parametrize("family", sorted(FAMILIES))


def operator(family: str, dimension: int, size: int, seed: int = 0) -> Operator:
    generator = torch.Generator().manual_seed(seed)
    return FAMILIES[family](dimension, size, FAMILIES[family].draw(dimension, size, generator))


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(operator: Operator) -> Tensor:
    return operator.sketch(torch.eye(operator.dimension, dtype=torch.float64)).T


@families
@given(dimension=st.integers(1, 200), share=st.floats(0.01, 1), seed=st.integers(0, 2**32))
@settings(max_examples=15, deadline=None)
def test_adjoint_identity(family: str, dimension: int, share: float, seed: int) -> None:
    size = max(1, int(share * dimension))
    drawn = operator(family, dimension, size, seed)
    v, y = normal(dimension), normal(size, seed=2)
    assert drawn.sketch(v) @ y == pytest.approx(float(v @ drawn.desketch(y)), rel=1e-12, abs=1e-12)


@families
def test_linear_and_batched_over_leading_dimensions(family: str) -> None:
    drawn, v = operator(family, 70, 16), normal(2, 3, 70)
    rows = drawn.sketch(v)
    matrix = dense(drawn)
    assert matrix.shape == (16, 70)
    torch.testing.assert_close(rows, v @ matrix.T)
    torch.testing.assert_close(drawn.desketch(rows), rows @ matrix)
    torch.testing.assert_close(vmap(vmap(drawn.sketch))(v), rows)
    torch.testing.assert_close(vmap(drawn.sketch, in_dims=1, out_dims=1)(v[0].T), rows[0].T)


@families
def test_expected_gram_matrix_is_the_identity(family: str) -> None:
    # Every entry of R^T R has a standard deviation of at most sqrt(2 / s) a draw; the bound is five of the mean's.
    dimension, size, count = 12, 6, 1000
    draws = [dense(operator(family, dimension, size, seed)) for seed in range(count)]
    mean = torch.stack([matrix.T @ matrix for matrix in draws]).mean(0)
    assert (mean - torch.eye(dimension)).abs().max() < 5 * (2 / size / count) ** 0.5


@families
def test_second_moment_is_one_plus_d_over_s(family: str) -> None:
    dimension, size, count = 96, 16, 500
    v = normal(dimension)
    draws = [operator(family, dimension, size, seed) for seed in range(count)]
    ratios = torch.stack([drawn.desketch(drawn.sketch(v)).square().sum() / v.square().sum() for drawn in draws])
    # E (R^T R)_ij^2 off the diagonal is 1 / s, less for Hadamard rows drawn without repeats out of D = 128; the
    # diagonal is 1, but for a gaussian R of variance 2 / s.
    expected = {
        "ams": 1 + (dimension - 1) / size,
        "count-sketch": 1 + (dimension - 1) / size,
        "gaussian": 1 + (dimension + 1) / size,
        "srht": 1 + (dimension - 1) * (128 - size) / (127 * size),
    }[family]
    assert float(ratios.mean()) == pytest.approx(expected, abs=5 * float(ratios.std()) / count**0.5)
    assert float(ratios.std()) / count**0.5 < 0.03 * expected


@families
def test_twice_differentiable_alone_and_under_vmap(family: str) -> None:
    drawn = operator(family, 9, 4)
    v = normal(9).requires_grad_()
    # Cubed, as the second derivative of a linear map alone is zero.
    assert torch.autograd.gradcheck(lambda x: drawn.sketch(x**3), v)
    assert torch.autograd.gradgradcheck(lambda x: drawn.desketch(drawn.sketch(x**3)), v)

    def loss(x: Tensor) -> Tensor:
        return drawn.sketch(x**3).square().sum()

    def norm_of_gradient(x: Tensor) -> Tensor:
        first: Tensor = grad(loss)(x)
        return first.square().sum()

    rows = normal(3, 9, seed=4)
    stacked = vmap(grad(norm_of_gradient))(rows)
    singly = []
    for row in rows:
        leaf = row.clone().requires_grad_()
        (inner,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        singly.append(torch.autograd.grad(inner.square().sum(), leaf)[0])
    torch.testing.assert_close(stacked, torch.stack(singly))


@pytest.mark.parametrize("length", [1, 2, 32, 64, 128, 1024])
def test_hadamard_is_scipys(length: int) -> None:
    rows = normal(2, length)
    torch.testing.assert_close(hadamard(rows), rows @ torch.from_numpy(scipy_hadamard(length)).double())


@pytest.mark.parametrize("length", [4096, 8192, 65536])
def test_hadamard_is_the_butterfly(length: int) -> None:
    rows = normal(2, length)
    expected, half = rows, 1
    while half < length:
        low, high = expected.view(2, -1, 2, half).unbind(2)
        expected = torch.stack([low + high, low - high], dim=2).reshape(2, length)
        half *= 2
    torch.testing.assert_close(hadamard(rows), expected)


def test_count_sketch_has_one_sign_a_column() -> None:
    drawn = operator("count-sketch", 500, 20)
    matrix = dense(drawn)
    assert torch.equal((matrix != 0).sum(0), torch.ones(500, dtype=torch.int64))
    assert set(matrix.unique().tolist()) == {-1.0, 0.0, 1.0}


@families
def test_precision_does_not_change_the_matrix(family: str) -> None:
    drawn, v = operator(family, 300, 30), normal(300)
    torch.testing.assert_close(drawn.sketch(v.float()).double(), drawn.sketch(v), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["gaussian", "ams"])
def test_dense_families_stream_blocks_of_one_matrix(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Width 7 does not divide 50: the last block is narrower. Adjoint and sketch must see the same blocks.
    monkeypatch.setattr("gradleak.mechanisms.sketching._BLOCK", 7 * 5)
    drawn, v = operator(family, 50, 5), normal(50)
    matrix = dense(drawn)
    torch.testing.assert_close(drawn.sketch(v), matrix @ v)
    torch.testing.assert_close(drawn.desketch(normal(5)), matrix.T @ normal(5))
    # Columns of different blocks differ, so the stream is not started over.
    assert not torch.equal(matrix[:, 0], matrix[:, 7])


def test_draws_stay_small() -> None:
    draws = CountSketch.draw(10_000, 100, torch.Generator().manual_seed(0))
    assert sum(tensor.nbytes for tensor in draws.values()) == 8 * 10_000
