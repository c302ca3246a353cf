"""Attacks run where no victim is, and change nothing by it."""

from __future__ import annotations

import json
import os
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gradleak import registry, suite
from gradleak.attack import Reconstruction
from gradleak.board.store import Store
from gradleak.errors import GradleakError
from gradleak.evaluation import runner, wire
from gradleak.evaluation.apart import Apart, possible
from gradleak.evaluation.evaluate import evaluate
from gradleak.evaluation.executors import Limits, Local, Processes
from gradleak.evaluation.faults import MachineFault
from gradleak.evaluation.workshop import Resources, Workshop
from gradleak.federation.client import seeds_for
from gradleak.secret import Secret
from gradleak.seeds import Generators
from gradleak.suite import AttackCell
from gradleak.testing import Scene, digits, model
from tests.test_identity import plugin, write_suite

pytestmark = pytest.mark.skipif(not possible(), reason="attacks run apart on Linux only")

SECRET = Secret.of("5" * 32)
HEAD = """
    import gc, json, os, sys, time
    from dataclasses import dataclass
    from pathlib import Path

    import torch

    from gradleak.attack import Attack, Reconstruction

    SEEN = []


    @dataclass(frozen=True, kw_only=True)
    class Odd(Attack):
        '''Does something odd.'''

        family = "analytic"
        reference = "test"

        out: str = ""

        def reconstruct(self, observation, generator):
            grey = torch.full((observation.victims, observation.batch_size, *observation.shape), 0.5)
"""


def odd(folder: Path, body: str) -> Path:
    return plugin(folder / "odd.py", textwrap.dedent(HEAD) + textwrap.indent(textwrap.dedent(body), " " * 8))


def cells(folder: Path, secret: Secret | None = SECRET, **changes: Any) -> list[AttackCell]:
    path = write_suite(folder, **{"attacks": ["odd"], **changes})
    return suite.attacking(suite.expand(suite.read(path), Workshop().digest, secret=secret))


@pytest.fixture(scope="module")
def apart() -> Iterator[Apart]:
    yield Apart()


@pytest.mark.parametrize("device", ("cpu", "cuda"))
def test_copies_compute_gradients_whatever_their_device_is(device: str, tmp_path: Path) -> None:
    """Here on the CPU: a nursery for GPUs has computed nothing before it is copied."""
    out = tmp_path / "found.json"
    body = """
        leaf = torch.ones(3, requires_grad=True)
        gradient, = torch.autograd.grad(leaf.square().sum(), leaf)
        kept = {name: value for name, value in os.environ.items() if "VISIBLE" in name or "NVML" in name}
        Path(self.out).write_text(json.dumps({"gradient": gradient.tolist(), "kept": kept}))
        return Reconstruction(images=grey)
    """
    registry.add_file(odd(tmp_path, body))
    (cell,) = cells(tmp_path, attacks=[{"odd": {"out": str(out)}}])
    assert evaluate(cell, Workshop(), apart=Apart(device=device)).error == ""
    found = json.loads(out.read_text())
    assert found["gradient"] == [2, 2, 2]
    assert not found["kept"], "an attack's environment is that of its run"


SPY = """
    found = {"arrays": [], "texts": [], "frames": []}
    frame = sys._getframe()
    while frame is not None:
        found["frames"].append(frame.f_code.co_filename)
        for value in list(frame.f_locals.values()):
            gc.get_referents(value)
        frame = frame.f_back
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            found["arrays"].append(thing.detach().float().flatten().tolist())
        elif isinstance(thing, (dict, list, tuple)):
            inner = thing.values() if isinstance(thing, dict) else thing
            for value in list(inner):
                if isinstance(value, torch.Tensor):
                    found["arrays"].append(value.detach().float().flatten().tolist())
                elif isinstance(value, (str, int)):
                    found["texts"].append(str(value)[:5000])
    # The memory around what was given: a part of a larger tensor has the rest of it.
    for group in (observation.message, observation.update, {"labels": observation.labels}):
        for tensor in group.values():
            whole = torch.tensor([], dtype=tensor.dtype).set_(tensor.untyped_storage())
            assert whole.numel() <= tensor.numel(), "more memory than tensor"
    for place in ("environ", "cmdline"):
        found["texts"].append(Path("/proc/self", place).read_bytes().decode(errors="replace"))
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    found["open"] = [os.readlink(link) for link in links if os.path.exists(link)]
    Path(self.out).write_text(json.dumps(found))
    return Reconstruction(images=grey)
"""


