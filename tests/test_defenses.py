"""What every defense promises, over all that are installed."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import cache

import pytest

from gradleak import registry
from gradleak.contract import checks, findings
from gradleak.contract.defenses import DefenseCase


@cache
def case(name: str) -> DefenseCase:
    return DefenseCase(registry.build("defenses", name))


@pytest.mark.parametrize("check", checks.CHECKS["defenses"], ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", registry.names("defenses"))
def test_contract(name: str, check: Callable[[DefenseCase], None]) -> None:
    try:
        check(case(name))
    except findings.Unchecked:
        assert not case(name).defense.is_adaptive_target


METHODS = {"protect": "linear", "simulate": "simulates", "nll": "has_likelihood"}
"""Methods, and the fact that a class which brings one declares."""


@pytest.mark.parametrize("name", registry.names("defenses"))
def test_what_a_class_is_stands_in_it(name: str) -> None:
    cls = registry.load("defenses", name)
    lines = inspect.getsource(cls)
    for method, fact in METHODS.items():
        brings = re.search(rf"^    def {method}\(", lines, re.MULTILINE)
        says = re.search(rf"^    ({fact} = |def {fact}\()", lines, re.MULTILINE)
        assert bool(brings) <= bool(says), f"{method} without {fact}"


@pytest.mark.parametrize("name", registry.names("defenses"))
def test_options_rebuild_it(name: str) -> None:
    defense = registry.build("defenses", name)
    assert registry.build("defenses", name, registry.options_of(defense)) == defense
