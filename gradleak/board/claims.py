"""Claims: which run computes which cell, so that several runs on one store share the work.

A claim is a lease. It ends when its cell is stored, when its run lets go of it, and when its run is gone: at once where
its process is seen to be dead, elsewhere when it has given no sign of life for `LEASE`.
"""

from __future__ import annotations

import os
import platform
import secrets
import sqlite3
import time
from enum import Enum
from pathlib import Path

from ..errors import GradleakError
from .schema import CLAIMS
from .store import Store

LEASE = 120.0
"""Seconds without a sign of life after which a run's claims are anybody's: eight missed ones, as a busy machine misses
some."""
BEAT = 15.0
"""Seconds between two signs of life."""


class Claim(Enum):
    """What a run is told when it asks for a cell."""

    MINE = "mine"
    """Compute it."""
    STORED = "stored"
    """Nobody need compute it."""
    TAKEN = "taken"
    """Another run computes it; ask again later."""


class Claims:
    """The claims of one run on the cells of a store."""

    def __init__(self, store: Store, retry_failed: bool = False):
        """Make the table of claims if an older version made the store; nothing is claimed yet."""
        self.owner = f"{_here()}/{os.getpid()}/{_born(os.getpid())}/{secrets.token_hex(4)}"
        self._store = store
        self._beaten = time.monotonic()
        if not store.claimed:
            with store.transaction() as database:
                if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'claims'").fetchone():
                    database.execute(CLAIMS)
        with store.transaction() as database:
            found = database.execute("SELECT key, started, seconds FROM cells WHERE status = 'failed'").fetchall()
        self._again = {key: (started, seconds) for key, started, seconds in found} if retry_failed else {}
        """Failed cells to try again; one that has failed since this run began is not among them, or it would be tried
        for ever."""

    def take(self, key: str) -> Claim:
        """Ask for a cell."""
        with self._store.transaction() as database:
            found = database.execute("SELECT started, seconds FROM cells WHERE key = ?", (key,)).fetchone()
            if found and tuple(found) != self._again.get(key):
                return Claim.STORED
            held = database.execute("SELECT owner, beat FROM claims WHERE key = ?", (key,)).fetchone()
            if held and held[0] != self.owner and _alive(*held):
                return Claim.TAKEN
            database.execute("INSERT OR REPLACE INTO claims VALUES (?, ?, ?)", (key, self.owner, time.time()))
            return Claim.MINE

    def release(self, key: str) -> None:
        """Leave a cell to others."""
        with self._store.transaction() as database:
            database.execute("DELETE FROM claims WHERE key = ? AND owner = ?", (key, self.owner))

    def beat(self) -> None:
        """Give a sign of life, if it is time for one; call it every few seconds."""
        if time.monotonic() < self._beaten + BEAT:
            return
        self._beaten = time.monotonic()
        with self._store.transaction() as database:
            database.execute("UPDATE claims SET beat = ? WHERE owner = ?", (time.time(), self.owner))

    def end(self) -> None:
        """Leave all cells to others; a store that cannot be written keeps the claims until they expire."""
        try:
            with self._store.transaction() as database:
                database.execute("DELETE FROM claims WHERE owner = ?", (self.owner,))
        except (GradleakError, sqlite3.Error):
            pass


def _alive(owner: str, beat: float) -> bool:
    try:
        if not -LEASE < time.time() - beat < LEASE:
            return False
        here, pid, born, _ = owner.rsplit("/", 3)
        return here != _here() or _born(int(pid)) == born
    except (ValueError, AttributeError, TypeError):
        return False


def _here() -> str:
    """Name the machine, its boot and its space of process numbers (containers have their own)."""
    boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    try:
        return f"{platform.node()}:{boot.read_text().strip()}:{os.readlink(space)}"
    except OSError:
        return platform.node()


def _born(pid: int) -> str:
    """Return when a process started, in the kernel's ticks; empty where there is no such process.

    A number is used again by another process, which started at another time.
    """
    stat = Path(f"/proc/{pid}/stat")
    try:
        fields = stat.read_text().rsplit(")", 1)[1].split()
    except OSError:
        if Path("/proc/self/stat").exists():
            return ""
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return ""
        except PermissionError:
            pass
        return "alive"
    return "" if fields[0] in "ZX" else fields[19]
