from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import grad, jacrev, vmap

from gradleak import registry, testing
from gradleak.attack import GradientMatching
from gradleak.engine.backends import Sequential, Vmap
from gradleak.engine.layerwise import Layerwise
from gradleak.engine.problem import take
from gradleak.errors import GradleakError
from gradleak.mechanisms import quantum
from gradleak.model import initialise
from gradleak.seeds import Generators, generator
from gradleak.testing import Scene
from gradleak.threat import Compute, Observation, Setting
from gradleak.update import LocalTraining, Network, by_autograd, by_transform, local_update, one_hot, squared_norm

SHAPE = (1, 8, 8)
ENCODINGS: dict[str, dict[str, Any]] = {
    "angle": {"qubits": 4},
    "product": {"qubits": 4, "repetitions": 2},
    "exponential": {"qubits": 4, "repetitions": 2},
    "reupload": {"qubits": 4, "repetitions": 2},
    "amplitude": {"qubits": 6},
    "fourier": {"repetitions": 3},
    "chebyshev": {"repetitions": 4},
    "angle-patches": {},
    "amplitude-patches": {},
}
WITH_ANGLES = ["angle", "product", "exponential", "reupload", "fourier", "chebyshev"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def draw(*shape: int, seed: object = 0) -> Tensor:
    return torch.rand(shape, generator=generator("test", seed), dtype=torch.float64)


def circuit(features: Tensor, weights: Tensor, entangler: quantum.Entangler, kind: quantum.Observable) -> Tensor:
    """RX encoding, ansatz, read-out: the circuit every check below is about."""
    qubits = weights.shape[1]
    order = quantum.entangle(qubits, entangler)
    state = quantum.evolve(quantum.encode_angles(features), weights, order)
    return quantum.expectations(state, quantum.observable(qubits, kind).double())


# The simulator.


def dense(features: np.ndarray, weights: np.ndarray, entangler: str, kind: str) -> np.ndarray:
    """The same circuit by full matrices, one gate after the other, from the textbook definitions."""
    qubits = len(features)
    x, y, z = np.array([[0, 1], [1, 0]]), np.array([[0, -1j], [1j, 0]]), np.diag([1, -1])
    one, zero, hit = np.eye(2), np.diag([1, 0]), np.diag([0, 1])

    def at(**gates: np.ndarray) -> np.ndarray:
        full = np.eye(1)
        for qubit in range(qubits):
            full = np.kron(full, gates.get(f"q{qubit}", one))
        return full

    def rotation(pauli: np.ndarray, angle: float, qubit: int) -> np.ndarray:
        return at(**{f"q{qubit}": math.cos(angle / 2) * one - 1j * math.sin(angle / 2) * pauli})

    state = np.eye(2**qubits)[0].astype(complex)
    for qubit in range(qubits):
        state = rotation(x, features[qubit], qubit) @ state
    pairs = [(q, q + 1) for q in range(qubits - 1)]
    if entangler == "ring" and qubits > 2:
        pairs.append((qubits - 1, 0))
    for layer in weights:
        for qubit in range(qubits):
            state = rotation(z, layer[qubit, 1], qubit) @ rotation(y, layer[qubit, 0], qubit) @ state
        for control, target in pairs:
            gate = at(**{f"q{control}": zero}) + at(**{f"q{control}": hit, f"q{target}": x})
            state = gate @ state
    if kind == "parity":
        return np.array([np.vdot(state, at(**{f"q{q}": z for q in range(qubits)}) @ state).real])
    return np.array([np.vdot(state, at(**{f"q{q}": z}) @ state).real for q in range(qubits)])


@pytest.mark.parametrize("qubits", [1, 2, 3, 5])
@pytest.mark.parametrize("entangler", ["chain", "ring"])
@pytest.mark.parametrize("kind", ["qubits", "parity"])
def test_the_circuit_equals_full_matrices(qubits: int, entangler: quantum.Entangler, kind: quantum.Observable) -> None:
    features, weights = 7 * draw(2, 3, qubits), 7 * draw(3, qubits, 2, seed=1)
    values = circuit(features, weights, entangler, kind)
    assert values.shape == (2, 3, 1 if kind == "parity" else qubits)
    for row, value in zip(features.view(-1, qubits), values.flatten(0, 1), strict=True):
        expected = dense(row.numpy(), weights.numpy(), entangler, kind)
        assert np.abs(value.numpy() - expected).max() < 1e-13


def pennylane_circuit(qubits: int, entangler: str, kind: str) -> Callable[[Tensor, Tensor], Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qml = pytest.importorskip("pennylane", reason="the extra [quantum] is not installed")
    device = qml.device("default.qubit", wires=qubits)

    # Only backprop: adjoint and parameter-shift give wrong second derivatives without a word.
    @qml.qnode(device, interface="torch", diff_method="backprop")  # type: ignore[untyped-decorator]
    def node(features: Tensor, weights: Tensor) -> Any:
        for qubit in range(qubits):
            qml.RX(features[:, qubit], wires=qubit)
        for layer in weights:
            for qubit in range(qubits):
                qml.RY(layer[qubit, 0], wires=qubit)
                qml.RZ(layer[qubit, 1], wires=qubit)
            for qubit in range(qubits - 1):
                qml.CNOT(wires=[qubit, qubit + 1])
            if entangler == "ring" and qubits > 2:
                qml.CNOT(wires=[qubits - 1, 0])
        if kind == "parity":
            return [qml.expval(qml.prod(*[qml.PauliZ(qubit) for qubit in range(qubits)]))]
        return [qml.expval(qml.PauliZ(qubit)) for qubit in range(qubits)]

    return lambda features, weights: torch.stack([row.double() for row in node(features, weights)], dim=-1)


def derivatives(run: Callable[[Tensor, Tensor], Tensor], features: Tensor, weights: Tensor) -> list[Tensor]:
    """Values, gradients by features and weights, and what matching needs: a gradient's gradient by both."""
    features, weights = features.clone().requires_grad_(), weights.clone().requires_grad_()
    values = run(features, weights)
    first = torch.autograd.grad((values.square() + values).sum(), (features, weights), create_graph=True)
    mixed = torch.autograd.grad((first[1] - draw(*weights.shape, seed=2)).square().sum(), (features, weights))
    return [values.detach(), *(tensor.detach() for tensor in (*first, *mixed))]


@pytest.mark.parametrize("qubits", range(3, 9))
@pytest.mark.parametrize(("entangler", "kind"), [("chain", "qubits"), ("ring", "parity")])
def test_pennylane_agrees_to_second_derivatives(
    qubits: int, entangler: quantum.Entangler, kind: quantum.Observable
) -> None:
    features, weights = 7 * draw(2, qubits), 7 * draw(2, qubits, 2, seed=1)
    oracle = pennylane_circuit(qubits, entangler, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = derivatives(oracle, features, weights)
    own = derivatives(lambda x, w: circuit(x, w, entangler, kind), features, weights)
    for mine, theirs in zip(own, expected, strict=True):
        assert mine.shape == theirs.shape
        assert (mine - theirs).abs().max() < 1e-10


def test_second_derivatives_equal_finite_differences() -> None:
    features, weights = draw(2, 3).requires_grad_(), draw(2, 3, 2, seed=1).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x, w: circuit(x, w, "ring", "qubits"), (features, weights))


def test_uploads_between_blocks_are_differentiable_and_equal_a_longer_encoding() -> None:
    features = draw(4, 3)
    state = quantum.encode_angles(features[:, :3])
    twice = quantum.Gates(quantum.rotate_x(features))(state)
    assert (twice - quantum.encode_angles(2 * features)).abs().max() < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_func_stacks_features_and_weights(dtype: torch.dtype) -> None:
    features, weights = draw(3, 2, 4).to(dtype), draw(3, 2, 4, 2, seed=1).to(dtype)
    signs = quantum.observable(4, "qubits").to(dtype)
    order = quantum.entangle(4, "chain")

    def energy(x: Tensor, w: Tensor) -> Tensor:
        measured = quantum.expectations(quantum.evolve(quantum.encode_angles(x), w, order), signs)
        return measured.square().sum()

    def mismatch(x: Tensor, w: Tensor) -> Tensor:
        slope: Tensor = grad(energy, argnums=1)(x, w)
        return slope.square().sum()

    stacked = vmap(grad(mismatch))(features, weights)
    assert stacked.dtype == dtype
    single = torch.stack([grad(mismatch)(x, w) for x, w in zip(features, weights, strict=True)])
    assert (stacked - single).abs().max() < (1e-13 if dtype == torch.float64 else 1e-5)
    curvature = vmap(jacrev(jacrev(energy)))(features, weights).flatten(3).flatten(1, 2)
    assert (curvature - curvature.mT).abs().max() < (1e-13 if dtype == torch.float64 else 1e-5)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32), qubits=st.integers(1, 7), layers=st.integers(1, 3))