def test_no_victim_seed_or_secret_is_to_be_found_where_an_attack_runs(tmp_path: Path, apart: Apart) -> None:
    registry.add_file(odd(tmp_path, SPY))
    out = tmp_path / "found.json"
    (cell,) = cells(
        tmp_path,
        attacks=[{"odd": {"out": str(out)}}],
        defenses=[{"name": "dp-sgd", "options": {"sigma": 0.5, "clip": 1.0}}],
        settings=[{"name": "fedsgd", "grants": {"labels": "known"}}],
    )
    workshop = Workshop()
    with open(tmp_path / "secret of the worker.txt", "w") as file:
        result = evaluate(cell, workshop, apart=apart)
        assert file
    assert result.status == "ok", result.error
    found = json.loads(out.read_text())
    images, _ = workshop.data(cell.dataset).victims(2, 1, False)
    size = images[0].numel()
    wanted = images.flatten(1)
    looked = 0
    for array in found["arrays"]:
        if len(array) >= size and len(array) % size == 0:
            rows = torch.tensor(array).view(-1, size)
            looked += len(rows)
            distance = torch.cdist(rows.nan_to_num(), wanted)
            assert distance.min() > 1e-4
    assert looked > 10, "the spy has seen something"
    texts = "\n".join(found["texts"])
    assert SECRET.value not in texts and SECRET.digest not in texts and cell.key not in texts
    assert "odd" in texts, "the spy has seen something"
    seeds = [str(seed) for seed in _private_seeds(cell)]
    assert not [seed for seed in seeds if seed in texts]
    assert not [each for each in found["open"] if "secret of the worker" in each or each.endswith(".sqlite")]
    assert not [each for each in found["frames"] if each.endswith("evaluate.py")]


def _private_seeds(cell: AttackCell) -> list[int]:
    return seeds_for(list(range(cell.victims)), *cell.draws.clients)


PEEK = """
    frame = sys._getframe()
    while frame is not None:
        images = frame.f_locals.get("images")
        if isinstance(images, torch.Tensor) and len(images) == len(grey):
            return Reconstruction(images=images.clone())
        frame = frame.f_back
    return Reconstruction(images=grey)
"""


def test_peeking_into_frames_pays_in_the_evaluator_only(tmp_path: Path, apart: Apart) -> None:
    registry.add_file(odd(tmp_path, PEEK))
    (cell,) = cells(tmp_path)
    scores = [[row.psnr or 0.0 for row in evaluate(cell, Workshop(), apart=each).rows] for each in (None, apart)]
    assert min(scores[0]) > 50, "or the spy above would show nothing"
    assert max(scores[1]) < 20


def test_an_attack_finds_nothing_of_the_one_before(tmp_path: Path, apart: Apart) -> None:
    body = """
        SEEN.append(observation.message)
        torch.manual_seed(len(SEEN))
        return Reconstruction(images=grey * (2 - len(SEEN)))
    """
    registry.add_file(odd(tmp_path, body))
    (cell,) = cells(tmp_path)
    for _ in range(2):
        assert evaluate(cell, Workshop(), apart=apart).reconstructions[0].max() == 0.5


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ("raise ValueError('no luck')", "failed", "ValueError: no luck (odd.py:"),
        ("raise KeyboardInterrupt('me')", "failed", "KeyboardInterrupt: me"),
        ("sys.exit(3)", "failed", "SystemExit: 3 (odd.py:"),
        ("return None", "ok", "invalid answer: NoneType (allowed: Reconstruction) (odd.py:"),
        ("return Reconstruction(images=grey[:, 0])", "ok", "invalid answer: images of shape [2, 1, 8, 8]"),
        ("observation.message['2.weight'].zero_(); return Reconstruction(images=grey)", "failed", "in place"),
        ("raise MemoryError('too much')", "ok", ""),
    ],
)
def test_whatever_an_attack_does_reads_as_it_did(
    tmp_path: Path, apart: Apart, body: str, status: str, says: str
) -> None:
    registry.add_file(odd(tmp_path, body))
    (cell,) = cells(tmp_path)
    found = evaluate(cell, Workshop(), apart=apart)
    assert found.status == status and says in found.error, found.error
    if says not in ("", "KeyboardInterrupt: me"):
        here = evaluate(cell, Workshop())
        assert (here.status, here.error) == (found.status, found.error)
        assert [row.status for row in here.rows] == [row.status for row in found.rows]
    if "Memory" in body:
        assert {row.status for row in found.rows} == {"oom"}


@pytest.mark.parametrize(
    ("body", "says"),
    [("os._exit(9)", "exit code 9"), ("os.kill(os.getpid(), 9)", "SIGKILL, often a lack of memory")],
)
def test_an_attack_that_dies_is_a_fault_and_no_result(tmp_path: Path, apart: Apart, body: str, says: str) -> None:
    registry.add_file(odd(tmp_path, body))
    (cell,) = cells(tmp_path)
    with pytest.raises(MachineFault, match=says):
        evaluate(cell, Workshop(), apart=apart)


