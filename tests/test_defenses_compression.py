from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradleak.defense import Defense, Message
from gradleak.defenses.dgc import DGC
from gradleak.defenses.qsgd import QSGD
from gradleak.defenses.quantise import Quantise
from gradleak.defenses.random_k import RandomK
from gradleak.defenses.sign import Sign
from gradleak.defenses.sketch import Sketch
from gradleak.defenses.terngrad import TernGrad
from gradleak.defenses.top_k import TopK
from gradleak.errors import GradleakError
from gradleak.mechanisms.packing import pack_bits, unpack_bits
from gradleak.mechanisms.sketching import FAMILIES
from gradleak.testing import Scene, digits, model, reconstruct
from gradleak.threat import Compute, Setting
from gradleak.update import Update, flatten, unflatten

SIZE = 6 * 7 + 11


def update(seed: int = 0) -> Update:
    generator = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(6, 7, generator=generator), "b": 0.1 * torch.randn(11, generator=generator)}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def send(defense: Defense, seed: int = 0) -> tuple[Message, dict[str, Tensor], bytes]:
    public = defense.public(update(), 1, seeded(3))
    message = defense.protect(update(), public, seeded(seed))
    return message, public, defense.pack(message, public)


def floats(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, np.float32).copy())


@given(bits=st.integers(1, 16), values=st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=50))
@settings(max_examples=50, deadline=None)
def test_packed_integers_come_back(bits: int, values: list[int]) -> None:
    numbers = torch.tensor(values) % 2**bits
    data = pack_bits(numbers, bits)
    assert len(data) == math.ceil(len(values) * bits / 8)
    assert torch.equal(unpack_bits(data, len(values), bits), numbers)


# Formulas and encodings.


@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.5, 1.0])
def test_top_k_keeps_the_largest(ratio: float) -> None:
    message, _, data = send(TopK(ratio=ratio))
    vector, sent = flatten(update()), flatten(message)
    count = math.ceil(ratio * SIZE)
    largest = sorted(range(SIZE), key=lambda index: -abs(float(vector[index])))[:count]
    assert sent.nonzero().flatten().tolist() == sorted(largest)
    torch.testing.assert_close(sent[largest], vector[largest], rtol=0, atol=0)
    assert len(data) == 1 + 4 * count + min(4 * count, math.ceil(SIZE / 8))
    # The encoding alone gives the message back.
    if data[0] == 0:
        indices = torch.from_numpy(np.frombuffer(data[1 : 1 + 4 * count], np.int32).copy()).long()
    else:
        indices = unpack_bits(data[1 : -4 * count], SIZE, bits=1).nonzero().flatten()
    restored = torch.zeros(SIZE).index_put((indices,), floats(data[-4 * count :]))
    torch.testing.assert_close(restored, sent, rtol=0, atol=0)


def test_top_k_within_tensors_keeps_a_share_of_each() -> None:
    message, _, _ = send(TopK(ratio=0.5, scope="tensor"))
    assert [int((tensor != 0).sum()) for tensor in message.values()] == [21, 6]
    # The bias is ten times smaller: over the whole update nearly none of it would be sent.
    message, _, _ = send(TopK(ratio=0.5))
    assert int((message["b"] != 0).sum()) < 3


def test_top_k_likelihood_knows_mask_and_threshold() -> None:
    defense = TopK(ratio=0.3)
    message, public, _ = send(defense)
    assert float(defense.nll(message, update(), public)) == pytest.approx(0, abs=1e-6)
    tau = min(float(value) for value in flatten(message).abs() if value > 0)
    unsent = int((flatten(message) == 0).nonzero()[0])
    for amount, silent in ((0.99 * tau, True), (1.5 * tau, False)):
        vector = flatten(update()).clone()
        vector[unsent] = amount
        guess = unflatten(vector, {name: tensor.shape for name, tensor in update().items()})
        assert (float(defense.nll(message, guess, public)) < 1e-6) is silent


