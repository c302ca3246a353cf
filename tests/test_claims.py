"""Several runs on one store: who computes what, and what is left by those that die."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from gradleak.board import claims
from gradleak.board.claims import Claim, Claims
from gradleak.board.store import CellResult, Store
from gradleak.evaluation.executors import Queue
from tests.trials import cell

PART = {"name": "x", "label": "x", "options": {}}
CONFIG = {**dict.fromkeys(("attack", "defense", "model", "dataset"), PART), "setting": {"name": "s", "batch_size": 1}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    Store(tmp_path / "s.sqlite", create=True).close()
    return tmp_path / "s.sqlite"


def _cell(key: str, status: str = "ok", started: str = "2026-01-01T00:00:00+00:00") -> CellResult:
    return CellResult(key=key, config=CONFIG, status=status, started=started)  # type: ignore[arg-type]


def test_a_cell_is_one_runs_at_a_time(path: Path) -> None:
    with Store(path) as first, Store(path) as second:
        mine, others = Claims(first), Claims(second)
        assert mine.take("a") is Claim.MINE and mine.take("a") is Claim.MINE
        assert others.take("a") is Claim.TAKEN
        mine.release("a")
        assert others.take("a") is Claim.MINE
        assert mine.take("a") is Claim.TAKEN
        assert second.offer(_cell("a")) and mine.take("a") is Claim.STORED
        assert not first.offer(_cell("a")), "a second result is not kept"
        assert mine.take("b") is Claim.MINE
        mine.end()
        assert others.take("b") is Claim.MINE


def test_silence_ends_a_claim(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store(path) as first, Store(path) as second:
        mine, others = Claims(first), Claims(second)
        mine.take("a")
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + claims.LEASE - 1)
        assert others.take("a") is Claim.TAKEN
        monkeypatch.setattr(time, "time", lambda: now + claims.LEASE + 1)
        assert others.take("a") is Claim.MINE


def test_a_sign_of_life_extends_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store(path) as first, Store(path) as second:
        mine, others = Claims(first), Claims(second)
        mine.take("a")
        now = time.time()
        monkeypatch.setattr(claims, "BEAT", 0.0)
        monkeypatch.setattr(time, "time", lambda: now + claims.LEASE - 1)
        mine.beat()
        monkeypatch.setattr(time, "time", lambda: now + claims.LEASE + 1)
        assert others.take("a") is Claim.TAKEN


def test_a_killed_runs_claims_are_free_at_once(path: Path) -> None:
    script = f"""
        import os, signal
        from gradleak.board.claims import Claims
        from gradleak.board.store import Store
        Claims(Store({str(path)!r})).take("a")
        os.kill(os.getpid(), signal.SIGKILL)
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert ended.returncode == -signal.SIGKILL
    with contextlib.closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT key FROM claims").fetchall() == [("a",)]
    with Store(path) as store:
        assert Claims(store).take("a") is Claim.MINE


def test_a_number_that_another_process_has_now_is_no_sign_of_life(path: Path) -> None:
    with Store(path) as store:
        mine = Claims(store)
        here, _, _, token = mine.owner.rsplit("/", 3)
        with store.transaction() as database:
            owner = f"{here}/{os.getpid()}/1/{token}"
            database.execute("INSERT INTO claims VALUES ('a', ?, ?)", (owner, time.time()))
        assert mine.take("a") is Claim.MINE


def test_a_failed_cell_is_repeated_once_by_whoever_asks_for_that(path: Path) -> None:
    with Store(path) as store:
        store.write(_cell("a", "failed"))
        assert Claims(store).take("a") is Claim.STORED
        again = Claims(store, retry_failed=True)
        assert again.take("a") is Claim.MINE
        store.offer(_cell("a", "failed", started="2999-01-01T00:00:00+00:00"))
        assert again.take("a") is Claim.STORED


def test_an_older_store_gets_its_table_of_claims(path: Path) -> None:
    with Store(path) as store:
        assert not store.claimed
        Claims(store)
        assert store.claimed
    with Store(path) as store:
        assert store.statuses() == {}


class _Others:
    """A desk at which another run has some cells."""

    def __init__(self, **claims: Claim) -> None:
        self.claims = claims

    def take(self, key: str) -> Claim:
        return self.claims.get(key, Claim.MINE)

    def release(self, key: str) -> None: ...

    def beat(self) -> None: ...


def test_a_queue_comes_back_to_what_others_had() -> None:
    desk = _Others(a=Claim.TAKEN, b=Claim.STORED)
    queue = Queue([cell(key) for key in "abc"], desk)
    taken = queue.take()
    assert taken is not None and taken.key == "c"
    assert queue.take() is None and len(queue) == 1, "b is stored, a another's"
    del desk.claims["a"]
    queue.trained(taken)
    end = time.monotonic() + 5
    while (taken := queue.take()) is None and time.monotonic() < end:
        time.sleep(0.05)
    assert taken is not None and taken.key == "a"
