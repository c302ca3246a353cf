"""An attack's answer is held to its contract, and the process's state to what it was."""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from gradleak.attack import Attack, Reconstruction
from gradleak.board import results
from gradleak.board.schema import REFUSED, STATUSES
from gradleak.board.store import Store
from gradleak.contract.attacks import AttackCase
from gradleak.evaluation import runner
from gradleak.evaluation.answer import Answer, ask
from gradleak.evaluation.executors import Local
from gradleak.evaluation.workshop import Resources
from gradleak.reconstruction import ROUNDING
from gradleak.seeds import Generators
from gradleak.state import random_states, restored
from gradleak.status import Status
from gradleak.threat import Observation

torch.set_num_threads(1)

SEEN = AttackCase("random-image").scene[0]
"""Three victims of one digit each."""
GREY = torch.full((3, 1, *SEEN.shape), 0.5)


@dataclass(frozen=True, kw_only=True)
class _Says(Attack):
    """Answers what it is made with."""

    family, reference = "analytic", "own"
    answer: Callable[[], Any]

    def reconstruct(self, observation: Observation, generator: Generators) -> Reconstruction:
        return cast(Reconstruction, self.answer())


def _asked(answer: Any) -> Answer:
    attack = _Says(answer=answer if callable(answer) else lambda: answer)
    return ask("own", attack, SEEN, Generators(range(3)))


def _with(value: float) -> Tensor:
    images = GREY.clone()
    images[1, 0, 0, 2, 2] = value
    return images


def test_a_good_answer_passes_as_it_is_without_its_graph() -> None:
    images = GREY.clone().requires_grad_()
    given = _asked(
        Reconstruction(images=images, labels=torch.zeros(3, 1, dtype=torch.int64), loss=images.sum((1, 2, 3, 4)))
    )
    assert given.status == ["ok"] * 3 and given.error == "" and given.seconds > 0 and not given.notes
    assert given.reconstruction is not None and given.reconstruction.images.equal(GREY)
    assert not given.reconstruction.images.requires_grad
    assert given.reconstruction.loss is not None and not given.reconstruction.loss.requires_grad


WHOLE = {
    "nothing": (None, "NoneType"),
    "images alone": (GREY, "Tensor (allowed: Reconstruction)"),
    "bytes": (Reconstruction(images=(GREY * 255).to(torch.uint8)), "images of uint8"),
    "an array": (Reconstruction(images=cast(Tensor, GREY.numpy())), "images are ndarray"),
    "no batch": (Reconstruction(images=GREY[:, 0]), "images of shape [3, 1, 8, 8] (allowed: [3, 1, 1, 8, 8])"),
    "too few": (Reconstruction(images=GREY[:2]), "images of shape [2"),
    "labels of another shape": (
        Reconstruction(images=GREY, labels=torch.zeros(3, dtype=torch.int64)),
        "labels of shape [3]",
    ),
    "labels as numbers": (Reconstruction(images=GREY, labels=torch.zeros(3, 1)), "labels of float32 (allowed: int64)"),
    "one loss": (Reconstruction(images=GREY, loss=torch.zeros(())), "loss of shape []"),
    "a status of one": (Reconstruction(images=GREY, status=[Status.OK]), "status"),
    "an unknown status": (Reconstruction(images=GREY, status=cast(Any, ["fine"] * 3)), "one a victim of ok"),
    "a client's status": (Reconstruction(images=GREY, status=cast(Any, [REFUSED] * 3)), "status ['refused'"),
    "details": (Reconstruction(images=GREY, details={"gap": torch.zeros(2)}), "details['gap'] of shape [2]"),
    "trace": (Reconstruction(images=GREY, trace=torch.zeros(4)), "trace of shape [4]"),
    "candidates": (Reconstruction(images=GREY, candidates=GREY), "candidates of shape"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_an_answer_of_another_kind_is_invalid_for_every_victim(name: str) -> None:
    answer, reason = WHOLE[name]
    given = _asked(lambda: answer)
    assert given.reconstruction is None and given.status == ["invalid"] * 3
    assert given.error.startswith("invalid answer: ") and reason in given.error and "\n" not in given.error


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -0.01, 1.01, 255.0])
def test_pixels_that_are_none_make_their_victim_invalid(value: float) -> None:
    given = _asked(Reconstruction(images=_with(value)))
    assert given.status == ["ok", "invalid", "ok"] and [*given.notes] == [1]


def test_rounding_beyond_the_range_is_none() -> None:
    assert _asked(Reconstruction(images=_with(1 + ROUNDING / 2))).status == ["ok"] * 3
    assert _asked(Reconstruction(images=_with(-2 * ROUNDING))).status == ["ok", "invalid", "ok"]


def test_labels_outside_the_classes_make_their_victim_invalid() -> None:
    given = _asked(Reconstruction(images=GREY, labels=torch.tensor([[-1], [9], [10]])))
    assert given.status == ["invalid", "ok", "invalid"] and "(allowed: 0 to 9)" in given.notes[2]


