"""On a GPU: the same numbers as on the CPU, whole cells, and full precision."""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from torch.utils._pytree import tree_map

from gradleak import process, registry, suite
from gradleak.attack import Reconstruction
from gradleak.engine import loop, memory
from gradleak.engine.backends import BACKENDS
from gradleak.engine.loop import Plan, minimise
from gradleak.engine.optimisers import Adam, Variables, constant
from gradleak.engine.problem import Facts, Problem, take
from gradleak.evaluation import check, evaluate, workshop
from gradleak.seeds import Generators
from gradleak.threat import Compute, Observation

DEVICE = torch.device("cuda", 0)

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device, torch sees none"
    ),
]


def _module(name: str) -> ModuleType:
    """Another file of tests, whose models and problems are moved here."""
    spec = importlib.util.spec_from_file_location(f"_shared_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


cpu = _module("test_backends")


def moved(problem: Problem, variables: Variables, facts: Facts) -> tuple[Problem, Variables, Facts]:
    network = problem.network.to(DEVICE, torch.float64)
    variables, facts = tree_map(lambda tensor: tensor.to(DEVICE), (variables, facts))
    return replace(problem, network=network), variables, facts


@pytest.mark.parametrize("match", cpu.MATCHES)
@pytest.mark.parametrize("key", cpu.MODELS)
def test_every_backend_agrees_with_the_cpu(key: str, match: str) -> None:
    trials = cpu.problem_of(cpu.network_of(key), cpu.MATCHES[match])
    reference = cpu.answer("sequential", *trials)
    for name in BACKENDS:
        values = cpu.answer(name, *moved(*trials))
        assert values.total.device.type == DEVICE.type
        here = tree_map(lambda tensor: tensor.cpu(), (values.total, values.matching, values.gradients))
        cpu.assert_equal_up_to_rounding(type(values)(*here), reference, 1e-9)


def observe(victims: int) -> Observation:
    observation: Observation = cpu.observe(victims)
    message, update, labels = tree_map(
        lambda tensor: tensor.to(DEVICE), (observation.message, observation.update, observation.labels)
    )
    message, update = tree_map(lambda tensor: tensor.double(), (message, update))
    network = observation.network.to(DEVICE, torch.float64)
    return replace(observation, network=network, message=message, update=update, labels=labels)


def reconstruct(observation: Observation, victims: list[int], compute: Compute, **options: Any) -> Reconstruction:
    rows = torch.tensor(victims, device=DEVICE)
    assert observation.labels is not None
    part = replace(
        observation,
        message={name: tensor[rows] for name, tensor in observation.message.items()},
        update={name: tensor[rows] for name, tensor in observation.update.items()},
        labels=observation.labels[rows],
        compute=compute,
    )
    # Without signs, which would make much of rounding.
    attack = registry.build("attacks", "inverting-gradients", {"iterations": 20, "signed": False, **options})
    answer: Reconstruction = attack.reconstruct(part, Generators(victims, DEVICE, torch.float64))
    return answer


@pytest.mark.parametrize("backend", BACKENDS)
def test_neighbours_and_order_change_nothing(backend: str) -> None:
    observation, compute = observe(8), Compute(backend=backend, width=4)
    together = reconstruct(observation, [0, 1, 2, 3], compute)
    for others in ([3, 1, 0, 2], [0, 5, 6, 7], [7, 6, 5, 0], [4, 5, 6, 7, 0, 1]):
        again = reconstruct(observation, others, compute)
        for place, victim in enumerate(others):
            if victim < 4:
                torch.testing.assert_close(again.images[place], together.images[victim], rtol=1e-6, atol=1e-6)


def test_halved_restarts_and_measured_widths() -> None:
    observation = observe(3)
    fixed = reconstruct(observation, [0, 1, 2], Compute(backend="vmap", width=8), restarts=4, halving=[0.5])
    measured = reconstruct(observation, [0, 1, 2], Compute(backend="vmap", width="auto"), restarts=4, halving=[0.5])
    for answer in (fixed, measured):
        assert answer.gradient_evaluations is not None
        assert answer.gradient_evaluations.tolist() == [2 * 21 + 2 * 10] * 3
    torch.testing.assert_close(measured.images, fixed.images, rtol=1e-6, atol=1e-6)


def test_few_trials_tell_what_many_take() -> None:
    problem, variables, facts = moved(*cpu.problem_of(cpu.network_of("lenet")))
    backend = BACKENDS["vmap"]()

    def step(width: int) -> None:
        rows = torch.arange(width, device=DEVICE) % cpu.VICTIMS
        backend(problem, {name: tensor[rows] for name, tensor in variables.items()}, take(facts, rows))

    step(1)
    one, two, many = (memory.peak(lambda width=width: step(width), DEVICE) for width in (1, 2, 32))  # type: ignore[misc]
    # The allocator rounds up and kernels take room of their own.
    assert 0.5 < (one + 31 * (two - one)) / many < 2
    assert memory.available(DEVICE) > two


@pytest.mark.skipif(DEVICE.type != "cuda", reason="another device has another allocator")
def test_real_shortage_of_memory_halves_the_width() -> None:
    problem, variables, facts = moved(*cpu.problem_of(cpu.network_of("cnn6")))
    rows = torch.arange(2048, device=DEVICE) % cpu.VICTIMS
    start = {name: tensor[rows] for name, tensor in variables.items()}
    plan = Plan(optimiser=Adam, rate=0.1, schedule=constant, iterations=2)

    compute = Compute(backend="vmap", width=2048)

    def run() -> loop.Outcome:
        return minimise(problem, start, facts, rows, plan, compute)

    run()  # so that the backend is compared with the reference before, which takes more
    needed = memory.peak(run, DEVICE)
    memory.release(DEVICE)
    total = torch.cuda.mem_get_info(DEVICE)[1]
    held = torch.cuda.memory_reserved(DEVICE)
    torch.cuda.set_per_process_memory_fraction((held + 0.8 * needed) / total, DEVICE)
    try:
        outcome = run()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)
    assert list(compute.widths.halved.values()) in ([1024], [512], [256])
    assert outcome.iterations.tolist() == [3] * 2048 and bool(outcome.total.isfinite().all())


