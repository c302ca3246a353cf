"""The process that attacks are copies of: it has imported what they need, and never holds a victim, a seed or a secret.

Whoever wants an attack run sends it two connections; it makes a copy of itself that serves the first (`serve`), and
ends that copy as soon as the second is closed. So each attack starts from the same blank state, whatever ran before it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import logging
import os
import pkgutil
import select
import signal
import socket
import sys
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from .. import registry
from ..dataset import Images
from ..defense import Defense
from ..engine.backends import BACKENDS
from ..errors import GradleakError
from ..federation import client
from ..federation.observation import observe
from ..model import initialise
from ..process import bound, end_with_parent, tune
from ..reconstruction import left_alone, mistakes
from ..seeds import Generators
from ..threat import Compute, Knowledge, Labels, Setting
from . import wire
from .answer import detached, guarded, halved
from .faults import machine_fault
from .losses import losses
from .said import Forward, Printed, Sayer, throttled
from .wire import ANSWER, ERROR, FAULT, MEMORY, PROGRESS, SAID, WRONG
from .workshop import described


def main(control: int, path: list[str], uses_gpu: bool) -> None:
    """Serve until nobody holds the other end of a socket.

    Args:
        control: the socket's number.
        path: the modules' path of whoever started it.
        uses_gpu: whether copies compute on a GPU; then nothing is computed before there are any.
    """
    tune()
    sys.path[:] = path
    _import_all()
    if not uses_gpu:
        _warm_up()
    _Nursery(socket.socket(fileno=control)).run()


def _import_all() -> None:
    """Import what attacks need: no copy has to do so again."""
    for group in registry.GROUPS:
        registry.names(group)
        for found in pkgutil.iter_modules(importlib.import_module(f"gradleak.{group}").__path__):
            importlib.import_module(f"gradleak.{group}.{found.name}")


def _warm_up() -> None:
    """Let torch set up what it does at first use."""
    shape, classes, setting = (1, 8, 8), 10, Setting()
    module = initialise(registry.build("models", "mlp", {"widths": [4]}), shape, classes, 0)
    defense: Defense = registry.build("defenses", "none")
    network = client.client_network(module, defense, setting)
    images, labels = torch.full((2, 1, *shape), 0.5), torch.zeros(2, 1, dtype=torch.int64)
    sent = client.send(network, images, labels, classes, defense, setting, 0, [0, 1])
    knowledge = Knowledge(labels=Labels.KNOWN)
    for backend in BACKENDS:
        seen = observe(
            sent, network, defense, setting, shape, labels, classes, knowledge, compute=Compute(backend=backend)
        )
        attack = registry.build("attacks", "inverting-gradients", {"iterations": 1})
        wire.write_answer(attack.reconstruct(seen, Generators(range(2))), None)


class _Nursery:
    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._alive: dict[int, socket.socket] = {}
        """The connection to whoever wants a copy, by its number."""
        self._woken, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        gc.collect()
        gc.freeze()  # pages that nobody writes to are shared with all copies

    def run(self) -> None:
        while True:
            waited: list[socket.socket | int] = [self._control, self._woken, *self._alive.values()]
            ready = select.select(waited, [], [])[0]
            if self._woken in ready:
                os.read(self._woken, 4096)
                self._bury()
            for number, life in list(self._alive.items()):
                if life in ready:
                    self._end(number)
            if self._control in ready and not self._copy():
                break
        for number in list(self._alive):
            self._end(number)

    def _copy(self) -> bool:
        """Make a copy for whoever asks; return whether anybody still can."""
        message, numbers, *_ = socket.recv_fds(self._control, 16, 4)
        if not message:
            return False
        connection, life, *public = numbers
        with warnings.catch_warnings():
            # Libraries may have threads, which are idle now and hold no lock that a copy would wait for.
            warnings.simplefilter("ignore", DeprecationWarning)
            number = os.fork()
        if not number:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for held in (self._control, *self._alive.values()):
                held.close()
            for held_number in (life, self._woken):
                os.close(held_number)
            _start(connection, public)
        for each in (connection, *public):
            os.close(each)
        self._alive[number] = socket.socket(fileno=life)
        with contextlib.suppress(OSError):
            self._alive[number].send(f"{number}\n".encode())
        return True

    def _end(self, number: int) -> None:
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(OSError):
                kill(number, signal.SIGKILL)
        self._alive.pop(number).close()

    def _bury(self) -> None:
        """Tell those who wait for a copy that has ended how it did."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                number, status = ended
                if (life := self._alive.pop(number, None)) is not None:
                    with contextlib.suppress(OSError):
                        os.killpg(number, signal.SIGKILL)  # what a plugin has started ends with it
                    with contextlib.suppress(OSError):
                        life.send(f"{os.waitstatus_to_exitcode(status)}\n".encode())
                    life.close()


