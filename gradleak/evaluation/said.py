"""How processes that compute say what goes on: warnings, printed lines and progress, handed to whoever shows them."""

from __future__ import annotations

import contextlib
import io
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from .workshop import Progress

_LINES = 100
"""Lines that a worker may print; a plugin that never stops would fill memory."""


class Forward(logging.Handler):
    """Hands on the text of a worker's warnings, for the driver to show each line once."""

    def __init__(self, send: Callable[[str], None]) -> None:
        """Send lines to `send`."""
        super().__init__(logging.WARNING)
        self.send = send

    def emit(self, record: logging.LogRecord) -> None:
        """Send one line."""
        self.send(record.getMessage())

    def install(self) -> None:
        """Take the place of this process's handlers, for `warnings` too."""
        logging.captureWarnings(True)
        logging.getLogger().handlers = [self]


def throttled(report: Progress) -> Progress:
    """Pass on the first report, then no more than five a second."""
    last = -1.0

    def passed(share: float, loss: float) -> None:
        nonlocal last
        if last < 0 or time.monotonic() - last > 0.2:
            last = time.monotonic()
            report(share, loss)

    return passed


class Sayer:
    """Sends messages of several threads one after the other."""

    def __init__(self, send: Callable[[str, Any], None]) -> None:
        """Send by `send`, which takes a kind and a content."""
        self._send, self._lock = send, threading.Lock()
        self._lines = 0

    def __call__(self, kind: str, content: Any) -> None:
        """Send one message."""
        with self._lock, contextlib.suppress(BrokenPipeError):
            self._send(kind, content)

    def say(self, text: str) -> None:
        """Send a line, unless there were too many."""
        self._lines += 1
        if self._lines <= _LINES:
            self("said", text[:1000])


class Printed(io.TextIOBase):
    """Stands for standard output: what plugins print is said in lines, and never reaches what the driver prints."""

    def __init__(self, say: Callable[[str], None]) -> None:
        """Say lines by `say`."""
        self._say, self._rest = say, ""

    def write(self, text: str) -> int:
        """Say the lines that are whole."""
        *lines, rest = (self._rest + text).split("\n")
        self._rest = rest[-1000:]
        for line in filter(str.strip, lines):
            self._say(line)
        return len(text)
