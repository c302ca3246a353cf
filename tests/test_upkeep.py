"""Checking, rescuing and pruning stores; and stores that are moved, emptied or copied in part."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from gradleak.board import store as stores
from gradleak.board.store import CellResult, ImageRow, Store, is_blank, victim_list
from gradleak.board.upkeep import check, prune, rescue
from gradleak.cli.main import main
from gradleak.errors import GradleakError

PART = {"name": "x", "label": "x", "options": {}}
CONFIG = {
    **dict.fromkeys(("attack", "defense", "model", "dataset"), PART),
    "setting": {"name": "s", "batch_size": 1},
    "victims": 2,
    "seed": 0,
}
IMAGES = np.random.default_rng(0).random((2, 1, 1, 16, 16)).astype(np.float32)
KEYS = [f"{number:032x}" for number in range(30)]


def cell(key: str) -> CellResult:
    rows = [ImageRow(victim=victim, image=0, psnr=float(int(key, 16))) for victim in range(2)]
    return CellResult(key=key, config=CONFIG, rows=rows, reconstructions=dict(enumerate(IMAGES)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with Store(tmp_path / "s.sqlite", create=True) as store:
        store.write_victims(victim_list(CONFIG), IMAGES, np.zeros((2, 1), int))
        for key in KEYS:
            store.write(cell(key))
    return tmp_path / "s.sqlite"


def test_a_sound_store_is_called_sound(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = path.read_bytes()
    assert all(each.ok for each in check(path))
    assert main(["store", "check", str(path)]) == 0
    assert "nothing is wrong" in capsys.readouterr().err and path.read_bytes() == before


def test_damage_is_found_and_the_rest_saved(path: Path, tmp_path: Path) -> None:
    rng, found = random.Random(0), 0
    for trial in range(6):
        damaged = tmp_path / f"damaged{trial}.sqlite"
        content = bytearray(path.read_bytes())
        page = 4096 * rng.randrange(8, len(content) // 4096)  # past the roots of the tables
        content[page : page + 4096] = rng.randbytes(4096)
        damaged.write_bytes(content)
        found += not all(each.ok for each in check(damaged))
        saved, lost = rescue(damaged, tmp_path / f"new{trial}.sqlite")
        assert damaged.read_bytes() == content, "the damaged file is not touched"
        assert saved >= 5 and saved + lost <= len(KEYS)
        assert all(each.ok for each in check(tmp_path / f"new{trial}.sqlite"))
        with Store(tmp_path / f"new{trial}.sqlite") as store, Store(path) as whole:
            mine, theirs = store.rows().set_index("key"), whole.rows().set_index("key")
            assert len(mine) == 2 * saved
            assert mine["psnr"].equals(theirs.loc[mine.index.unique(), "psnr"]), "no number is changed"
    assert found == 6


def test_nothing_is_overwritten_or_left_by_a_rescue_that_fails(path: Path, tmp_path: Path) -> None:
    with pytest.raises(GradleakError, match="already exists"):
        rescue(path, path)
    (tmp_path / "text").write_text("no store" * 1000)
    with pytest.raises(GradleakError, match=r"cannot be rescued|no cell"):
        rescue(tmp_path / "text", tmp_path / "new.sqlite")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["s.sqlite", "text"]


def test_cells_that_are_not_kept_are_dropped_with_all_they_had(path: Path) -> None:
    assert prune(path, lambda key, config: key < KEYS[10], dry_run=True) == KEYS[10:]
    assert prune(path, lambda key, config: key < KEYS[10]) == KEYS[10:]
    with Store(path) as store:
        assert sorted(store.statuses()) == KEYS[:10] and store.images() == 20
    assert all(each.ok for each in check(path))


@pytest.mark.parametrize("how", ["empty", "mode", "rollback"])
def test_what_a_killed_creation_leaves_is_a_new_store(tmp_path: Path, how: str) -> None:
    path = tmp_path / "s.sqlite"
    if how == "empty":
        path.touch()
    else:
        with contextlib.closing(sqlite3.connect(path)) as database:
            if how == "mode":
                database.execute("PRAGMA journal_mode = WAL")
            else:
                database.execute("PRAGMA user_version = 0")
    assert is_blank(path)
    with pytest.raises(GradleakError, match=r"is empty|holds no tables|no such file"):
        Store(path)
    with Store(path, create=True) as store:
        store.write(cell(KEYS[0]))
    assert not is_blank(path)


def test_the_main_file_alone_can_be_read_from_the_start(tmp_path: Path) -> None:
    with Store(tmp_path / "s.sqlite", create=True) as store:
        store.write(cell(KEYS[0]))
        shutil.copy(tmp_path / "s.sqlite", tmp_path / "copy.sqlite")
    with Store(tmp_path / "copy.sqlite") as store:
        assert set(store.statuses()) <= {KEYS[0]}


def test_and_holds_cells_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "CHECKPOINT", 0.0)
    with Store(tmp_path / "s.sqlite", create=True) as store:
        store.write(cell(KEYS[0]))
        shutil.copy(tmp_path / "s.sqlite", tmp_path / "copy.sqlite")
    with Store(tmp_path / "copy.sqlite") as store:
        assert set(store.statuses()) == {KEYS[0]}


def test_tables_in_a_log_that_was_not_copied_are_said_to_be_there(tmp_path: Path) -> None:
    path = tmp_path / "old.sqlite"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("CREATE TABLE meta (name TEXT)")
        shutil.copy(path, tmp_path / "copy.sqlite")
    with pytest.raises(GradleakError, match=r"they are in copy\.sqlite-wal, which was not copied"):
        Store(tmp_path / "copy.sqlite")


@pytest.mark.parametrize("how", ["moved", "deleted", "replaced", "log"])
def test_cells_of_a_store_that_is_taken_away_are_saved(path: Path, tmp_path: Path, how: str) -> None:
    store = Store(path)
    extra = "e" * 32
    store.write(cell("d" * 32))
    if how == "log":
        Path(f"{path}-wal").unlink()
    else:
        os.rename(path, tmp_path / "elsewhere.sqlite")
        if how == "deleted":
            (tmp_path / "elsewhere.sqlite").unlink()
        if how == "replaced":
            path.write_bytes(b"")
    with pytest.raises(GradleakError, match="was moved or deleted while in use; all its cells are saved in"):
        store.write(cell(extra))
    store.close()
    with Store(tmp_path / "s.saved-1.sqlite") as saved:
        assert set(saved.statuses()) == {*KEYS, "d" * 32, extra}


def test_devices_are_no_stores() -> None:
    for name in ("/dev/null", "/dev/full"):
        with pytest.raises(GradleakError, match="not a regular file"):
            Store(name, create=True)