def test_gates_keep_the_norm_and_measurements_stay_in_range(seed: int, qubits: int, layers: int) -> None:
    state = quantum.encode_amplitudes(2 * draw(3, 2**qubits, seed=seed) - 1)
    weights = 20 * draw(layers, qubits, 2, seed=(seed, 1))
    evolved = quantum.evolve(state, weights, quantum.entangle(qubits, "ring"))
    assert (evolved.abs().square().sum(-1) - 1).abs().max() < 1e-12
    measured = quantum.expectations(evolved, quantum.observable(qubits, "qubits").double())
    assert measured.abs().max() <= 1 + 1e-12


def test_an_encoding_is_periodic() -> None:
    features, weights = draw(2, 4), draw(2, 4, 2, seed=1)
    shifted = circuit(features + 2 * math.pi, weights, "chain", "qubits")
    assert (shifted - circuit(features, weights, "chain", "qubits")).abs().max() < 1e-13


def test_the_chain_copies_the_first_bit_down() -> None:
    order = quantum.entangle(3, "chain")
    state = torch.zeros(8).index_fill(0, torch.tensor(0b100), 1)
    assert state[order].argmax() == 0b111


def test_a_black_image_as_amplitudes_has_finite_derivatives() -> None:
    black = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    weights = draw(1, 2, 2, seed=1).requires_grad_()
    state = quantum.evolve(quantum.encode_amplitudes(black), weights, quantum.entangle(2, "chain"))
    total = quantum.expectations(state, quantum.observable(2, "qubits").double()).sum()
    (first,) = torch.autograd.grad(total, weights, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), black)
    assert torch.isfinite(second).all()


