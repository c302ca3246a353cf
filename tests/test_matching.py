"""The loop of the engine: slots, memory, and halving of restarts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gradleak import process, registry, seeds, suite
from gradleak.engine import comparison, loop, memory
from gradleak.engine.backends import BACKENDS
from gradleak.engine.loop import Outcome, Plan, Status, minimise
from gradleak.engine.optimisers import LBFGS, Adam, Optimiser, Variables, constant
from gradleak.engine.problem import Direct, Facts, Guess, Problem, Values, take
from gradleak.errors import GradleakError
from gradleak.model import initialise
from gradleak.seeds import Generators
from gradleak.testing import Scene, model
from gradleak.threat import Compute, Observation, Widths
from gradleak.update import LocalTraining, Network, local_update, one_hot, stack

SHAPE, CLASSES = (1, 8, 8), 10
CPU = torch.device("cpu")
OPTIMISERS: dict[str, Callable[[], Optimiser]] = {"adam": Adam, "lbfgs": LBFGS}


def normal(*shape: int, name: object = "") -> Tensor:
    return torch.randn(shape, generator=seeds.generator("matching", name, *shape), dtype=torch.float64)


class Toy:
    """Victims of a small network, each with several restarts, restart by restart, as attacks stack them."""

    def __init__(self, victims: int = 3, restarts: int = 1, model: str = "mlp", objective: str = "cosine"):
        options: dict[str, Any] = {"widths": (16,), "activation": "tanh"} if model == "mlp" else {}
        module = initialise(registry.build("models", model, options), SHAPE, CLASSES, 0).double()
        self.network = Network.of(module)
        truth = normal(victims, 1, *SHAPE, name="truth").sigmoid()
        targets = one_hot(torch.arange(victims)[:, None] % CLASSES, CLASSES, torch.float64)
        sent = [local_update(self.network, *pair, LocalTraining()) for pair in zip(truth, targets, strict=True)]
        self.facts = Facts(targets, update={n: t.detach() for n, t in stack(sent).items()})
        self.start = {"pixels": torch.cat([normal(victims, 1, *SHAPE, name=restart) for restart in range(restarts)])}
        self.owner = torch.arange(victims).repeat(restarts)
        self.problem = Problem(
            network=self.network,
            training=LocalTraining(),
            decode=self.decode,
            match=Direct(objective),
            penalty=lambda guess, row, known: 1e-3 * guess.images.square().mean(),
        )

    @staticmethod
    def decode(row: Variables, known: Facts) -> Guess:
        return Guess(row["pixels"].sigmoid(), known.targets)

    def run(
        self, width: int | str = 8, backend: str = "vmap", optimiser: str = "adam", iterations: int = 12, **options: Any
    ) -> Outcome:
        compute = Compute(width=width, backend=backend, **options.pop("compute", {}))  # type: ignore[arg-type]
        plan = Plan(optimiser=OPTIMISERS[optimiser], rate=0.1, schedule=constant, iterations=iterations, **options)
        return minimise(self.problem, self.start, self.facts, self.owner, plan, compute)


def assert_same(one: Outcome, other: Outcome, rows: list[int] | slice = slice(None)) -> None:
    """To the last bit."""
    for name, tensor in one.variables.items():
        assert torch.equal(tensor[rows].nan_to_num(-1), other.variables[name][rows].nan_to_num(-1))
    assert torch.equal(one.total[rows], other.total[rows])
    assert torch.equal(one.matching[rows], other.matching[rows])
    assert torch.equal(one.iterations[rows], other.iterations[rows])
    assert torch.equal(one.trace[rows].nan_to_num(-1), other.trace[rows].nan_to_num(-1))


class Recorder:
    """Stands in for a backend; notes the width of every call, and fails on wide ones."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str = "vmap", most: float = math.inf, error: Any = None):
        calls: list[int] = []
        failures: list[int] = []
        self.calls, self.failures, self.first = calls, failures, 0
        recorder = self

        class Limited(BACKENDS[name]):  # type: ignore[misc, valid-type]
            def __call__(self, problem: Problem, variables: Variables, facts: Facts) -> Values:
                width = len(variables["pixels"])
                if width > most and len(calls) >= recorder.first:
                    failures.append(width)
                    raise error
                calls.append(width)
                answer: Values = super().__call__(problem, variables, facts)
                return answer

        monkeypatch.setitem(BACKENDS, name, Limited)


