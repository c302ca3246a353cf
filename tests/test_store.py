from __future__ import annotations

import dataclasses
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from gradleak.board.codec import pack, unpack
from gradleak.board.store import SCHEMA, Array, CellResult, ImageRow, Store, late_progress, victim_list
from gradleak.errors import GradleakError
from gradleak.scales import METRICS

CONFIG = {
    "attack": {"name": "dlg", "label": "dlg(lr=1)", "options": {"lr": 1.0}},
    "defense": {"name": "none", "options": {}},
    "model": {"name": "mlp", "options": {}},
    "dataset": {"name": "digits", "options": {}, "version": "3", "digest": "abc"},
    "setting": {"name": "batch", "batch_size": 2},
    "knowledge": "public",
    "victims": 1,
    "seed": 3,
    "suite": {"name": "quick", "version": 1},
}
IMAGES = np.random.default_rng(0).random((2, 3, 4, 4)).astype(np.float32)


def finished(key: str = "a" * 32, psnr: float | None = 20.5) -> CellResult:
    rows = [
        ImageRow(victim=0, image=0, psnr=psnr, reidentified=True, loss=0.25, iterations=7),
        ImageRow(victim=0, image=1, psnr=psnr, reidentified=False, extras={"layer": "conv1", "ratio": np.nan}),
    ]
    return CellResult(
        key=key,
        config=CONFIG,
        rows=rows,
        seconds=1.5,
        device="cpu",
        versions={"gradleak": "0.1.0"},
        provenance={"attack_family": "optimisation", "bytes": np.int64(12)},
        reconstructions={0: IMAGES},
        traces={0: np.linspace(1, 0, 11)},
    )


def failed(key: str = "f" * 32) -> CellResult:
    return CellResult(key=key, config=CONFIG, status="failed", error="RuntimeError: no")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results.sqlite"


def test_what_is_written_is_read(path: Path) -> None:
    with Store(path, create=True) as store:
        store.write(finished())
        assert store.has("a" * 32) and not store.has("b" * 32)
    with Store(path) as store:
        rows, cells = store.rows(), store.cells()
        assert store.reconstruction("a" * 32, 0).tobytes() == IMAGES.tobytes()
        assert store.trace("a" * 32, 0).tolist() == np.linspace(1, 0, 11).tolist()
    assert cells.loc[0, "config"] == CONFIG
    assert cells.loc[0, "provenance"] == {"attack_family": "optimisation", "bytes": 12}
    labels = {"attack": "dlg(lr=1)", "attack_name": "dlg", "attack_family": "optimisation", "defense": "none"}
    labels |= {"setting": "batch", "knowledge": "public", "suite": "quick", "suite_version": "1"}
    assert {name: cells[name][0] for name in labels} == labels
    assert cells["seed"].tolist() == [3] and cells["batch_size"].tolist() == [2]
    assert rows["psnr"].tolist() == [20.5, 20.5]
    assert rows["reidentified"].tolist() == [1, 0]
    assert rows["lpips"].isna().all() and rows["lpips"].dtype == float
    assert rows["extras"].tolist() == ["{}", '{"layer": "conv1", "ratio": null}']
    assert rows["late_progress"].tolist() == pytest.approx([0.1, 0.1])
    assert rows["attack"].tolist() == ["dlg(lr=1)"] * 2


def test_every_metric_has_a_column() -> None:
    assert set(METRICS) <= {field.name for field in dataclasses.fields(ImageRow)}


def test_unknown_values_of_a_row_become_extras() -> None:
    row = ImageRow.of({"victim": 1, "image": 0, "psnr": 3.0, "mask_accuracy": 0.5})
    assert row == ImageRow(victim=1, image=0, psnr=3.0, extras={"mask_accuracy": 0.5})


