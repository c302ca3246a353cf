"""What is known of a cell: typed here, the same JSON in the store, whoever wrote it."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from gradleak.board.codec import dump
from gradleak.board.provenance import NOTHING, Inspected, Provenance, Served, guaranteed
from gradleak.privacy import Guarantee

GUARANTEE = {"epsilon": 8.0, "delta": 1e-5, "accountant": "RDP", "unit": "one example", "noise": None}
IDENTITY = {"attack_family": "analytic", "adaptive": False, "threat_model": "honest server", "defense_family": "noise"}
ATTACKED = {**IDENTITY, "stochastic": True, "bytes": 12.5, "dense_bytes": 16, "epsilon": GUARANTEE, "backend": ""}
SERVED = {"queries": 1.0, "most_queries": 1, "expected": None, "added_parameters": 9, "added_bytes": 36}
STORED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "a failed cell": IDENTITY,
    "an attacked defense": ATTACKED,
    "no guarantee": {**ATTACKED, "epsilon": None, "width": 4},
    "a server and a client that looks": {
        **ATTACKED,
        "server": {**SERVED, "accuracy": 0.5, "counts": "exact"},
        "inspection": {"refused": 1.0, "false_alarms": 0.0, "honest_rounds": 8, "thresholds": [0.25]},
    },
    "a training": {
        **{"attack_family": "utility", "defense_family": "noise", "test_accuracy": 0.0, "lr": 0.5},
        **{"validation_accuracy": {"0.5": 0.25}, "participations": 3, "training_epsilon": GUARANTEE},
    },
}


@pytest.mark.parametrize("name", STORED)
def test_the_stored_form_is_read_and_written_again_to_the_byte(name: str) -> None:
    facts = STORED[name]
    assert dump(Provenance.of(json.loads(dump(facts))).stored()) == dump(facts)


def test_no_guarantee_is_another_fact_than_none_known() -> None:
    assert Provenance.of(IDENTITY).epsilon is None and Provenance.of({"epsilon": None}).epsilon == NOTHING
    assert Provenance(epsilon=guaranteed(None)).stored() == {"epsilon": None} and Provenance().stored() == {}
    assert Provenance(attack_family=NOTHING).stored() == {"attack_family": NOTHING}


def test_what_other_versions_say_is_read_as_far_as_it_is_known() -> None:
    found = Provenance.of({"later": 1, "server": {"accuracy": 0.5, "later": 1}, "epsilon": {"epsilon": 2.0}})
    assert found.server == Served(accuracy=0.5) and found.inspection is None
    assert isinstance(found.epsilon, Guarantee) and found.epsilon.epsilon == 2.0 and math.isnan(found.epsilon.delta)
    assert Provenance.of(None) == Provenance()
    assert Provenance.of({"inspection": {"refused": 1.0}}).inspection != Inspected(refused=0.0)