SHORT = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nSee the manual."),
    "host": RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
    "python": MemoryError(),
}


# Memory


@pytest.mark.parametrize(
    ("backend", "error"), [("vmap", "cuda"), ("vmap", "host"), ("vmap", "python"), ("layerwise", "cuda")]
)
def test_out_of_memory_is_computed_in_halves_as_if_from_the_start(
    backend: str, error: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    toy = Toy(victims=11)
    recorder = Recorder(monkeypatch, backend, most=3, error=SHORT[error])
    halved = toy.run(8, backend)
    assert recorder.failures == [8, 4] and set(recorder.calls) == {2}
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "out of memory with 8 trials at once; going on with 4" in caplog.text
    assert halved.iterations.tolist() == [13] * 11 and halved.status == [Status.OK] * 11
    assert_same(halved, toy.run(2, backend))


def test_a_width_of_uneven_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy(victims=7)
    recorder = Recorder(monkeypatch, most=3, error=MemoryError())
    halved = toy.run(5)
    assert recorder.failures == [5] and set(recorder.calls) == {2}
    assert_same(halved, toy.run(2))


def test_a_measured_width_is_one_at_which_all_slots_are_alike() -> None:
    assert [memory.whole(width) for width in (1, 2, 3, 4, 7, 8, 15, 33)] == [1, 2, 2, 4, 4, 8, 8, 32]


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_memory_that_runs_out_on_the_way_loses_nothing(optimiser: str, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy(victims=6)
    whole = toy.run(4, optimiser=optimiser)
    recorder = Recorder(monkeypatch, most=2, error=SHORT["cuda"])
    recorder.first = 5
    broken = toy.run(4, optimiser=optimiser)
    assert recorder.calls[:7] == [4] * 5 + [2] * 2
    torch.testing.assert_close(broken.variables, whole.variables, rtol=1e-9, atol=1e-9)
    assert torch.equal(broken.iterations, whole.iterations)


def test_the_halved_width_is_kept_for_the_same_kind_of_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch, most=3, error=MemoryError())
    shared = {"widths": Widths()}
    Toy(victims=6).run(8, compute=shared)
    assert recorder.failures == [6]
    Toy(victims=5).run(8, compute=shared)
    assert recorder.failures == [6]
    Toy(victims=5, objective="squared").run(8, compute=shared)
    assert recorder.failures == [6, 5], "another kind of problem"
    assert set(recorder.calls) == {2}


def test_one_trial_that_does_not_fit_is_an_error_of_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    Recorder(monkeypatch, most=0, error=SHORT["cuda"])
    with pytest.raises(torch.OutOfMemoryError, match="one trial alone is too large for the memory") as caught:
        Toy().run(4)
    assert "\n" not in str(caught.value) and "Tried to allocate" in str(caught.value)


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch, most=1, error=RuntimeError("shapes do not fit"))
    recorder.first = 2  # after the comparison and the first iteration
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        Toy().run(4)
    assert recorder.failures == [3]


def test_a_backend_that_fails_before_the_first_iteration_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Toy().run(4, "sequential")
    Recorder(monkeypatch, most=1, error=RuntimeError("shapes do not fit"))
    outcome = Toy().run(4)
    assert outcome.backend == "sequential" and outcome.reason == "vmap: RuntimeError: shapes do not fit"
    assert_same(outcome, expected)


def test_a_real_failure_to_allocate_is_known_as_such() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert memory.is_out_of_memory(caught.value)
    assert not memory.is_out_of_memory(RuntimeError("shapes do not fit"))
    assert not memory.is_out_of_memory(ValueError("DefaultCPUAllocator"))