# Phase unwrapping.


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32), base=st.integers(1, 5), repetitions=st.integers(1, 5),
    turn=st.floats(0.05, 0.95),
)  # fmt: skip
def test_unwrapping_inverts_the_encoding(seed: int, base: int, repetitions: int, turn: float) -> None:
    features = draw(2, 3, seed=seed)
    multipliers = torch.tensor([float(base**k) for k in range(repetitions)], dtype=torch.float64)
    angles = quantum.TURN * turn * multipliers[:, None] * features[:, None]
    turned = angles + quantum.TURN * torch.randint(-3, 4, angles.shape, generator=generator(seed)).double()
    assert (quantum.unwrap(turned, multipliers, turn) - features).abs().max() < 1e-10


def test_higher_frequencies_make_the_feature_more_precise() -> None:
    features = 0.2 + 0.6 * draw(1000, 1)
    multipliers = torch.tensor([1.0, 5.0, 25.0], dtype=torch.float64)
    angles = math.pi * multipliers[:, None] * features[:, None]
    angles = angles + 0.1 * (2 * draw(*angles.shape, seed=1) - 1)
    errors = [
        (quantum.unwrap(angles[:, :m], multipliers[:m], 0.5) - features).square().mean().sqrt() for m in (1, 2, 3)
    ]
    assert errors[2] < errors[1] / 4 < errors[0] / 16


# The defense.


def prepared(encoding: str, model: str = "mlp", shape: tuple[int, int, int] = SHAPE, **more: Any) -> nn.Module:
    module = initialise(registry.build("models", model), shape, 10, 0)
    options = {"encoding": encoding, **ENCODINGS[encoding], **more}
    built: nn.Module = registry.build("defenses", "quantum-encoding", options).prepare_model(module)
    return built.double()


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("model", ["mlp", "lenet"])
def test_every_encoding_has_a_simulable_gradient(encoding: str, model: str) -> None:
    network = Network.of(prepared(encoding, model, (3, 8, 8)))
    images, targets = draw(2, 3, 8, 8), one_hot(torch.tensor([3, 7]), 10, torch.float64)
    results = []
    for differentiate in (by_autograd, by_transform):
        guess = images.clone().requires_grad_()
        update = local_update(network, guess, targets, LocalTraining(), differentiate=differentiate)
        (slope,) = torch.autograd.grad(squared_norm(update), guess)
        assert slope.abs().max() > 0
        results.append(slope)
    assert (results[0] - results[1]).abs().max() < 1e-10 * results[0].abs().max()


