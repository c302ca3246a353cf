"""Where cells are computed: in one worker process, in several, or on a Ray cluster. Results come as they finish.

An executor only computes; the caller writes the store. Every cell is computed with one torch thread, so that
its result does not depend on the executor or on the number of workers.
"""

from __future__ import annotations

from ...errors import GradleakError, unknown
from .base import ATTEMPTS, Desk, Executor, Limits, Pending, Queue, Report
from .local import Local
from .processes import Processes
from .ray import Ray, require_ray

__all__ = [
    "ATTEMPTS",
    "EXECUTORS",
    "Desk",
    "Executor",
    "Limits",
    "Local",
    "Pending",
    "Processes",
    "Queue",
    "Ray",
    "Report",
    "build",
]

EXECUTORS = ("local", "processes", "ray")
"""Names that `build` knows."""


def build(
    name: str, workers: int | None = None, ray_address: str | None = None, limits: Limits | None = None
) -> Executor:
    """Return an executor by name.

    Raises:
        GradleakError: no executor has this name, Ray is not installed, or `workers` is given to `local` or
            `ray_address` to another executor than `ray`.
    """
    limits = limits or Limits()
    if name not in EXECUTORS:
        raise unknown("executor", name, EXECUTORS)
    if ray_address is not None and name != "ray":
        raise GradleakError(f"--ray-address {ray_address}: executor {name!r} has no use for it; use --executor ray")
    if name == "ray":
        require_ray()
        return Ray(workers, ray_address, limits)
    if name == "processes":
        return Processes(workers, limits)
    if workers not in (None, 1):
        raise GradleakError(f"--workers {workers}: executor 'local' has one worker; use processes")
    return Local(limits)
