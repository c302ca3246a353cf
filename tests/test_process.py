from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import os, resource
from gradleak import process
{before}
process.tune()
import torch
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(2**23).sum()
start = faults()
for _ in range(20):
    torch.ones(2**23).sum()
print(torch.get_num_threads(), os.environ["OMP_WAIT_POLICY"], faults() - start)
"""


def run(before: str = "", **environment: str) -> list[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MALLOC_"))}
    command = [sys.executable, "-c", PROGRAM.format(before=before)]
    done = subprocess.run(command, env={**clean, **environment}, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_a_worker_has_one_thread_and_waits_passively() -> None:
    assert run()[:2] == ["1", "PASSIVE"]
    assert run(OMP_WAIT_POLICY="ACTIVE")[1] == "ACTIVE"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is glibc's")
def test_memory_is_kept() -> None:
    # 32 MiB have 8192 pages, which the default allocator faults in again every time.
    kept, default = int(run()[2]), int(run(MALLOC_ARENA_MAX="8")[2])
    assert kept < 1000 < default


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradleak import process

    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert process.keep_memory() is False
    monkeypatch.setattr(sys, "platform", "darwin")
    assert process.keep_memory() is False
