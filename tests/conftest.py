"""What every test shares."""

from __future__ import annotations

import os
import signal
import tempfile

# Before torch loads: idle OpenMP threads must not spin while other processes compute.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Checkpoints and choices of the tests stay out of the user's cache.
os.environ["GRADLEAK_CACHE"] = tempfile.mkdtemp(prefix="gradleak-tests-")

import pytest
import torch

from gradleak import registry, secret

torch.set_num_threads(1)

# Started in the background, this process ignores Ctrl-C, and so would the programs that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what takes long, unless it is asked for by its mark (`make test-docs`, `make test-faults`)."""
    left = [mark for mark in ("documents", "faults") if mark not in str(config.getoption("-m"))]
    out = [item for item in items if any(map(item.get_closest_marker, left))]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]


@pytest.fixture(autouse=True)
def _plugins_of_one_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget with each test the plugin files that it added."""
    monkeypatch.setattr(registry, "_files", dict(registry._files))


@pytest.fixture(autouse=True)
def _secret_of_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let new stores draw one secret, so that runs can be compared; no value that is pinned may depend on another."""
    monkeypatch.setattr(secret, "draw", lambda: secret.Secret.of("0123456789abcdef" * 2))