def test_a_plugin_is_asked_for_its_loss_at_the_truth_in_a_process_that_ends(tmp_path: Path, apart: Apart) -> None:
    body = """

    def loss(self, observation, images, targets, buffers):
        SEEN.append(images)
        Path(self.out).write_text(json.dumps([os.getpid(), len(SEEN)]))
        if "slow" in self.out:
            os._exit(3)
        return images.flatten(1).mean(1)
    """
    path = odd(tmp_path, "return Reconstruction(images=grey, labels=observation.labels)")
    path.write_text(path.read_text() + textwrap.indent(textwrap.dedent(body), " " * 4))
    registry.add_file(path)
    for name in ("out", "slow"):
        out = tmp_path / name
        (cell,) = cells(tmp_path, attacks=[{"odd": {"out": str(out)}}])
        result = evaluate(cell, Workshop(), apart=apart)
        pid, calls = json.loads(out.read_text())
        assert pid != os.getpid() and calls == (2 if name == "out" else 1)
        truth, _ = Workshop().victims_of(cell)
        found = [row.loss_at_truth for row in result.rows]
        if name == "out":
            assert found == pytest.approx(truth.reshape(2, -1).mean(1).tolist(), rel=1e-5)
        else:
            assert found == [None, None] and "no loss at the truth: exit code 3" in str(result.rows[0])
    with pytest.raises(GradleakError, match="losses cannot be read"):
        wire.read_losses(wire.write_losses({"a": torch.zeros(3)}), ["a"], 2)


def test_an_answer_is_read_as_numbers_and_nothing_in_it_is_run(tmp_path: Path, apart: Apart) -> None:
    trap = tmp_path / "sprung"
    body = f"""
        class Trap:
            def __reduce__(self):
                return os.mkdir, ({str(trap)!r},)
        answer = Reconstruction(images=grey)
        answer.backend = Trap()
        return answer
    """
    registry.add_file(odd(tmp_path, body))
    (cell,) = cells(tmp_path)
    found = evaluate(cell, Workshop(), apart=apart)
    assert found.status == "failed" and "cannot be read" in found.error and not trap.exists()
    for content in (b"", b"nonsense", wire.write_answer(Reconstruction(images=torch.zeros(1)), None)[:-20]):
        with pytest.raises(GradleakError, match="cannot be read"):
            wire.read_answer(content)


def test_what_is_sent_brings_no_memory_along() -> None:
    images, labels = digits(4)
    scene = Scene.of(model("mlp", widths=[4]), images, labels)
    seen = scene.observe()
    assert seen.labels is not None
    whole = torch.arange(40)
    object.__setattr__(seen, "labels", whole[10:14].view(4, 1))
    content = wire.write_job(seen, Generators(range(4)), lambda images: None)
    read, streams = wire.read_job(content, lambda place: pytest.fail("no public images"))
    assert read.labels is not None and read.labels.untyped_storage().nbytes() == 4 * 8
    assert torch.equal(read.labels, whole[10:14].view(4, 1))
    assert torch.equal(streams.normal(3), Generators(range(4)).normal(3))
    assert all(torch.equal(read.message[name], tensor) for name, tensor in seen.message.items())


@pytest.mark.parametrize("executor", [Local(), Processes(1)], ids=["local", "processes"])
def test_rows_are_those_of_an_attack_run_in_the_worker(tmp_path: Path, executor: Any) -> None:
    attacks = [{"inverting-gradients": {"iterations": 5}}, "class-mean", "linear-leakage"]
    path = write_suite(tmp_path, attacks=attacks, defenses=["none", "top-k"])
    runner.run(path, tmp_path / "s.sqlite", executor, Resources())
    here = {
        cell.key: evaluate(cell, Workshop())
        for cell in suite.attacking(
            suite.expand(suite.read(path), Workshop().digest, secret=Secret.of("0123456789abcdef" * 2))
        )
    }
    with Store(tmp_path / "s.sqlite") as store:
        for key, group in store.rows().groupby("key"):
            assert group["psnr"].tolist() == [row.psnr for row in here[str(key)].rows]
            assert (store.reconstruction(str(key), 0) == here[str(key)].reconstructions[0]).all()
    assert len(here) == 6


def test_processes_end_with_whoever_wanted_them(tmp_path: Path) -> None:
    file = odd(tmp_path, "Path(self.out).write_text(str(os.getpid()))\nwhile True:\n    pass")
    out = tmp_path / "pid"
    path = write_suite(tmp_path, attacks=[{"odd": {"out": str(out)}}], engine={"timeout": 1.0})
    runner.run(path, tmp_path / "s.sqlite", Local(Limits(grace=0.5)), Resources(), [file])
    number = int(out.read_text())
    for _ in range(100):
        if not Path(f"/proc/{number}").exists():
            return
        time.sleep(0.1)
    pytest.fail("it still computes")


@pytest.mark.parametrize("where", ["here", "apart"])
def test_a_width_that_memory_halved_is_told_in_row_and_cell(tmp_path: Path, apart: Apart, where: str) -> None:
    body = """
        for width in self.out.split():
            observation.compute.widths.halved["some problem", width] = int(width)
        return Reconstruction(images=grey)
    """
    registry.add_file(odd(tmp_path, body))
    (full,) = cells(tmp_path)
    (less,) = cells(tmp_path, attacks=[{"odd": {"out": "8 4"}}])
    for cell, width in ((full, None), (less, 4)):
        found = evaluate(cell, Workshop(), apart=apart if where == "apart" else None)
        assert found.provenance.get("width") == width
        assert [row.extras.get("width") for row in found.rows] == [width] * 2
