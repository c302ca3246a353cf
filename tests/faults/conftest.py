"""The long campaign: `make test-faults`. An ordinary run of the tests leaves it out."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave tests marked `faults` out unless they are asked for by their mark."""
    if "faults" in str(config.getoption("-m")):
        return
    out = [item for item in items if item.get_closest_marker("faults")]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]
