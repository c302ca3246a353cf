"""Attacks run where no victim is: in a process of their own, copied from one that never held any (`nursery`)."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import registry
from ..attack import Reconstruction
from ..dataset import Images
from ..errors import GradleakError
from ..seeds import Generators
from ..threat import Observation
from . import wire
from .answer import Mistake
from .faults import MachineFault
from .wire import ANSWER, ERROR, FAULT, MEMORY, PROGRESS, SAID, WRONG

log = logging.getLogger(__name__)

KEPT = 4
"""Sets of public images that are kept for attacks."""


def possible() -> bool:
    """Whether attacks can be run apart: processes are copied, and files lie in memory, on Linux only."""
    return sys.platform.startswith("linux") and hasattr(os, "memfd_create")


def nursery(device: str) -> socket.socket | None:
    """Return the socket of this process's nursery, which its workers may use; None where there can be none.

    Args:
        device: where attacks compute; see `Apart`.
    """
    return _started(device) if possible() else None


class Apart:
    """Runs attacks in processes of their own; made by a driver, and handed to its workers."""

    def __init__(self, control: socket.socket | None = None, memory: int | None = None, device: str = "cpu") -> None:
        """Use a nursery that is there, by its socket, or start one.

        Args:
            control: of a nursery.
            memory: bytes that an attack may take; None for no bound.
            device: where attacks compute: what has used a GPU cannot be copied, so a nursery for GPUs uses none.
        """
        self._device = device
        self._control = _started(device) if control is None else control
        self._memory = memory
        self._public: list[tuple[Images, int]] = []
        self.told: Callable[[int], None] = lambda pid: None
        """Told the number of every process that runs an attack."""

    def __call__(
        self, name: str, options: Mapping[str, Any], label: str, observation: Observation, streams: Generators
    ) -> tuple[Reconstruction | Mistake, int | None]:
        """Return what an attack answers, and the width that memory held if it is not the one that was asked for.

        Raises:
            GradleakError: the attack raised.
            MemoryError: it ran out of memory.
            MachineFault: the machine could not do what was asked of it, or the process died.
        """
        files: list[int] = []
        head = {"task": "attack", "attack": name, "options": dict(options), "label": label}
        job = [wire.write_job(observation, streams, partial(self._place_of, files))]
        kind, content = self._served(head, job, files, observation.compute.progress)
        return (Mistake(content.decode(errors="replace")), None) if kind == WRONG else wire.read_answer(content)

    def losses(
        self,
        name: str,
        options: Mapping[str, Any],
        label: str,
        observation: Observation,
        guesses: wire.Guesses,
        targets: Tensor,
        buffers: wire.Tensors,
    ) -> wire.Losses:
        """Return an attack's own losses at some images, in a process that ends with it.

        Raises:
            GradleakError: the attack raised, or its losses are none.
            MemoryError: it ran out of memory.
            MachineFault: the machine could not do what was asked of it, or the process died.
        """
        files: list[int] = []
        job = [wire.write_guesses(observation, guesses, targets, buffers, partial(self._place_of, files))]
        head = {"task": "losses", "attack": name, "options": dict(options), "label": label}
        _, content = self._served(head, job, files, None)
        return wire.read_losses(content, guesses, observation.victims)

    def _place_of(self, files: list[int], images: Images) -> int:
        """Return the place of public images among the files that a process is given."""
        number = self._file_of(images)
        if number not in files:
            files.append(number)
        return files.index(number)

    def _served(
        self,
        task: Mapping[str, Any],
        job: list[bytes],
        files: list[int],
        progress: Callable[[float, float], None] | None,
    ) -> tuple[bytes, bytes]:
        """Have a task done by a process of its own; return the kind and the content of what it answers.

        The job is taken out of its list, so that nobody holds its bytes, which are many, while it is done.
        """
        connection, life = self._ask(files)
        with connection, life:
            head = {
                **task,
                "plugins": [str(path) for path in registry.added_files()],
                "path": sys.path,
                "folder": str(Path.cwd()),
                "environment": dict(os.environ),
                "memory": self._memory,
                "progress": progress is not None,
            }
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.send_bytes(json.dumps(head).encode())
                connection.send_bytes(job.pop())
            return _heard(connection, life, progress or (lambda share, loss: None), self.told)

    def wait(self) -> None:
        """Return when attacks can be run at once: a cell's time must not pass while a nursery starts."""
        connection, life = self._ask([])
        with connection:
            life.recv(100)  # the number of a copy
            life.close()  # which ends it
            with contextlib.suppress(EOFError, OSError):
                connection.recv_bytes()

    def _ask(self, files: list[int]) -> tuple[Connection, socket.socket]:
        """Have a process made for one attack; return the connection to it, and the one that it lives as long as."""
        ours, theirs = socket.socketpair()
        life, its_life = socket.socketpair()
        with theirs, its_life:
            numbers = [theirs.fileno(), its_life.fileno(), *files]
            try:
                socket.send_fds(self._control, [b"copy"], numbers)
            except OSError:  # The nursery is gone: somebody ended it.
                self._control = _started(self._device)
                socket.send_fds(self._control, [b"copy"], numbers)
        return Connection(ours.detach()), life

    def _file_of(self, images: Images) -> int:
        """Return the number of a file in memory, which nobody can change, that holds public images."""
        for known, number in self._public:
            if known is images:
                return number
        number = os.memfd_create("public images", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        with open(number, "wb", closefd=False) as file:
            torch.save((images.images.clone(), images.labels.clone()), file)
        fcntl.fcntl(number, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
        self._public.append((images, number))
        for _, old in self._public[:-KEPT]:
            os.close(old)
        del self._public[:-KEPT]
        return number


def _heard(
    connection: Connection, life: socket.socket, progress: Callable[[float, float], None], told: Callable[[int], None]
) -> tuple[bytes, bytes]:
    """Listen to an attack's process until it has answered."""
    known, words = "", b""
    while True:
        waited: list[Connection | socket.socket] = [connection, life]
        ready = select.select(waited, [], [])[0]
        if life in ready:
            words = life.recv(100)
            known += words.decode()
            if known.count("\n") == 1:
                told(int(known))
        if connection not in ready:
            if not words and life in ready:
                raise MachineFault("an attack's process died")
            continue
        try:
            message = connection.recv_bytes()
        except (EOFError, OSError):
            raise MachineFault(_death(known, life)) from None
        kind, content = message[:1], message[1:]
        if kind == SAID:
            log.warning("%s", content.decode(errors="replace"))
        elif kind == PROGRESS:
            share, loss = json.loads(content)
            progress(float(share), float(loss))
        else:
            return _answer(kind, content)


def _answer(kind: bytes, content: bytes) -> tuple[bytes, bytes]:
    if kind in (ANSWER, WRONG):
        return kind, content
    text = content.decode(errors="replace")
    if kind == MEMORY:
        raise MemoryError(text)
    if kind == FAULT:
        raise MachineFault(text)
    if kind == ERROR:
        raise GradleakError(text)
    raise GradleakError("the attack's answer cannot be read")


def _death(known: str, life: socket.socket) -> str:
    """Say how an attack's process ended."""
    with contextlib.suppress(OSError):
        life.settimeout(10)
        while known.count("\n") < 2 and (words := life.recv(100)):
            known += words.decode()
    lines = known.split()
    if len(lines) < 2:
        return "an attack's process died"
    return death(int(lines[1]))


def death(code: int | None) -> str:
    """Say how a process ended, by its exit code."""
    if code is None or code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"{name}, often a lack of memory" if code == -signal.SIGKILL else name


_nurseries: dict[tuple[int, bool], tuple[subprocess.Popen[bytes], socket.socket]] = {}
"""The nurseries that a process has started, by its number and whether they are for GPUs."""


def _started(device: str) -> socket.socket:
    """Return the socket of this process's nursery for a kind of device, started if it has none that lives."""
    key = os.getpid(), device != "cpu"
    known = _nurseries.get(key)
    if known is not None and known[0].poll() is None:
        return known[1]
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **_ONE_THREAD}
        environment |= _SEES_GPUS if key[1] else _SEES_NO_GPU
        head = json.dumps({"path": sys.path, "uses_gpu": key[1]})
        process = subprocess.Popen(
            [sys.executable, "-m", "gradleak.evaluation.nursery", str(theirs.fileno()), head],
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=2,
            env=environment,
        )
    if key not in _nurseries:
        atexit.register(_end, key)
    _nurseries[key] = process, ours
    return ours


def _end(key: tuple[int, bool]) -> None:
    """End a nursery with the process that started it, and not with copies of that."""
    if os.getpid() != key[0]:
        return
    process, control = _nurseries.pop(key)
    control.close()
    try:
        process.wait(2)
    except subprocess.TimeoutExpired:  # A worker that has not ended yet holds the other end too.
        process.kill()
        process.wait()


_ONE_THREAD: Mapping[str, str] = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
# Torch starts a thread for every GPU that it sees with its first gradient, and copies of a process with such threads
# compute none; asked by NVML whether there is a GPU, it does not begin to use it.
_SEES_NO_GPU: Mapping[str, str] = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
_SEES_GPUS: Mapping[str, str] = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