def test_local_steps_stack_over_victims() -> None:
    network = Network.of(prepared("reupload"))
    images, targets = draw(3, 1, *SHAPE), one_hot(torch.tensor([[3], [7], [1]]), 10, torch.float64)
    training = LocalTraining(steps=2, lr=0.1)
    stacked = vmap(lambda x, t: local_update(network, x, t, training, differentiate=by_transform))(images, targets)
    for index in range(3):
        single = local_update(network, images[index], targets[index], training)
        assert all((stacked[name][index] - single[name]).abs().max() < 1e-14 for name in single)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_preparing_repeats_itself_and_leaves_the_model_alone(encoding: str) -> None:
    module = initialise(registry.build("models", "lenet"), SHAPE, 10, 0)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    outer = torch.random.get_rng_state()
    first, second, other = (
        registry.build(
            "defenses", "quantum-encoding", {"encoding": encoding, **ENCODINGS[encoding], "seed": seed}
        ).prepare_model(module)
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch.random.get_rng_state(), outer)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    images = draw(2, *SHAPE).float()
    assert first(images).shape == (2, 10)
    assert torch.equal(first(images), second(images))
    assert not torch.equal(first(images), other(images))


@pytest.mark.parametrize("encoding", WITH_ANGLES)
def test_angles_carry_the_model_and_give_the_features_back(encoding: str) -> None:
    model = prepared(encoding)
    assert isinstance(model, quantum.AngleEncoded)
    images = draw(3, *SHAPE)
    angles = model.angles(images)
    assert (model.on_angles()(angles / quantum.TURN + 1) - model(images)).abs().max() < 1e-10
    assert not model.relaxed
    restored = model.images(angles - quantum.TURN, SHAPE)
    expected = images if encoding in ("fourier", "chebyshev") else quantum.unpool(quantum.pool(images, 4), SHAPE)
    if encoding in ("product", "exponential"):
        expected = quantum.unpool(quantum.pool(images, 2), SHAPE)
    assert (restored - expected).abs().max() < 1e-10
    assert (model(restored) - model(images)).abs().max() < 1e-10


def test_chebyshev_features_are_the_polynomials() -> None:
    model = prepared("chebyshev", "linear")
    seen: list[Tensor] = []
    model.network.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))  # type: ignore[union-attr]
    images = draw(1, *SHAPE)
    model(images)
    position = (1 - 2 * images[0, 0]).numpy()
    for degree in range(1, 5):
        expected = np.polynomial.chebyshev.chebval(position, [0] * degree + [1])
        assert np.abs(seen[0][0, degree - 1].numpy() - expected).max() < 1e-12


def test_patches_are_product_states() -> None:
    network = prepared("angle-patches", "linear")
    assert isinstance(network, nn.Sequential)
    images = draw(1, 1, 2, 2)
    amplitudes = network[0](images).reshape(4, 2, 2)
    angles = math.pi / 2 * images.flatten().numpy()
    expected = np.array([1.0])
    for angle in angles:
        expected = np.kron(expected, [math.cos(angle), math.sin(angle)])
    # pixel_shuffle puts amplitudes 4c to 4c + 3 into channel c.
    assert np.abs(amplitudes.flatten().numpy() - expected).max() < 1e-14


def test_a_widened_first_layer_keeps_the_scale() -> None:
    module = initialise(registry.build("models", "mlp"), SHAPE, 10, 0)
    wide = dict(prepared("fourier").named_parameters())["network.2.weight"]
    narrow = dict(module.named_parameters())["2.weight"]
    assert wide.shape == (narrow.shape[0], 6 * 64)
    ratio = float(wide.detach().std() / narrow.detach().std())
    assert abs(ratio - 6**-0.5) < 0.02


def test_a_fixed_head_sends_the_circuit_alone() -> None:
    fixed, trained = prepared("exponential", head="fixed"), prepared("exponential")
    assert [name for name, _ in fixed.named_parameters()] == ["circuit.rotations"]
    assert [name for name, _ in trained.named_parameters()] == [
        "circuit.rotations", "circuit.head.weight", "circuit.head.bias",
    ]  # fmt: skip


def test_mistakes_are_explained() -> None:
    with pytest.raises(GradleakError, match="qubits = 8 is not a multiple of repetitions = 3"):
        registry.build("defenses", "quantum-encoding", {"repetitions": 3})
    with pytest.raises(GradleakError, match="qubits"):
        registry.build("defenses", "quantum-encoding", {"qubits": 11, "repetitions": 1})
    with pytest.raises(GradleakError, match="even sides, not 7x8"):
        prepared("angle-patches")(draw(1, 1, 7, 8))
    with pytest.raises(GradleakError, match="no linear layer"):
        registry.build("defenses", "quantum-encoding", {}).prepare_model(nn.Conv2d(1, 1, 1))