def test_what_is_decoded_in_the_end_is_halved_too() -> None:
    toy = Toy(victims=6)
    failures: list[int] = []

    def failing(row: Variables, known: Facts) -> Guess:
        if not failures:
            failures.append(1)
            raise MemoryError
        return toy.decode(row, known)

    expected = loop.finish(toy.problem, toy.start, toy.facts, 4)
    found = loop.finish(replace(toy.problem, decode=failing), toy.start, toy.facts, 8)
    assert failures and torch.equal(found.images, expected.images)
    torch.testing.assert_close(found.matching, expected.matching, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("model", ["mlp", "lenet"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_few_trials_tell_what_many_take(backend: str, model: str) -> None:
    toy = Toy(victims=12, model=model)
    engine = BACKENDS[backend]()
    assert engine.applies(toy.problem, toy.start, toy.facts)
    known = engine.prepare(toy.problem, toy.facts)

    def step(width: int) -> None:
        engine(toy.problem, {n: t[:width] for n, t in toy.start.items()}, take(known, slice(width)))

    step(1)
    one, two, many = (memory.peak(lambda width=width: step(width), CPU) for width in (1, 2, 12))  # type: ignore[misc]
    assert two > one > 0
    assert one + 11 * (two - one) == pytest.approx(many, rel=0.1)


def test_peak_counts_what_is_alive_at_once() -> None:
    def action() -> None:
        first = torch.ones(1000, dtype=torch.float64)
        view = first.view(10, 100).t()
        second = view + 1
        del first, view
        third = second * 2
        del second
        third.add_(1)

    assert memory.peak(action, CPU) == 16000


def test_auto_takes_as_many_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy(victims=12)
    recorder = Recorder(monkeypatch)
    room = memory.peak(lambda: toy.run(12, iterations=1), CPU)
    monkeypatch.setattr(memory, "available", lambda device: room / memory.SHARE)
    recorder.calls.clear()
    assert_same(toy.run("auto", iterations=3), toy.run(12, iterations=3))
    assert max(recorder.calls) == 12, "never more than there are"

    measured = {}
    for share in (0.6, 0.3, 0.01):
        monkeypatch.setattr(memory, "available", lambda device, share=share: share * room / memory.SHARE)
        recorder.calls.clear()
        outcome = toy.run("auto", iterations=3)
        width = recorder.calls[-1]
        assert recorder.calls[:3] == [1, 1, 2] and set(recorder.calls[3:]) == {width}
        assert_same(outcome, toy.run(width, iterations=3))
        measured[share] = width
        assert memory.peak(lambda width=width: toy.run(width, iterations=1), CPU) <= max(share, 1 / 12 + 0.05) * room  # type: ignore[misc]
    assert 12 > measured[0.6] > measured[0.3] > measured[0.01] == 1


def test_auto_measures_a_kind_of_problem_once(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    shared = {"widths": Widths()}
    Toy().run("auto", compute=shared)
    before = recorder.calls.count(1)
    Toy().run("auto", compute=shared)
    assert before > 0 and recorder.calls.count(1) == before
    toy = Toy()
    final = loop.finish(toy.problem, toy.start, toy.facts, "auto")
    assert torch.equal(final.images, loop.finish(toy.problem, toy.start, toy.facts, 3).images)


def test_there_is_memory_but_not_more_than_the_machine_has() -> None:
    threads = torch.get_num_threads()
    machine = memory._of_machine()
    assert 0 < memory.available(CPU) <= 1.1 * machine
    assert machine > 2**26 and threads == 1


def test_a_container_may_have_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(memory._of_container(tmp_path)) == []
    with monkeypatch.context() as context:
        context.setattr(memory, "_of_container", lambda: iter([]))
        assert memory._free() > 2**26
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 200\n")
    assert list(memory._of_container(tmp_path)) == []
    (tmp_path / "memory.max").write_text("1000\n")
    assert list(memory._of_container(tmp_path)) == [500]
    older = tmp_path / "memory"
    older.mkdir()
    (older / "memory.limit_in_bytes").write_text("50\n")
    (older / "memory.usage_in_bytes").write_text("60\n")
    (older / "memory.stat").write_text("inactive_file 0\n")
    assert list(memory._of_container(tmp_path)) == [500, 0]


@pytest.mark.parametrize("row", range(3))
def test_one_wrong_row_makes_the_difference(row: int) -> None:
    truth = Values(
        torch.ones(3), torch.ones(3), {"pixels": torch.tensor([1e-3, 1.0, 1e3])[:, None].expand(3, 4).clone()}
    )
    gradients = truth.gradients["pixels"].clone()
    gradients[row] *= 1.1
    assert comparison.difference(truth, truth) == 0
    assert comparison.difference(replace(truth, gradients={"pixels": gradients}), truth) == pytest.approx(0.1, rel=1e-5)


# Trials that end


@pytest.mark.parametrize("cause", ["converged", "stagnated", "not finite"])
def test_who_has_ended_leaves_and_the_next_takes_the_slot(cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy(victims=4)
    options: dict[str, Any] = {}
    if cause == "converged":
        options["tolerance"] = float(toy.run(1, iterations=8).total.median())
    elif cause == "stagnated":
        toy.start["pixels"][[0, 2]] = 1e4  # where the sigmoid is flat
        options["patience"] = 3
    else:
        toy.start["pixels"][[0, 2]] = torch.nan
    recorder = Recorder(monkeypatch)
    outcome = toy.run(1, iterations=30, **options)
    early = (outcome.iterations < 31).nonzero().flatten().tolist()
    assert early and (cause == "converged" or early == [0, 2])
    compared = 0 if cause == "converged" else 1  # there once before
    assert len(recorder.calls) - compared == int(outcome.iterations.sum()), "no slot ran for nobody"
    expected = [Status.DIVERGED if cause == "not finite" and trial in early else Status.OK for trial in range(4)]
    assert outcome.status == expected
    # Each as if it had been alone.
    for trial in range(4):
        lone = Toy(victims=4)
        lone.start = {"pixels": toy.start["pixels"][[trial]]}
        lone.owner = torch.tensor([trial])
        alone = lone.run(1, iterations=30, **options)
        assert torch.equal(alone.total[0], outcome.total[trial])
        assert int(alone.iterations[0]) == int(outcome.iterations[trial])


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("options", [{}, {"patience": 4}, {"halving": (0.2, 0.5)}, {"tolerance": 0.2}])
def test_looking_less_often_changes_nothing(
    options: dict[str, Any], optimiser: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = Toy(victims=3, restarts=4)
    toy.start["pixels"][1] = torch.nan
    always = toy.run(4, optimiser=optimiser, iterations=25, **options)
    monkeypatch.setitem(loop._LOOK, "cpu", 7)
    seldom = toy.run(4, optimiser=optimiser, iterations=25, **options)
    assert_same(always, seldom)
    assert always.status == seldom.status


def test_progress_ends_at_one_or_before() -> None:
    shares: list[float] = []
    compute = {"progress": lambda share, loss: shares.append(share)}
    Toy(victims=3, restarts=4).run(5, iterations=40, halving=(0.3,), compute=compute)
    assert len(shares) > 5 and shares == sorted(shares) and 0 < shares[0] and 0.8 < shares[-1] <= 1


# Successive halving


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("width", [2, 4, 12])
def test_survivors_go_on_as_if_nobody_had_left(width: int, optimiser: str) -> None:
    toy = Toy(victims=3, restarts=4)
    full = toy.run(width, optimiser=optimiser, iterations=24, trace_points=24)
    halved = toy.run(width, optimiser=optimiser, iterations=24, trace_points=24, halving=(0.25, 0.5))
    lengths = halved.iterations.view(4, 3)
    # Whoever was best after 6 and 12 gradients, known from runs that are no longer.
    after = [toy.run(width, optimiser=optimiser, iterations=count - 1).matching.view(4, 3) for count in (6, 12)]
    for victim in range(3):
        first = after[0][:, victim].argsort()[:2].tolist()
        last = min(first, key=lambda restart: float(after[1][restart, victim]))
        expected = {restart: 6 for restart in range(4)} | {restart: 12 for restart in first} | {last: 25}
        whole = full.iterations.view(4, 3)[:, victim].tolist()
        assert lengths[:, victim].tolist() == [min(expected[restart], whole[restart]) for restart in range(4)]
        assert_same(halved, full, [3 * last + victim])
    assert halved.status == [Status.OK] * 12
    assert int(halved.iterations.sum()) < 0.6 * int(full.iterations.sum())
    # What left early left with what it had.
    gone = halved.iterations < full.iterations
    assert bool((halved.total[gone] >= full.total[gone]).all())


def test_one_restart_has_nothing_to_halve(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy(victims=5)
    plain = toy.run(2)
    recorder = Recorder(monkeypatch)
    assert_same(toy.run(2, halving=(0.1, 0.4, 0.9)), plain)
    assert len(recorder.calls) == 3 * 13


def test_slots_of_restarts_that_left_go_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    outcome = Toy(victims=2, restarts=4).run(1, iterations=40, halving=(0.25,))
    assert sorted(outcome.iterations.tolist()) == [10] * 4 + [41] * 4
    assert len(recorder.calls) - 1 == int(outcome.iterations.sum())  # one was compared


def test_those_who_ended_by_themselves_are_compared_like_others() -> None:
    toy = Toy(victims=1, restarts=4)
    toy.start["pixels"][0] = torch.nan
    outcome = toy.run(4, iterations=40, halving=(0.25,))
    assert outcome.status == [Status.DIVERGED, Status.OK, Status.OK, Status.OK]
    assert sorted(outcome.iterations.tolist()) == [1, 10, 41, 41]
    # One converged before the comparison, and stays the best: nobody else needs to go on.
    best = Toy(victims=1, restarts=2)
    best.start["pixels"][1] = best.run(1, iterations=60).variables["pixels"][0]
    bound = 1.5 * float(best.run(2, iterations=1).total[1])
    outcome = best.run(2, iterations=40, halving=(0.25,), tolerance=bound)
    assert outcome.iterations.tolist() == [10, 1]


def test_a_deadline_marks_those_who_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(1000))
    monkeypatch.setattr("gradleak.threat.time.monotonic", lambda: next(ticks))
    outcome = Toy(victims=1, restarts=4).run(2, iterations=40, halving=(0.25,), compute={"deadline": 14.5})
    # Two have paused after ten iterations, two are under way after five.
    assert outcome.iterations.tolist() == [10, 10, 5, 5]
    assert outcome.status == [Status.TIMEOUT] * 4


def observe(victims: int = 3) -> Observation:
    images, labels = normal(victims, 1, *SHAPE, name="victims").sigmoid(), torch.arange(victims)[:, None]
    return Scene.of(model("lenet", SHAPE, CLASSES).double(), images, labels, classes=CLASSES).observe()


def test_attacks_count_what_halving_saves() -> None:
    observation, options = observe(), {"restarts": 4, "iterations": 20}
    answers = [
        registry.build("attacks", "inverting-gradients", {**options, **more}).reconstruct(
            observation, Generators(range(3), dtype=torch.float64)
        )
        for more in ({}, {"halving": [0.5]})
    ]
    assert answers[0].gradient_evaluations.tolist() == [4 * 21] * 3
    assert answers[1].gradient_evaluations.tolist() == [2 * 21 + 2 * 10] * 3
    assert answers[1].candidates.shape == answers[0].candidates.shape


def test_attacks_that_need_all_restarts_refuse_to_halve() -> None:
    with pytest.raises(GradleakError, match="halving: GradInversion needs all of its restarts"):
        registry.build("attacks", "gradinversion", {"halving": [0.5]})
    with pytest.raises(GradleakError, match=r"halving\.0 = 1\.0"):
        registry.build("attacks", "dlg", {"halving": [1.0]})


# Keys and configuration


def configs(tmp_path: Path, text: str) -> list[dict[str, Any]]:
    path = tmp_path / "suite.yaml"
    path.write_text(
        "name: tiny\ncontrols: listed\ndatasets: [digits]\nmodels: [linear]\ndefenses: [none]\nknowledge: [oblivious]\n"
        + text
    )
    return [cell.stored() for cell in suite.expand(suite.read(path), lambda name, options: ("1", "0"))]


def test_options_that_came_later_are_no_part_of_old_cells(tmp_path: Path) -> None:
    (plain,) = configs(tmp_path, "attacks: [dlg]")
    assert plain["engine"] == {"backend": "layerwise", "width": 32, "timeout": None}
    assert "restarts" in plain["attack"]["options"] and "halving" not in plain["attack"]["options"]
    (chosen,) = configs(tmp_path, "attacks: [{dlg: {halving: [0.5]}}]\nengine: {width: auto}")
    assert chosen["engine"] == {"backend": "layerwise", "width": "auto", "timeout": None}
    assert chosen["attack"]["options"]["halving"] == [0.5]
    (cell,) = suite.attacking([suite.Cell.of(chosen)])
    assert cell.built_attack.halving == (0.5,)  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [0, "wide", 2.5, "true"])
def test_wrong_widths_are_refused(width: object, tmp_path: Path) -> None:
    with pytest.raises(GradleakError, match=r"engine\.width: .*1 or more\), or auto"):
        configs(tmp_path, f"attacks: [dlg]\nengine: {{width: {width}}}")


def test_float32_is_float32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    process.full_precision()
    assert torch.backends.cuda.matmul.allow_tf32 is False and torch.backends.cudnn.allow_tf32 is False


# Compiled steps