def test_a_second_read_is_equal_and_order_of_writing_does_not_matter(tmp_path: Path) -> None:
    frames: list[pd.DataFrame] = []
    for name, keys in (("one", "abc"), ("two", "cab")):
        with Store(tmp_path / name, create=True) as store:
            for key in keys:
                store.write(finished(key * 32))
            frames += [store.rows(), store.rows()]
    for frame in frames[1:]:
        pd.testing.assert_frame_equal(frames[0], frame)


def test_an_empty_store_has_empty_tables(path: Path) -> None:
    with Store(path, create=True) as store:
        assert store.statuses() == {}
        assert len(store.rows()) == len(store.cells()) == 0
        assert "psnr" in store.rows() and "attack" in store.cells()


def test_a_failed_cell_is_replaced_and_a_finished_one_never(path: Path) -> None:
    with Store(path, create=True) as store:
        store.write(failed("a" * 32))
        assert not store.has("a" * 32) and store.statuses() == {"a" * 32: "failed"}
        store.write(finished())
        assert store.statuses() == {"a" * 32: "ok"}
        with pytest.raises(GradleakError, match="is there already"):
            store.write(finished(psnr=99))
        with pytest.raises(GradleakError, match="is there already"):
            store.write(failed("a" * 32))
        assert store.rows()["psnr"].tolist() == [20.5, 20.5]


def test_failed_cells_can_be_deleted(path: Path) -> None:
    with Store(path, create=True) as store:
        store.write(failed())
        store.write(finished())
        assert store.delete_failed() == 1
        assert store.statuses() == {"a" * 32: "ok"}
        assert store.delete_failed() == 0


def test_a_cell_is_written_whole_or_not_at_all(path: Path) -> None:
    twice = dataclasses.replace(finished(), rows=[ImageRow(victim=0, image=0)] * 2)
    with Store(path, create=True) as store:
        store.write(failed("a" * 32))
        with pytest.raises(sqlite3.IntegrityError):
            store.write(twice)
        # The failed cell that the write would have replaced is back too.
        assert store.statuses() == {"a" * 32: "failed"}
        assert len(store.rows()) == 0
        store.write(finished())


def test_a_status_outside_the_list_is_refused(path: Path) -> None:
    odd = dataclasses.replace(finished(), rows=[ImageRow(victim=0, image=0, status="fine")])
    with Store(path, create=True) as store, pytest.raises(GradleakError, match="row status 'fine'"):
        store.write(odd)


def test_victims_are_kept_once(path: Path) -> None:
    name = victim_list(CONFIG)
    assert name == "digits/3/abc/evaluation/2"
    assert victim_list({**CONFIG, "dataset": {"name": "digits", "version": "4", "digest": "abc"}}) != name
    labels = np.array([[4, 2]])
    with Store(path, create=True) as store:
        store.write_victims(name, IMAGES[None], labels)
        store.write_victims(name, np.zeros((2, *IMAGES.shape), np.float32), np.array([[0, 0], [1, 1]]))
        assert store.victim_lists() == [name]
        images, found = store.truth(name, 0)
        assert np.array_equal(images, IMAGES) and found.tolist() == [4, 2]
        assert store.truth(name, 1)[1].tolist() == [1, 1]
        with pytest.raises(GradleakError, match="no victim 2"):
            store.truth(name, 2)
        with pytest.raises(GradleakError, match="keeps no reconstruction of victim 5"):
            store.reconstruction("a" * 32, 5)


def test_parquet_carries_every_row_with_its_configuration(path: Path, tmp_path: Path) -> None:
    with Store(path, create=True) as store:
        store.write(finished())
        store.export_parquet(tmp_path / "rows.parquet")
        rows = store.rows()
    back = pd.read_parquet(tmp_path / "rows.parquet")
    assert back["psnr"].tolist() == rows["psnr"].tolist()
    assert set(rows.columns) < set(back.columns)
    assert '"digest": "abc"' in back["config"][0] and back["device"][0] == "cpu"