def test_a_failure_that_the_attack_owns_up_to_keeps_its_status() -> None:
    given = _asked(Reconstruction(images=_with(torch.nan), status=[Status.OK, Status.DIVERGED, Status.OK]))
    assert given.status == ["ok", "diverged", "ok"] and not given.notes


def test_rows_know_the_statuses_of_attacks_and_of_clients_that_refused() -> None:
    assert STATUSES == (*(state.value for state in Status), REFUSED)


CHANGES: dict[str, Callable[[], Any]] = {
    "grad mode": lambda: torch.set_grad_enabled(False),
    "the default dtype": lambda: torch.set_default_dtype(torch.float64),
    "torch's threads": lambda: torch.set_num_threads(2),
    "the precision of float32 products": lambda: torch.set_float32_matmul_precision("medium"),
    "deterministic algorithms": lambda: torch.use_deterministic_algorithms(True),
    "cuDNN's flags": lambda: setattr(torch.backends.cudnn, "benchmark", True),
    "anomaly mode": lambda: torch.autograd.set_detect_anomaly(True),
    "the default device": lambda: torch.set_default_device("meta"),
    "the filters of warnings": lambda: warnings.filterwarnings("ignore", "of this test"),
    "torch's generator": lambda: torch.manual_seed(1),
    "numpy's generator": lambda: np.random.seed(1),
    "Python's generator": lambda: random.seed(1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_global_state_is_put_back_and_what_changed_it_is_named(name: str) -> None:
    told: list[str] = []
    before = random_states()
    with restored(told.extend):
        CHANGES[name]()
    assert told == [name]
    with restored(told.extend):
        pass
    assert told == [name] and random_states() == before
    assert (
        torch.is_grad_enabled() and torch.get_default_dtype() is torch.float32 and torch.zeros(1).device.type == "cpu"
    )


def test_global_state_is_put_back_after_an_error() -> None:
    with pytest.raises(ValueError, match="oh"), restored():
        torch.set_grad_enabled(False)
        raise ValueError("oh")
    assert torch.is_grad_enabled()


def test_an_attack_that_changes_global_state_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    def seeded() -> Reconstruction:
        torch.manual_seed(0)
        return Reconstruction(images=GREY)

    with caplog.at_level(logging.WARNING):
        assert _asked(seeded).status == _asked(seeded).status == ["ok"] * 3
    assert [record.getMessage() for record in caplog.records] == [
        "attack 'own' changed global state, which is put back: torch's generator"
    ]


PLUGIN = """
from dataclasses import dataclass
import torch
from gradleak.attack import Attack, Reconstruction

@dataclass(frozen=True, kw_only=True)
class Odd(Attack):
    family, reference = "analytic", "own"
    kind: str = "some"

    def reconstruct(self, observation, generator):
        images = torch.full((observation.victims, observation.batch_size, *observation.shape), 0.5)
        if self.kind == "whole":
            return Reconstruction(images=images[0])
        images[0] = torch.nan
        return Reconstruction(images=images)
"""

SUITE = """
name: odd
victims: 3
seeds: [0]
candidates: 4
knowledge: [oblivious]
controls: listed
datasets: [digits]
models: [linear]
settings: [{name: b1, batch_size: 1}]
attacks: [{odd-answer: {kind: some}}, {odd-answer: {kind: whole}}, mean-image]
defenses: [none]
"""


def test_invalid_answers_are_failures_in_the_store(tmp_path: Path) -> None:
    plugin, suite, file = tmp_path / "odd_answer.py", tmp_path / "odd.yaml", tmp_path / "s.sqlite"
    plugin.write_text(PLUGIN.replace("class Odd(", "class OddAnswer("))
    suite.write_text(SUITE)
    summary = runner.run(suite, file, Local(), Resources(), [plugin])
    assert summary.stored == 3 and not summary.failed
    with Store(file) as store:
        cells, rows = store.cells(), store.rows()
        read = results.read(store)
    errors = dict(zip(cells["attack"], cells["error"], strict=True))
    whole = next(error for label, error in errors.items() if "whole" in label)
    assert whole == "invalid answer: images of shape [1, 1, 8, 8] (allowed: [3, 1, 1, 8, 8]) (odd_answer.py:11)"
    some = rows[rows["attack"].str.contains("some")].sort_values("victim")
    assert some["status"].tolist() == ["invalid", "ok", "ok"] and some["psnr"].isna().tolist() == [True, False, False]
    assert (rows[rows["attack"].str.contains("whole")]["status"] == "invalid").all()
    scored = read.rows[read.rows["attack_name"] == "odd-answer"]
    assert scored["failed"].sum() == 4
    floor = read.rows[read.rows["attack_name"] == "mean-image"].set_index("victim")["psnr"]
    lost = scored[scored["failed"]]
    assert (lost["psnr"].to_numpy() == floor.loc[lost["victim"]].to_numpy()).all()
