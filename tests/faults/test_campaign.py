"""The long campaign: kills, writers, disks, plugins and fuzz, as long as `GRADLEAK_FAULTS` says (1 is an hour or so).

Each test prints a line of figures for docs/reliability.md.
"""

from __future__ import annotations

import contextlib
import copy
import os
import random
import resource
import shutil
import signal
import sqlite3
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from gradleak.board.bundle import open_all, publish
from gradleak.board.results import read
from gradleak.errors import GradleakError
from gradleak.suite import read as read_suite
from tests import trials
from tests.test_limits import ENDS, check_run

pytestmark = [pytest.mark.faults, pytest.mark.timeout(0)]

SHARE = float(os.environ.get("GRADLEAK_FAULTS", "1"))
KILLS = {"local": 120, "processes": 60, "ray": 20}
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGSTOP)
WHO = {"local": ("driver", "workers", "both"), "processes": ("driver", "workers", "both"), "ray": ("driver",)}
SPAN = {"local": 3.0, "processes": 12.0, "ray": 25.0}
"""Seconds in which a run is disturbed."""


def many(number: int) -> int:
    """Return how many trials of the full campaign this one has."""
    return max(1, round(SHARE * number))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    path = folder / "s.sqlite"
    trial = trials.run(["run", str(trials.suite(folder)), "--store", str(path), "--executor", "local"], folder / "log")
    assert trial.code == 0, trial.said()
    return path


def _disturb(trial: trials.Trial, who: str, number: signal.Signals, rng: random.Random) -> None:
    workers = trials.descendants(trial.pid)
    victims = {"driver": [trial.pid], "workers": workers and [rng.choice(workers)], "both": [trial.pid, *workers]}[who]
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    if number != signal.SIGSTOP:
        return
    time.sleep(rng.uniform(0, 1))
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, rng.choice((signal.SIGCONT, signal.SIGKILL)))
            os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("executor", ["local", "processes", "ray"])
def test_kills(executor: str, whole: Path, tmp_path: Path) -> None:
    if executor == "ray":
        pytest.importorskip("ray")
    rng, moments = random.Random(executor), Counter[str]()
    path = trials.suite(tmp_path)
    for number in range(many(KILLS[executor])):
        store, log = tmp_path / f"{number}.sqlite", tmp_path / f"{number}.log"
        arguments = ["run", str(path), "--store", str(store), "--executor", executor, "--secret", str(whole)]
        arguments += [] if executor == "local" else ["--workers", "2"]
        trial = trials.start(arguments, log)
        _wait_for(trial, store, rng, executor)
        before, began = trials.cells(store), trial.alive()
        who, sent = rng.choice(WHO[executor]), rng.choice(SIGNALS)
        if began:
            _disturb(trial, who, sent, rng)
        trial.wait()
        after = trials.cells(store)
        assert before.items() <= after.items(), f"trial {number}: cells are lost"
        assert set(after.values()) <= {"ok"}, f"trial {number}: a fault was stored as a result"
        moments[f"{who} {sent.name}" if began else "already over"] += 1
        again = trials.run(arguments, log)
        assert again.code == 0 and "Traceback" not in again.said(), again.said()
        assert len(trials.cells(store)) == 12
        assert trials.content(store) == trials.content(whole), f"trial {number}: another result"
        for file in tmp_path.glob(f"{number}.*"):
            file.unlink()
    print(f"\nkills, {executor}: {moments.total()} of which {dict(moments)}; none lost, none doubled, all equal")


def _wait_for(trial: trials.Trial, store: Path, rng: random.Random, executor: str) -> None:
    """Wait for a random moment: of time, or of cells in the store."""
    end = time.monotonic() + SPAN[executor] * rng.random()
    wanted = rng.choice((None, rng.randrange(12)))
    while trial.alive() and time.monotonic() < (end if wanted is None else end + 60):
        if wanted is not None and len(trials.cells(store)) >= wanted:
            return
        time.sleep(0.005)