def test_random_k_is_unbiased_and_costs_only_its_values() -> None:
    defense = RandomK(ratio=0.25)
    _, _, data = send(defense)
    assert len(data) == 4 * math.ceil(0.25 * SIZE)
    mean = torch.zeros(SIZE)
    for seed in range(800):
        public = defense.public(update(), 1, seeded(seed))
        mean += flatten(defense.decode(defense.simulate(update(), public), public)) / 800
    # Deviation of one entry's mean is |g| sqrt((d / k - 1) / 800); five of these.
    bound = 5 * flatten(update()).abs() * ((SIZE / math.ceil(0.25 * SIZE) - 1) / 800) ** 0.5
    assert bool(((mean - flatten(update())).abs() <= bound).all())


def test_dgc_first_message_is_top_k_of_the_clipped_update() -> None:
    message, public, data = send(DGC(ratio=0.2, clip=0.5))
    norm = float(flatten(update()).norm())
    scaled = {name: tensor * 0.5 / norm for name, tensor in update().items()}
    expected = TopK(ratio=0.2, scope="tensor").protect(scaled, {}, seeded())
    torch.testing.assert_close(message, expected)
    assert data == TopK(ratio=0.2, scope="tensor").pack(message, public)


def test_dgc_sends_everything_in_time() -> None:
    # Without momentum nothing is lost: what was sent plus what waits is the sum of all updates.
    defense, memory = DGC(ratio=0.1, momentum=0.0), None
    sent, total = torch.zeros(SIZE), torch.zeros(SIZE)
    for round_ in range(5):
        message, memory = defense.compress(update(round_), {}, seeded(), memory)
        sent += flatten(message)
        total += flatten(update(round_))
    assert memory is not None
    torch.testing.assert_close(sent + flatten(memory[1]), total)
    assert float(flatten(memory[1]).norm()) > 0