def _outcome(problem: Problem, variables: Variables, facts: Facts, compute: Compute) -> loop.Outcome:
    plan = Plan(optimiser=Adam, rate=0.1, schedule=constant, iterations=40)
    start = {name: tensor.clone() for name, tensor in variables.items()}
    return minimise(problem, start, facts, torch.arange(cpu.VICTIMS, device=DEVICE), plan, compute)


@pytest.mark.parametrize("width", (cpu.VICTIMS, 2))
@pytest.mark.parametrize("backend", ("vmap", "layerwise"))
def test_recorded_steps_are_the_same(
    backend: str, width: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trials, compute = moved(*cpu.problem_of(cpu.network_of("lenet"))), Compute(backend=backend, width=width)
    replays: list[int] = []
    replay = torch.cuda.CUDAGraph.replay

    def counted(graph: torch.cuda.CUDAGraph) -> None:
        replays.append(1)
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    recorded = _outcome(*trials, compute)
    assert len(replays) >= 41 and not caplog.records
    monkeypatch.setattr(loop, "WORTH_RECORDING", 10**9)
    plain = _outcome(*trials, compute)
    # Kernels that `vmap` calls add in any order on a GPU.
    error = 0 if backend == "layerwise" else 1e-6
    torch.testing.assert_close(recorded.total, plain.total, rtol=error, atol=0)
    torch.testing.assert_close(recorded.variables["pixels"], plain.variables["pixels"], rtol=error, atol=error)


def test_a_loss_that_waits_for_the_device_is_computed_as_ever(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    problem, variables, facts = moved(*cpu.problem_of(cpu.network_of("lenet")))
    waits = replace(problem, penalty=lambda guess, row, known: 0 * guess.images.sum().detach().cpu().to(DEVICE))
    found = _outcome(waits, variables, facts, Compute(backend="sequential", width=cpu.VICTIMS))
    assert "cannot be recorded" in caplog.text
    monkeypatch.setattr(loop, "WORTH_RECORDING", 10**9)
    plain = _outcome(waits, variables, facts, Compute(backend="sequential", width=cpu.VICTIMS))
    assert torch.equal(found.total, plain.total)


def test_float32_is_float32() -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    reconstruct(observe(2), [0, 1], Compute(width=2))
    if DEVICE.type != "cuda":
        process.tune()
    assert torch.backends.cuda.matmul.allow_tf32 is False and torch.backends.cudnn.allow_tf32 is False
    one, other = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    product = (one.to(DEVICE) @ other.to(DEVICE)).cpu().double()
    exact = one.double() @ other.double()
    assert (product - exact).norm() < 1e-6 * exact.norm(), "TF32 would be wrong by 3e-4"


def test_a_cell_from_end_to_end(tmp_path: Path) -> None:
    grid = {
        "name": "tiny",
        "victims": 2,
        "candidates": 10,
        "controls": "listed",
        "datasets": ["digits"],
        "models": ["lenet"],
        "settings": [{"batch_size": 2, "grants": {"labels": "known"}}],
        "attacks": [{"inverting-gradients": {"iterations": 60}}, "mean-image"],
        "defenses": ["none", {"dp-sgd": {"sigma": 0.01}}],
        "knowledge": ["oblivious", "public"],
    }
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(grid))
    values: dict[str, list[float]] = {}
    for device in ("cpu", DEVICE.type):
        shop = workshop.Workshop(workshop.Resources(device=device))
        cells = suite.expand(suite.read(tmp_path / "suite.yaml"), shop.digest)
        results = [evaluate.evaluate(cell, shop) for cell in check.check(cells, shop)]
        assert [result.error for result in results] == [""] * len(cells)
        values[device] = [row.psnr or math.nan for result in results for row in result.rows]
        assert all(math.isfinite(value) for value in values[device])
    # The same victims, messages and starts; signed steps make much of rounding.
    assert values[DEVICE.type] == pytest.approx(values["cpu"], abs=3)