@pytest.mark.parametrize("runs", [2, 4, 8])
def test_writers(runs: int, whole: Path, tmp_path: Path) -> None:
    path, store = trials.suite(tmp_path), tmp_path / "s.sqlite"
    arguments = ["run", str(path), "--store", str(store), "--executor", "local", "--secret", str(whole)]
    started = [trials.start(arguments, tmp_path / f"log{number}") for number in range(runs)]
    reads = 0
    while any(trial.alive() for trial in started):
        if trials.cells(store):
            reader = trials.run(["leaderboard", str(store), "--format", "csv"], tmp_path / "board")
            assert reader.code == 0, reader.said()
            reads += 1
        time.sleep(0.02)
    assert [trial.code for trial in started] == [0] * runs, [trial.said() for trial in started]
    ran = [int(trial.said().split(" cells: ")[1].split(" run")[0]) for trial in started]
    assert sum(ran) == 12 and trials.content(store) == trials.content(whole)
    print(f"\nwriters: {runs} runs computed {ran} of 12 cells; {reads} readers meanwhile, none failed")


@contextlib.contextmanager
def _small_disk(folder: Path, kilobytes: int) -> Iterator[bool]:
    """Mount a small file system, where this process may."""
    folder.mkdir()
    mounted = os.system(f"mount -t tmpfs -o size={kilobytes}k tmpfs {folder} 2> /dev/null") == 0
    try:
        yield mounted
    finally:
        if mounted:
            os.system(f"umount {folder}")


def test_full_disks(whole: Path, tmp_path: Path) -> None:
    rng, count = random.Random(0), 0
    path = trials.suite(tmp_path)
    for number in range(many(20)):
        with _small_disk(
            tmp_path / f"disk{number}", kilobytes := rng.choice((4, 8, 20, 40, 60, 90, 120, 160))
        ) as small:
            store = tmp_path / f"disk{number}" / "s.sqlite"
            arguments = ["run", str(path), "--store", str(store), "--executor", "local", "--secret", str(whole)]
            full = trials.run(arguments, tmp_path / f"{number}.log", None if small else _limited(1024 * kilobytes))
            said = full.said()
            assert "Traceback" not in said and full.code in (0, 2), said
            if small:
                os.system(f"mount -o remount,size=8m {store.parent}")
            again = trials.run(arguments, tmp_path / f"{number}.log")
            assert again.code == 0 and trials.content(store) == trials.content(whole), again.said()
            count += full.code == 2
    print(f"\nfull disks: {count} runs stopped in one line; every one went on to the same content")


def _limited(size: int) -> Callable[[], None]:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


def test_outputs_on_full_disks(whole: Path, tmp_path: Path) -> None:
    out, stopped = tmp_path / "bundle.zip", 0
    for size in (1, 2000, 20_000, 60_000):
        for command, made in (("publish", out), ("report", tmp_path / f"report{size}")):
            trial = trials.run([command, str(whole), "--out", str(made)], tmp_path / f"{size}.log", _limited(size))
            assert "Traceback" not in trial.said() and trial.code in (0, 2), trial.said()
            stopped += trial.code == 2
            if command == "publish":
                assert made.exists() == (trial.code == 0) and not list(tmp_path.glob(".bundle*"))
                made.unlink(missing_ok=True)
    assert stopped >= 6
    assert trials.run(["publish", str(whole), "--out", str(out)], tmp_path / "log").code == 0


@pytest.mark.parametrize("executor", ["local", "processes"])
def test_plugins(executor: str, tmp_path: Path) -> None:
    for number, how in enumerate(ENDS):
        folder = tmp_path / str(number)
        folder.mkdir()
        check_run(folder, [how], "--executor", executor, "--memory-limit", "0.5")
    print(f"\nplugins, {executor}: {len(ENDS)} kinds, every run went on and every cell ended as it should")