def test_bad_files_get_one_line(tmp_path: Path) -> None:
    missing, text, folder, foreign, old = (tmp_path / name for name in ("no", "text", "folder", "foreign", "old"))
    text.write_text("psnr, ssim\n" * 200)
    folder.mkdir()
    with sqlite3.connect(foreign) as database:
        database.execute("CREATE TABLE songs (name TEXT)")
    database.close()
    Store(old, create=True).close()
    with sqlite3.connect(old) as database:
        database.execute("UPDATE meta SET value = '0' WHERE name = 'schema'")
    database.close()
    for file, reason in (
        (text, "is not a SQLite file"),
        (folder, "is a folder"),
        (foreign, "not a store of gradleak"),
        (old, f"has schema 0, .* reads schema {SCHEMA}"),
        (tmp_path / "no" / "such" / "place", "cannot be opened|no such file"),
    ):
        before = file.read_bytes() if file.is_file() else b""
        for create in (False, True):
            with pytest.raises(GradleakError, match=reason) as error:
                Store(file, create=create)
            assert "\n" not in str(error.value) and str(file) in str(error.value)
        assert not file.is_file() or file.read_bytes() == before
    with pytest.raises(GradleakError, match="no such file"):
        Store(missing)
    assert not missing.exists()


def test_a_store_can_be_read_without_permission_to_write(path: Path) -> None:
    with Store(path, create=True) as store:
        store.write(finished())
    path.chmod(0o444)
    path.parent.chmod(0o555)
    try:
        with Store(path) as store:
            assert len(store.rows()) == 2
            if not os.access(path, os.W_OK):  # Root may write anywhere.
                with pytest.raises(GradleakError, match="cannot be written"):
                    store.write(finished("b" * 32))
    finally:
        path.parent.chmod(0o755)


def test_readers_see_whole_cells_while_a_writer_is_at_work(path: Path) -> None:
    with Store(path, create=True) as writer, Store(path) as reader:
        with writer.transaction():
            writer._insert_cell(finished())
            assert reader.statuses() == {}
        assert reader.statuses() == {"a" * 32: "ok"}


def test_killed_in_the_middle_of_a_cell_it_is_not_there(path: Path) -> None:
    script = f"""
        import os, signal
        from gradleak.board.store import CellResult, ImageRow, Store
        store = Store({str(path)!r}, create=True)
        config = {CONFIG!r}
        rows = [ImageRow(victim=0, image=0, psnr=1.0)]
        store.write(CellResult(key="a" * 32, config=config, rows=rows))
        with store.transaction():
            store._insert_cell(CellResult(key="b" * 32, config=config, rows=rows))
            os.kill(os.getpid(), signal.SIGKILL)
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert ended.returncode == -signal.SIGKILL
    with Store(path) as store:
        assert store.statuses() == {"a" * 32: "ok"}
        store.write(finished("b" * 32))
        assert len(store.rows()) == 3


def test_reading_needs_no_torch(path: Path) -> None:
    with Store(path, create=True) as store:
        store.write(finished())
    script = f"""
        import sys
        from gradleak import report
        from gradleak.board import flags, leaderboard, results, store
        found = results.read(store.Store({str(path)!r}))
        report.render([*leaderboard.boards(found), flags.flag_board(found)])
        sys.exit("torch" in sys.modules)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False).returncode == 0


@given(arrays.arrays(st.sampled_from(["f4", "f8", "u1", "i8"]), arrays.array_shapes(min_side=0)))
def test_arrays_survive_packing(array: Array) -> None:
    back = unpack(*pack(array))
    assert back.shape == array.shape and back.dtype == array.dtype and back.tobytes() == array.tobytes()


def test_late_progress_is_the_share_of_the_last_tenth() -> None:
    settled = np.exp(-np.arange(100.0))
    assert late_progress(settled) == pytest.approx(0, abs=1e-12)
    assert late_progress(np.linspace(1, 0, 101)) == pytest.approx(0.1)
    assert late_progress(np.arange(100.0)) is None
    assert late_progress(np.array([1.0, 0.5])) is None
    assert late_progress(np.array([np.nan] * 20)) is None
