"""The process in which a plugin is checked; `process` starts it and listens."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from .. import registry
from ..errors import GradleakError, unknown
from ..process import tune
from .behaviour import limit_memory
from .checks import steps
from .findings import Finding
from .process import Job
from .victims import Ask


def main(channel: int, given: Mapping[str, Any]) -> None:
    """Check what is asked for, and write every finding to a file descriptor as soon as it is known."""

    def tell(**message: Any) -> None:
        os.write(channel, json.dumps(message).encode() + b"\n")

    job = Job(**given)
    tune()
    limit_memory()
    tell(promise="can be loaded")
    try:
        group, name = _of_file(Path(job.plugin)) if job.is_file else _of_name(job)
        shape = None if job.shape is None else (job.shape[0], job.shape[1], job.shape[2])
        ask = Ask(job.options, job.dataset, job.model, shape, None if job.root is None else Path(job.root))
        for axis, chosen in (("datasets", job.dataset), ("models", job.model)):
            if chosen and chosen not in registry.names(axis):
                raise unknown(registry.GROUPS[axis], chosen, registry.names(axis))
        cls = registry.load(group, name)
        tell(source=sys.modules[cls.__module__].__file__, promise="can be checked")
        for promise, run in steps(group, name, ask):
            tell(promise=promise)
            tell(finding=asdict(run()))
    except _Unloadable as error:
        tell(finding=asdict(Finding("can be loaded", False, str(error))))
    except GradleakError as error:
        tell(refused=str(error))
    tell(done=True)


class _Unloadable(Exception):
    """Why a plugin cannot be loaded."""


def _of_file(path: Path) -> tuple[str, str]:
    if not path.is_file():
        raise GradleakError(f"{path}: no such file")
    try:
        ((group, name),) = registry.add_file(path)
    except GradleakError as error:
        raise _Unloadable(str(error).removeprefix(f"--plugin {path}: ")) from error
    return group, name


def _of_name(job: Job) -> tuple[str, str]:
    if job.group:
        if job.plugin not in registry.names(job.group):
            raise unknown(registry.GROUPS[job.group], job.plugin, registry.names(job.group))
        groups = [job.group]
    else:
        groups = registry.groups_of(job.plugin)
    if not groups:
        known = {name for group in registry.GROUPS for name in registry.names(group)}
        raise unknown("plugin", job.plugin, known)
    if len(groups) > 1:
        raise GradleakError(f"{job.plugin!r} is a name in {' and '.join(groups)}; add --group")
    try:
        registry.load(groups[0], job.plugin)
    except GradleakError as error:
        raise _Unloadable(str(error)) from error
    return groups[0], job.plugin


def _leave(status: int) -> NoReturn:
    """End the process like `os._exit`, and say where it was."""
    faulthandler.dump_traceback(2, all_threads=False)
    _exit(status)


if __name__ == "__main__":
    faulthandler.enable(all_threads=False)
    faulthandler.register(signal.SIGUSR1, all_threads=False)
    _exit, os._exit = os._exit, _leave
    main(int(sys.argv[1]), json.loads(sys.argv[2]))
