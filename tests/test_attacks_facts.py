"""What every attack says of itself: its source, what it needs, how it was tuned."""

from __future__ import annotations

import inspect
import re

import pytest

from gradleak import registry
from gradleak.attack import Attack
from gradleak.threat import Knowledge


@pytest.mark.parametrize("name", registry.names("attacks"))
def test_facts(name: str) -> None:
    plugin = registry.build("attacks", name)
    told = inspect.getdoc(type(plugin)) or ""
    assert isinstance(plugin.needs, Knowledge) and plugin.reference and plugin.tuning
    assert plugin.family in {"optimisation", "analytic", "generative", "learned", "control"}
    assert "evaluation" not in plugin.tuning, "tuned on victims that results are made of"
    if plugin.family == "control":
        return
    assert re.search(r"\b(19|20)\d\d\b|arXiv:\d{4}\.\d{5}", told), "no source in the docstring"
    if plugin.reference.startswith("gradleak"):
        assert "Our own attack" in told and plugin.tuning != Attack.tuning
