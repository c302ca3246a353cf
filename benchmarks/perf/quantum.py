"""Own simulator against PennyLane's default.qubit (backprop), same circuit, one thread.

    python benchmarks/perf/quantum.py --qubits 4 6 8 10

Prints CPU milliseconds of the fastest of the repeats, taken in turns, for the values, for the gradient by the
weights, and for a step of gradient matching (a gradient's gradient), and the largest difference of that last result.
Needs the extra [quantum].
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import pennylane
import torch
from torch import Tensor

from gradleak import seeds
from gradleak.mechanisms import quantum

Circuit = Callable[[Tensor, Tensor], Tensor]


def own(qubits: int) -> Circuit:
    """RX encoding, ansatz and <Z> of every qubit by `gradleak.mechanisms.quantum`."""
    order, signs = quantum.entangle(qubits, "chain"), quantum.observable(qubits, "qubits").double()
    return lambda features, weights: quantum.expectations(
        quantum.evolve(quantum.encode_angles(features), weights, order), signs
    )


def theirs(qubits: int) -> Circuit:
    """The same by PennyLane."""

    @pennylane.qnode(  # type: ignore[untyped-decorator]
        pennylane.device("default.qubit", wires=qubits), interface="torch", diff_method="backprop"
    )
    def node(features: Tensor, weights: Tensor) -> Any:
        for qubit in range(qubits):
            pennylane.RX(features[:, qubit], wires=qubit)
        for layer in weights:
            for qubit in range(qubits):
                pennylane.RY(layer[qubit, 0], wires=qubit)
                pennylane.RZ(layer[qubit, 1], wires=qubit)
            for qubit in range(qubits - 1):
                pennylane.CNOT(wires=[qubit, qubit + 1])
        return [pennylane.expval(pennylane.PauliZ(qubit)) for qubit in range(qubits)]

    return lambda features, weights: torch.stack(list(node(features, weights)), dim=-1)


def value(run: Circuit, features: Tensor, weights: Tensor) -> Tensor:
    """The measurements."""
    return run(features, weights)


def gradient(run: Circuit, features: Tensor, weights: Tensor) -> Tensor:
    """Gradient of a loss by the weights."""
    leaf = weights.clone().requires_grad_()
    return torch.autograd.grad(run(features, leaf).square().sum(), leaf)[0]


def matching_step(run: Circuit, features: Tensor, weights: Tensor) -> Tensor:
    """Gradient by the features of how far the gradient by the weights is from zero."""
    guess, leaf = features.clone().requires_grad_(), weights.clone().requires_grad_()
    (inner,) = torch.autograd.grad(run(guess, leaf).square().sum(), leaf, create_graph=True)
    return torch.autograd.grad(inner.square().sum(), guess)[0]


def fastest(
    runs: list[Circuit], task: Callable[..., Tensor], inputs: tuple[Tensor, Tensor], repeats: int
) -> list[float]:
    """CPU seconds of the fastest repeat of each, taken in turns."""
    best = [float("inf")] * len(runs)
    for repeat in range(repeats + 1):
        for index, run in enumerate(runs):
            start = time.process_time()
            task(run, *inputs)
            if repeat:  # the first warms up
                best[index] = min(best[index], time.process_time() - start)
    return best


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--qubits", type=int, nargs="+", default=[4, 6, 8, 10])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, pennylane {pennylane.__version__}, float64, batch {options.batch}, "
          f"{options.layers} layers; CPU ms own / PennyLane (ratio)")  # fmt: skip
    for qubits in options.qubits:
        draw = seeds.generator("perf", qubits)
        features = 7 * torch.rand(options.batch, qubits, generator=draw, dtype=torch.float64)
        weights = 7 * torch.rand(options.layers, qubits, 2, generator=draw, dtype=torch.float64)
        runs = [own(qubits), theirs(qubits)]
        cells = []
        for task in (value, gradient, matching_step):
            mine, other = (1000 * seconds for seconds in fastest(runs, task, (features, weights), options.repeats))
            cells.append(f"{task.__name__} {mine:.2f} / {other:.1f} ({other / mine:.1f}x)")
        difference = (matching_step(runs[0], features, weights) - matching_step(runs[1], features, weights)).abs().max()
        print(f"{qubits:2d} qubits: {', '.join(cells)}, difference {float(difference):.1e}", flush=True)


if __name__ == "__main__":
    main()