ODD: list[Any] = [
    *(
        None,
        True,
        -1,
        0,
        1e308,
        float("nan"),
        float("inf"),
        2**63,
        2**70,
        "",
        "x" * 5000,
        "\x00",
        "../..",
        "none + none",
    ),
    *("+", [], {}, [[]], {"": None}, {1: 2}, [None], "1e5", ".inf", {"name": []}, -0.0, "~", ["x"] * 50),
]


def _mutated(rng: random.Random, suite: Any) -> Any:
    suite = copy.deepcopy(suite)
    for _ in range(rng.randint(1, 3)):
        place = suite
        while isinstance(place, dict | list) and place:
            key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
            if rng.random() < 0.4 or not isinstance(place[key], dict | list) or not place[key]:
                place[key] = copy.deepcopy(rng.choice(ODD))
                break
            place = place[key]
    return suite


@contextlib.contextmanager
def _in_time(seconds: int) -> Iterator[None]:
    def late(number: int, frame: object) -> None:
        raise AssertionError("hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _tried(action: Callable[[], Any]) -> bool:
    with _in_time(60), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            action()
        except GradleakError as error:
            assert "\n" not in str(error).strip() or "suite" in str(error)
            return False
    return True


def test_fuzzed_suites(tmp_path: Path) -> None:
    rng, accepted = random.Random(0), 0
    path, count = tmp_path / "s.yaml", many(100_000)
    texts = [file.read_text() for file in Path("benchmarks").rglob("*.yaml")]
    suites = [found for text in texts if isinstance(found := yaml.safe_load(text), dict)]
    for file in Path("benchmarks").rglob("*.yaml"):
        _tried(lambda file=file: read_suite(file))  # type: ignore[misc]
    for _ in range(count):
        if rng.random() < 0.75:
            path.write_text(yaml.safe_dump(_mutated(rng, rng.choice(suites))))
        else:
            content = bytearray(rng.choice(texts).encode())
            for _ in range(rng.randint(1, 6)):
                content[rng.randrange(len(content))] = rng.choice(b":{}[]&*!|>-\"'\x00\xff\t\n%@`#,? 09a")
            path.write_bytes(content)
        accepted += _tried(lambda: read_suite(path))
    print(f"\nfuzz: {count} suites, {accepted} accepted; no traceback, no hang")


@pytest.mark.parametrize("kind", ["store", "bundle"])
def test_fuzzed_files(kind: str, whole: Path, tmp_path: Path) -> None:
    rng, counts, count = random.Random(kind), Counter[str](), many(100_000 if kind == "store" else 20_000)
    good, path = tmp_path / "good", tmp_path / "changed"
    if kind == "store":
        with contextlib.closing(sqlite3.connect(whole)) as database:
            database.execute("VACUUM INTO ?", (str(good),))
    else:
        publish(whole, good)
    content, expected = good.read_bytes(), _numbers(good)
    for _ in range(count):
        changed = bytearray(content)
        for _ in range(rng.randint(1, 8)):
            place = rng.randrange(len(changed) if rng.random() < 0.6 else min(len(changed), 4096))
            if rng.random() < 0.95:
                changed[place] = rng.randrange(256)
            else:
                del changed[max(place, 1) :]
        path.write_bytes(changed)
        if not _tried(lambda: _numbers(path)):
            counts["refused"] += 1
        else:
            counts["same" if _numbers(path) == expected else "changed"] += 1
    if kind == "bundle":
        assert not counts["changed"], "a bundle states what it holds"
    print(f"\nfuzz: {count} {kind}s, {dict(counts)}; no traceback, no hang")
    shutil.rmtree(tmp_path, ignore_errors=True)


def _numbers(path: Path) -> str:
    with open_all([path]) as opened:
        rows = read(*opened).rows
    return str(rows.drop(columns=["extras"]).to_csv())