# The attack.


def observe(options: dict[str, Any], images: Tensor, labels: Tensor, model: str = "mlp") -> Observation:
    defense = registry.build("defenses", "quantum-encoding", options)
    module = testing.model(model, (images.shape[2], images.shape[3], images.shape[4]))
    return Scene.of(module, images, labels, defense).observe("public", compute=Compute(width=80))


def decibels(images: Tensor, truth: Tensor) -> Tensor:
    return -10 * (images - truth).square().flatten(1).mean(1).log10()


def test_relaxation_recovers_what_direct_matching_misses() -> None:
    truth, labels = draw(4, 1, 1, 1, 2, seed=5), torch.zeros(4, 1, dtype=torch.int64)
    observation = observe(
        {"encoding": "exponential", "qubits": 6, "repetitions": 3, "head": "fixed", "observable": "parity"},
        truth,
        labels,
    )
    streams, effort = Generators(range(4), dtype=torch.float64), {"restarts": 20, "iterations": 120}
    attack = registry.build("attacks", "quantum-relaxation", effort)
    found = attack.reconstruct(observation, streams)
    assert (decibels(found.images, truth) > 40).sum() >= 3
    assert found.candidates.shape == (4, 20, 1, 1, 1, 2)
    own = attack.loss(observation, found.images, one_hot(labels, 10, torch.float64), {})
    assert torch.allclose(found.loss, own, rtol=1e-6, atol=1e-20)
    direct = registry.build(
        "attacks",
        "inverting-gradients",
        {
            **effort,
            "objective": "relative-squared",
            "tv": 0.0,
            "schedule": "cosine",
            "signed": False,
            "space": "raw",
            "initialisation": "uniform",
        },
    )
    missed = direct.reconstruct(observation, streams)
    assert (decibels(missed.images, truth) > 40).sum() <= 1


def test_relaxation_reads_a_whole_image_behind_a_fourier_map() -> None:
    truth = draw(2, 1, *SHAPE)
    observation = observe({"encoding": "fourier", "repetitions": 3}, truth, torch.tensor([[1], [4]]), "lenet")
    attack = registry.build("attacks", "quantum-relaxation", {"restarts": 1})
    found = attack.reconstruct(observation, Generators(range(2), dtype=torch.float64))
    assert decibels(found.images, truth).min() > 60


def test_relaxation_needs_angles() -> None:
    attack = registry.build("attacks", "quantum-relaxation", {})
    assert isinstance(attack, GradientMatching)
    defense, setting = registry.build("defenses", "quantum-encoding", {}), Setting()
    reason = attack.unsuited(prepared("amplitude"), setting, defense)
    assert reason is not None and "angles" in reason
    assert attack.unsuited(prepared("fourier"), setting, defense) is None


def test_the_turn_of_the_relaxed_variables_changes_nothing() -> None:
    observation = observe({"encoding": "fourier"}, draw(1, 1, *SHAPE), torch.tensor([[2]]))
    attack = registry.build("attacks", "quantum-relaxation", {})
    relaxed = attack.relaxed(attack.problem(observation))
    (start,) = attack.initial(observation, Generators([0], dtype=torch.float64)).values()
    facts = take(attack.facts(observation), 0)
    losses = [relaxed.loss({"turns": start[0] + shift}, facts, by_autograd)[1] for shift in (0, 3)]
    assert torch.allclose(losses[0], losses[1], rtol=1e-9)


@pytest.mark.parametrize("encoding", ["exponential", "reupload", "fourier", "chebyshev"])
def test_engine_backends_agree_on_the_relaxed_problem(encoding: str) -> None:
    options = {"encoding": encoding, **ENCODINGS[encoding]}
    observation = observe(options, draw(2, 1, *SHAPE), torch.tensor([[2], [5]]), "lenet")
    attack = registry.build("attacks", "quantum-relaxation", {})
    relaxed, facts = attack.relaxed(attack.problem(observation)), attack.facts(observation)
    start = attack.initial(observation, Generators(range(2), dtype=torch.float64))
    (truth,) = Sequential()(relaxed, start, facts).gradients.values()
    for kind in (Vmap, Layerwise):
        backend = kind()
        assert backend.applies(relaxed, start, facts)
        (found,) = backend(relaxed, start, backend.prepare(relaxed, facts)).gradients.values()
        assert (found - truth).abs().max() < 1e-9 * truth.abs().max()