def test_dgc_momentum_and_masking_over_two_rounds() -> None:
    defense = DGC(ratio=0.5, momentum=0.9)
    first, memory = defense.compress({"w": torch.tensor([4.0, 1.0])}, {}, seeded())
    assert first["w"].tolist() == [4.0, 0.0]
    second, memory = defense.compress({"w": torch.tensor([1.0, 1.0])}, {}, seeded(), memory)
    # Entry 0 was sent, so its momentum is gone: it waits with 1. Entry 1: u = 0.9 + 1, v = 1 + u.
    torch.testing.assert_close(second["w"], torch.tensor([0.0, 2.9]))
    torch.testing.assert_close(memory[0]["w"], torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(memory[1]["w"], torch.tensor([1.0, 0.0]))


def test_dgc_warm_up() -> None:
    shares = [DGC(ratio=0.001, warm_up=2, epoch=epoch).share for epoch in range(5)]
    assert shares == pytest.approx([0.1, 0.01, 0.001, 0.001, 0.001])


@pytest.mark.parametrize("levels, norm", [(1, "max"), (3, "l2"), (15, "l2"), (255, "max")])
def test_qsgd_rounds_without_bias_to_neighbouring_levels(levels: int, norm: Any) -> None:
    defense = QSGD(levels=levels, bucket=8, norm=norm)
    count = 400
    decoded = torch.stack([flatten(defense.decode(send(defense, seed)[0], {})) for seed in range(count)])
    steps = []
    for tensor in update().values():
        for bucket in tensor.flatten().split(8):
            scale = bucket.norm() if norm == "l2" else bucket.abs().max()
            steps.append((scale / levels).expand(len(bucket)))
    step, exact = torch.cat(steps), flatten(update())
    assert bool(((decoded - exact).abs() <= step * (1 + 1e-5)).all())
    assert bool(((decoded.mean(0) - exact).abs() <= 5 * step * 0.5 / count**0.5).all())
    assert float(decoded.std(0).max()) > 0


@pytest.mark.parametrize("levels, bits", [(1, 2), (3, 3), (7, 4), (15, 5), (255, 9)])
def test_qsgd_encoding(levels: int, bits: int) -> None:
    message, _, data = send(QSGD(levels=levels, bucket=8))
    buckets = 6 + 2
    assert len(data) == 4 * buckets + math.ceil(SIZE * bits / 8)
    drawn = torch.cat([message["w"].flatten(), message["b"]])
    assert torch.equal(unpack_bits(data[4 * buckets :], SIZE, bits) - levels, drawn.long())
    torch.testing.assert_close(floats(data[: 4 * buckets]), torch.cat([message["w norms"], message["b norms"]]))


def test_sign_formula_and_encoding() -> None:
    message, public, data = send(Sign())
    for name, tensor in update().items():
        torch.testing.assert_close(message[name], tensor.sign() * tensor.abs().mean())
    assert len(data) == 2 * 4 + math.ceil(SIZE / 8)
    assert torch.equal(unpack_bits(data[8:], SIZE, 1) * 2 - 1, flatten(update()).sign().long())
    assert len(send(Sign(scaled=False))[2]) == math.ceil(SIZE / 8)
    assert set(flatten(send(Sign(scaled=False))[0]).tolist()) == {-1.0, 1.0}
    # One bit cannot say zero.
    assert Sign(scaled=False).protect({"w": torch.zeros(3)}, public, seeded())["w"].tolist() == [1, 1, 1]


def test_terngrad_is_ternary_and_unbiased_for_the_clipped_update() -> None:
    defense, count = TernGrad(clip=1.5), 800
    clipped = defense.simulate(update(), {})
    for name, tensor in update().items():
        limit = 1.5 * tensor.square().mean().sqrt()
        torch.testing.assert_close(clipped[name], torch.minimum(torch.maximum(tensor, -limit), limit))
    scale = torch.cat([tensor.abs().amax().expand(tensor.numel()) for tensor in clipped.values()])
    drawn = torch.stack([flatten(send(defense, seed)[0]) for seed in range(count)])
    assert set((drawn / scale).unique().tolist()) == {-1.0, 0.0, 1.0}
    bound = 5 * (scale * flatten(clipped).abs() / count).sqrt() + 1e-6
    assert bool(((drawn.mean(0) - flatten(clipped)).abs() <= bound).all())


def test_terngrad_encoding() -> None:
    message, _, data = send(TernGrad())
    assert len(data) == 2 * 4 + math.ceil(SIZE * 2 / 8)
    assert torch.equal(unpack_bits(data[8:], SIZE, 2) - 1, flatten(message).sign().long())
    torch.testing.assert_close(floats(data[:8]), torch.stack([t.abs().amax() for t in message.values()]))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantise_rounds_to_the_nearest_level(bits: Any) -> None:
    message, public, data = send(Quantise(bits=bits))
    steps = []
    for name, tensor in update().items():
        step = tensor.abs().max() / (2 ** (bits - 1) - 1)
        assert float((message[name] - tensor).abs().max()) <= float(step) / 2 * (1 + 1e-4)
        steps.append(step.expand(tensor.numel()))
    assert len(data) == 2 * 4 + math.ceil(SIZE * bits / 8)
    levels = unpack_bits(data[8:], SIZE, bits) - (2 ** (bits - 1) - 1)
    torch.testing.assert_close(levels * torch.cat(steps), flatten(message))
    # The truth lies in every interval: the adaptive loss cannot tell it from a perfect guess.
    assert float(Quantise(bits=bits).nll(message, update(), public)) < 1e-10


def test_half_precision() -> None:
    message, _, data = send(Quantise(bits=16))
    assert len(data) == 2 * SIZE
    torch.testing.assert_close(torch.from_numpy(np.frombuffer(data, np.float16).astype(np.float32)), flatten(message))
    huge = Quantise(bits=16).protect({"w": torch.tensor([1e9, -1e9])}, {}, seeded())["w"]
    assert huge.tolist() == [65504, -65504]


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_sketch_decodes_without_bias(kind: Any) -> None:
    defense, count = Sketch(kind=kind, ratio=0.5), 500
    _, _, data = send(defense)
    assert len(data) == 4 * math.ceil(0.5 * SIZE)
    rows = []
    for seed in range(count):
        public = defense.public(update(), 1, seeded(seed))
        rows.append(flatten(defense.decode(defense.simulate(update(), public), public)))
    drawn = torch.stack(rows)
    bound = 5 * drawn.std(0) / count**0.5 + 1e-6
    assert bool(((drawn.mean(0) - flatten(update())).abs() <= bound).all())


def test_sketch_size_is_checked() -> None:
    with pytest.raises(GradleakError, match="size = 54 exceeds the 53 entries"):
        Sketch(size=54).public(update(), 1, seeded())
    assert Sketch(size=53).public(update(), 1, seeded())["buckets"].shape == (53,)


def test_remedy_has_the_gaussian_mechanisms_guarantee() -> None:
    # One Gaussian release of noise multiplier 1 at delta 1e-5: 4.729 by Rényi accounting.
    guarantee = Sketch(sigma=1.0, clip=1.0).guarantee(Setting())
    assert guarantee is not None
    assert guarantee.epsilon == pytest.approx(4.729, abs=1e-3)
    assert Sketch(sigma=1.0).guarantee(Setting()) is None
    assert Sketch().guarantee(Setting()) is None


def test_remedy_adds_the_noise_it_declares() -> None:
    defense = Sketch(ratio=1.0, sigma=2.0, clip=0.5)
    public = defense.public(update(), 4, seeded())
    clipped = defense.per_example(update(), public)
    assert float(clipped["sketch"].norm()) == pytest.approx(0.5, rel=1e-5)
    noise = torch.cat([defense.protect(clipped, public, seeded(k))["sketch"] - clipped["sketch"] for k in range(100)])
    assert float(noise.std()) == pytest.approx(2.0 * 0.5 / 4, rel=5 / (2 * len(noise)) ** 0.5)


@pytest.mark.parametrize(
    "weakest, tolerance",
    [
        (TopK(ratio=1.0), 0),
        (RandomK(ratio=1.0), 0),
        (DGC(ratio=1.0), 0),
        (Quantise(bits=16), 2e-3),
        (QSGD(levels=2**20), 1e-4),
    ],
)
def test_no_strength_is_no_defense(weakest: Defense, tolerance: float) -> None:
    message, public, _ = send(weakest)
    torch.testing.assert_close(weakest.decode(message, public), update(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "defense", [TopK(), DGC(ratio=0.1), Quantise(bits=4), Quantise(), Quantise(bits=16), Sign(), TernGrad(), QSGD()]
)
def test_likelihood_is_one_for_zero_and_less_for_the_truth(defense: Defense) -> None:
    message, public, _ = send(defense)
    zero = {name: torch.zeros_like(tensor) for name, tensor in update().items()}
    of_zero = float(defense.nll(message, defense.simulate(zero, public), public))
    assert of_zero == pytest.approx(1, rel=1e-5)
    assert float(defense.nll(message, defense.simulate(update(), public), public)) < 0.7
    opposite = {name: -tensor for name, tensor in update().items()}
    assert float(defense.nll(message, defense.simulate(opposite, public), public)) > 1


# The attack.

CASES: list[tuple[Defense, float]] = [
    (Sketch(ratio=0.05), 25),
    (Sketch(kind="srht", ratio=0.05), 25),
    (RandomK(ratio=0.1), 15),
    (TopK(ratio=0.1), 7),
    (DGC(ratio=0.05), 7),
    (Quantise(bits=4), 3),
    (Quantise(bits=2), 6),
    (Sign(), 8),
    (TernGrad(), 5),
    (QSGD(), 6),
]


@pytest.mark.parametrize("defense, gain", CASES)
def test_who_knows_the_defense_recovers_more(defense: Defense, gain: float) -> None:
    """Mean PSNR of eight tuning digits behind a sigmoid network, at least `gain` dB above the oblivious attack."""
    oblivious, adaptive = (leak(defense, known) for known in (False, True))
    assert adaptive > oblivious + gain


def leak(defense: Defense, known: bool, victims: int = 8) -> float:
    torch.set_num_threads(1)
    scene = Scene.of(model("lenet"), *digits(victims), defense, seed=1)
    observation = scene.observe("public" if known else "oblivious", compute=Compute(width=victims))
    answer = reconstruct("inverting-gradients", observation, iterations=150, tv=0.0, signed=False)
    return float(scene.psnr(answer).mean())