def _start(connection: int, public: list[int]) -> None:
    code = 1
    try:
        os.setsid()
        end_with_parent()
        serve(Connection(connection), public)
        code = 0
    except BaseException as error:
        sys.__stderr__.write(f"gradleak: an attack's process: {type(error).__name__}: {error}\n")  # type: ignore[union-attr]
    finally:
        os._exit(code)


def serve(connection: Connection, public: list[int]) -> None:
    """Run one attack: read what it is given, say how it goes, and give its answer.

    Args:
        connection: to the evaluator, which sends first where things are, then the observation.
        public: files of public images, in the order of their names.
    """

    def say(kind: bytes, content: bytes = b"") -> None:
        connection.send_bytes(kind + content)

    head = json.loads(connection.recv_bytes())
    sayer = Sayer(lambda kind, text: say(SAID, str(text).encode()))
    Forward(sayer.say).install()
    logging.getLogger("gradleak").handlers.clear()
    sys.path[:] = head["path"]
    os.environ.clear()
    os.environ.update(head["environment"])
    with contextlib.suppress(OSError):
        os.chdir(head["folder"])
    with contextlib.suppress(OSError):
        os.dup2(2, 1)
    sys.stdout = Printed(sayer.say)
    bound(head["memory"])
    here = os.getpid()
    try:
        kind, content = _answered(head, connection, public, say)
    except BaseException as error:
        kind, content = _failure(error)
    if os.getpid() != here:  # an attack forked, and this is the other one
        os._exit(0)
    say(kind, content)


def _answered(
    head: dict[str, Any], connection: Connection, public: list[int], say: Callable[..., None]
) -> tuple[bytes, bytes]:
    for path in head["plugins"]:
        registry.add_file(Path(path))
    if head["task"] == "losses":
        return ANSWER, _losses(head, connection, public)
    observation, streams = wire.read_job(connection.recv_bytes(), lambda place: _public(public[place]))
    report = throttled(lambda share, loss: say(PROGRESS, json.dumps([share, loss]).encode()))
    if head["progress"]:
        object.__setattr__(observation.compute, "progress", report)
    attack = registry.build("attacks", head["attack"], head["options"])
    with guarded(f"attack {head['label']!r}"), left_alone(attack, observation):
        answer = attack.reconstruct(observation, streams)
    wrong = next(mistakes(answer, observation), None)
    if wrong is not None:
        return WRONG, wrong.encode()
    return ANSWER, wire.write_answer(detached(answer), halved(observation))


def _losses(head: dict[str, Any], connection: Connection, public: list[int]) -> bytes:
    observation, given = wire.read_guesses(connection.recv_bytes(), lambda place: _public(public[place]))
    attack = registry.build("attacks", head["attack"], head["options"])
    return wire.write_losses(losses(attack, observation, *given))


def _failure(error: BaseException) -> tuple[bytes, bytes]:
    from ..engine import memory

    if memory.is_out_of_memory(error):
        return MEMORY, str(error).encode()[:1000]
    if isinstance(error, Exception) and (fault := machine_fault(error)):
        return FAULT, fault.encode()
    if isinstance(error, Exception | SystemExit):
        return ERROR, described(error).encode()
    return ERROR, f"{type(error).__name__}: {error}".encode()[:500]


def _public(number: int) -> Images:
    """Map a file of public images; what is written to them stays in this process."""
    images, labels = torch.load(f"/proc/self/fd/{number}", mmap=True, weights_only=True)
    return Images(images, labels)


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), **json.loads(sys.argv[2]))
    except GradleakError as error:
        sys.exit(f"gradleak: {error}")
