"""Stores and bundles of strangers: refused in one line wherever they hold what no store holds."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import resource
import shutil
import signal
import sqlite3
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradleak.board import leaderboard, trust
from gradleak.board.bundle import MANIFEST, STORE, open_all, publish
from gradleak.board.results import read
from gradleak.board.schema import CLAIMS, SCHEMA
from gradleak.board.store import CellResult, ImageRow, Store, victim_list
from gradleak.cli.main import main
from gradleak.errors import GradleakError
from gradleak.paths import printable, written_whole
from gradleak.report import FORMATS, render
from tests import trials

IMAGES = np.full((2, 1, 1, 8, 8), 0.5, np.float32)


def _config(attack: str) -> dict[str, Any]:
    part = {"name": "x", "label": "x", "options": {}, "version": "1"}
    config = {axis: {**part, "name": axis, "label": axis} for axis in ("attack", "defense", "model", "dataset")}
    config["attack"] |= {"name": attack, "label": attack}
    return {**config, "setting": {"name": "s", "batch_size": 1}, "knowledge": "oblivious", "victims": 2, "seed": 0}


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("honest") / "s.sqlite"
    with Store(path, create=True) as store:
        store.write_victims(victim_list(_config("a")), IMAGES, np.zeros((2, 1), int))
        for attack, family, psnr in (("a", "optimisation", 20.0), ("b", "control", 10.0)):
            rows = [ImageRow(victim=victim, image=0, matched=0, psnr=psnr + victim, mse=0.1) for victim in range(2)]
            facts = {"attack_family": family, "defense_family": "none", "bytes": 10}
            images = dict(enumerate(IMAGES))
            store.write(
                CellResult(key=attack * 32, config=_config(attack), rows=rows, provenance=facts, reconstructions=images)
            )
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode = DELETE")
    return path


@pytest.fixture
def changed(honest: Path, tmp_path: Path) -> Callable[..., Path]:
    def change(*statements: str) -> Path:
        path = tmp_path / "changed.sqlite"
        shutil.copy(honest, path)
        with contextlib.closing(sqlite3.connect(path)) as database, database:
            database.execute("PRAGMA ignore_check_constraints = ON")
            for statement in statements:
                database.execute(statement)
        return path

    return change


def _board(path: Path) -> str:
    with open_all([path]) as opened:
        return render(leaderboard.boards(read(*opened)), "csv")


RECURSIVE = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c)"
HOSTILE = {
    "view": ["ALTER TABLE rows RENAME TO r", f"CREATE VIEW rows AS {RECURSIVE} SELECT r.* FROM r, c"],
    "trigger": ["CREATE TRIGGER t AFTER UPDATE ON cells BEGIN DELETE FROM rows; END"],
    "index": ["CREATE INDEX i ON rows (psnr)"],
    "table": ["CREATE TABLE more (x)"],
    "column": ["ALTER TABLE rows ADD COLUMN evil TEXT"],
    "generated": ["ALTER TABLE rows ADD COLUMN evil AS (psnr + 1)"],
    "no rows": ["DROP TABLE rows"],
    "no claims": ["CREATE TABLE claims (key TEXT)"],
    "config": ["UPDATE cells SET config = '{}'"],
    "config list": ["UPDATE cells SET config = '[]'"],
    "config text": ["UPDATE cells SET config = '{'"],
    "config deep": [f"UPDATE cells SET config = '{'[' * 50000}'"],
    "config blob": ["UPDATE cells SET config = x'ff00'"],
    "config number": [f"UPDATE cells SET config = '{'9' * 6000}'"],
    "nan": ["UPDATE cells SET provenance = replace(provenance, '10', 'NaN')"],
    "label": ["UPDATE cells SET config = json_set(config, '$.attack.label', json('[1]'))"],
    "long label": ["UPDATE cells SET config = json_set(config, '$.attack.label', hex(zeroblob(10000)))"],
    "seed": ["UPDATE cells SET config = json_set(config, '$.seed', 'x')"],
    "large seed": ["UPDATE cells SET config = replace(config, '\"seed\": 0', '\"seed\": 99999999999999999999999')"],
    "batch": ["UPDATE cells SET config = json_set(config, '$.setting.batch_size', 0)"],
    "epsilon": ["UPDATE cells SET provenance = json_set(provenance, '$.epsilon', json('{\"epsilon\": -1}'))"],
    "bytes": ["UPDATE cells SET provenance = json_set(provenance, '$.bytes', 'many')"],
    "accuracy": ["UPDATE cells SET provenance = json_set(provenance, '$.test_accuracy', 1.5)"],
    "versions": ["UPDATE cells SET versions = '\"x\"'"],
    "status": ["UPDATE cells SET status = 'fine'"],
    "seconds": ["UPDATE cells SET seconds = 'x'"],
    "row status": ["UPDATE rows SET status = 'fine'"],
    "psnr text": ["UPDATE rows SET psnr = '=cmd'"],
    "psnr": ["UPDATE rows SET psnr = 1e308"],
    "psnr infinite": ["UPDATE rows SET psnr = -9e999"],
    "mse": ["UPDATE rows SET mse = -1"],
    "victim": ["UPDATE rows SET victim = 4000000000 WHERE victim = 1"],
    "victim text": ["UPDATE rows SET victim = 'x' WHERE victim = 1"],
    "image": ["UPDATE rows SET image = 7"],
    "matched": ["UPDATE rows SET matched = 1"],
    "extras": ["UPDATE rows SET extras = '{'"],
    "failed": [
        "DELETE FROM rows",
        "UPDATE cells SET status = 'failed', config = json_set(config, '$.victims', 3000000)",
    ],
}


@pytest.mark.parametrize("statements", HOSTILE.values(), ids=HOSTILE)
def test_a_strangers_store_is_refused_at_once(changed: Callable[..., Path], statements: list[str]) -> None:
    path = changed(*statements)
    began = time.process_time()
    with pytest.raises(GradleakError) as error:
        _board(path)
    assert time.process_time() - began < 2
    assert str(path) in str(error.value) and len(str(error.value)) < 600 and "\n" not in str(error.value)


def test_an_honest_one_is_not(honest: Path) -> None:
    assert len(list(csv.DictReader(io.StringIO(_board(honest))))) >= 2


@pytest.mark.parametrize(
    "change",
    [
        "shape = '[1000000, 1000000]'",
        "shape = '[-1, -1]'",
        "shape = '[64]'",
        "shape = '{'",
        "dtype = '|O'",
        "dtype = '<U8'",
        "dtype = 'zzz'",
        "data = x'00'",
        "data = data || x'00'",
        "data = substr(data, 1, 9)",
        "data = 'text'",
    ],
)
def test_arrays_are_measured_before_they_are_made(changed: Callable[..., Path], change: str) -> None:
    with Store(changed(f"UPDATE blobs SET {change}", f"UPDATE victims SET {change}")) as store:
        with pytest.raises(GradleakError, match=r"reconstruction of victim 0|cannot be read"):
            store.reconstruction("a" * 32, 0)
        with pytest.raises(GradleakError, match=r"victim 0 of list|cannot be read"):
            store.truth(victim_list(_config("a")), 0)


def test_a_query_has_its_time(honest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "SECONDS", 0.2)
    with Store(honest) as store, pytest.raises(GradleakError, match="interrupted"):
        store.query(f"{RECURSIVE} SELECT count(*) FROM c")


def _bundle(path: Path, *members: tuple[str, bytes], link: bool = False) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name, content in members:
            info = zipfile.ZipInfo(name)
            info.external_attr = (0o120777 if link and name == STORE else 0o100644) << 16
            out.writestr(info, content, zipfile.ZIP_DEFLATED)
    return path


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_strangers_bundle_is_refused(honest: Path, tmp_path: Path) -> None:
    publish(honest, tmp_path / "good.zip")
    with zipfile.ZipFile(tmp_path / "good.zip") as opened:
        manifest, store = opened.read(MANIFEST), opened.read(STORE)
    facts = json.loads(manifest)

    def stating(content: bytes = store, **other: Any) -> bytes:
        return json.dumps({**facts, "sha256": {STORE: hashlib.sha256(content).hexdigest()}, **other}).encode()

    bomb = bytes(2 * 10**8)
    cases = {
        "holds": [(MANIFEST, manifest), (STORE, store), ("../../evil", b"x")],
        "holds ": [(MANIFEST, manifest), (STORE, store), (STORE, store)],
        "cannot be read": [(MANIFEST, b"[" * 200000), (STORE, store)],
        "cannot be read ": [(MANIFEST, b"\xff\xfe"), (STORE, store)],
        "field required": [(MANIFEST, f'{{"format": 1, "schema": {SCHEMA}}}'.encode()), (STORE, store)],
        "valid integer": [(MANIFEST, stating(cells="x")), (STORE, store)],
        "states 5 cells": [(MANIFEST, stating(cells=5)), (STORE, store)],
        "states 9 images": [(MANIFEST, stating(images=9)), (STORE, store)],
        "was changed": [(MANIFEST, manifest), (STORE, store[:-1] + b"x")],
        "at most": [(MANIFEST, stating(bomb)), (STORE, bomb)],
        "not a SQLite file": [(MANIFEST, stating(b"hello" * 100)), (STORE, b"hello" * 100)],
        "is empty": [(MANIFEST, stating(b"")), (STORE, b"")],
    }
    for reason, members in cases.items():
        path = _bundle(tmp_path / "bad.zip", *members)
        with pytest.raises(GradleakError, match=reason.strip()) as error:
            _board(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(GradleakError, match="not a regular file"):
        _board(_bundle(tmp_path / "link.zip", (MANIFEST, manifest), (STORE, store), link=True))
    assert not (tmp_path.parent / "evil").exists()


def test_claims_are_no_part_of_a_bundle(honest: Path, tmp_path: Path) -> None:
    shutil.copy(honest, tmp_path / "s.sqlite")
    publish(honest, tmp_path / "before.zip")
    with Store(tmp_path / "s.sqlite") as store, store.transaction() as database:
        database.execute(CLAIMS)
        database.execute("INSERT INTO claims VALUES ('a', 'me', 0)")
    publish(tmp_path / "s.sqlite", tmp_path / "after.zip")
    with open_all([tmp_path / "after.zip"]) as (store,):
        assert not store.claimed


def test_a_bundle_that_cannot_be_written_blocks_no_other(honest: Path, tmp_path: Path) -> None:
    def full() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    out = tmp_path / "b.zip"
    trial = trials.run(["publish", str(honest), "--out", str(out)], tmp_path / "log", full)
    assert trial.code == 2 and trial.said().count("\n") == 1, trial.said()
    assert [file.name for file in tmp_path.iterdir()] == ["log"]
    assert main(["publish", str(honest), "--out", str(out)]) == 0


LABELS = [
    "\x1b[31mred\x07",
    "=cmd|' /C calc'!A0",
    "+1",
    "@SUM(1)",
    "\t=1",
    "-2+3",
    "\u202egnp",
    "\x9b2J",
    "a\nb",
    "\u2028",
]


def test_labels_steer_no_terminal_and_no_spreadsheet(honest: Path, tmp_path: Path) -> None:
    for label in LABELS:
        path = tmp_path / "labels.sqlite"
        shutil.copy(honest, path)
        with contextlib.closing(sqlite3.connect(path)) as database, database:
            for part in ("attack", "defense", "model"):
                database.execute(f"UPDATE cells SET config = json_set(config, '$.{part}.label', ?)", (label,))
        with Store(path) as store:
            boards = leaderboard.boards(read(store))
        for form in FORMATS:
            text = render(boards, form)
            assert printable(text, keep="\n") == text, f"{form}: {label!r}"
        for line in csv.reader(io.StringIO(render(boards, "csv"))):
            assert not [value for value in line if value.startswith(("=", "+", "@", "\t", "-2"))]


def test_text_is_written_out_and_the_rest_left_alone() -> None:
    assert printable("psnr ≥ 20 · ε") == "psnr ≥ 20 · ε"
    assert printable("a\x1b[0m\nb", keep="\n") == "a\\x1b[0m\nb"


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with pytest.raises(RuntimeError), written_whole(path) as beside:
        beside.write_text("half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with written_whole(path) as beside:
        beside.write_text("whole")
    assert path.read_text() == "whole" and list(tmp_path.iterdir()) == [path]
