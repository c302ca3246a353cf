"""A finished suite is answered without planning, and never wrongly."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gradleak import installation, registry
from gradleak.board import finished
from gradleak.board.store import Store

SUITE = """
name: tiny
victims: 2
candidates: 4
controls: listed
knowledge: [oblivious]
datasets: [digits]
models: [{name: mlp, options: {widths: [4]}}]
settings: [{name: s, grants: {labels: known}}]
attacks: [mean-image, {name: idlg, options: {iterations: 2}}]
defenses: [none]
"""


PROGRAM = (
    "import sys\nfrom gradleak.cli.main import main\n"
    "print(main(['run', *sys.argv[1:], '--executor', 'local']), bool({'torch', 'pandas'} & set(sys.modules)))\n"
)


def _run(suite: Path, store: Path) -> tuple[str, str]:
    """Run the suite in a program of its own; return its exit code, whether it imported torch, and its last line."""
    command = [sys.executable, "-c", PROGRAM, str(suite), "--store", str(store)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip(), done.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A suite and the store that finished it."""
    folder = tmp_path_factory.mktemp("finished")
    suite, store = folder / "tiny.yaml", folder / "tiny.sqlite"
    suite.write_text(SUITE)
    said, line = _run(suite, store)
    assert said == "0 True" and "2 cells: 2 run, 0 stored already, 0 failed" in line
    return suite, store


@pytest.fixture
def ready(made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Copies of them in a folder of their own that are known to be finished."""
    monkeypatch.setattr(registry, "_files", {})
    monkeypatch.setenv("GRADLEAK_CACHE", str(tmp_path / "cache"))
    suite, store = (Path(shutil.copy(path, tmp_path)) for path in made)
    _remember(suite, store)
    assert _known(suite, store) == 2
    return suite, store


def _remember(suite: Path, store: Path) -> bool:
    watch = finished.watch(suite)
    assert watch is not None
    with Store(store) as opened:
        keys = list(opened.statuses())
    return finished.remember(store, watch, finished.watch(suite), keys)


def _known(suite: Path, store: Path, root: Path | None = None) -> int | None:
    watch = finished.watch(suite, root)
    return None if watch is None else finished.known(store, watch)


def test_the_second_run_needs_no_torch(made: tuple[Path, Path]) -> None:
    said, line = _run(*made)
    assert said == "0 False" and "2 cells: 0 run, 2 stored already, 0 failed" in line


def test_an_edited_suite_is_planned_again(ready: tuple[Path, Path]) -> None:
    suite, store = ready
    suite.write_text(SUITE.replace("iterations: 2", "iterations: 3"))
    assert _known(suite, store) is None
    suite.write_text(SUITE)
    assert _known(suite, store) == 2


def test_another_store_secret_or_version_of_it_is_planned_again(ready: tuple[Path, Path], tmp_path: Path) -> None:
    suite, store = ready
    other = Path(shutil.copy2(store, tmp_path / "other.sqlite"))
    assert _known(suite, other) is None, "another file"
    store.unlink()
    assert _known(suite, store) is None, "no file"
    shutil.copy2(other, store)
    assert _known(suite, store) is None, "a file that was put in its place, of the same size and time"


def test_a_store_that_was_changed_is_planned_again(ready: tuple[Path, Path]) -> None:
    suite, store = ready
    with Store(store) as opened:
        (key, *_) = opened.statuses()
        with opened.transaction() as database:
            database.execute("UPDATE cells SET status = 'failed' WHERE key = ?", (key,))
        assert _known(suite, store) is None, "while the change is in the log"
    assert _known(suite, store) is None
    watch = finished.watch(suite)
    assert watch is not None
    with Store(store) as opened:
        keys = list(opened.statuses())
    assert finished.remember(store, watch, watch, keys)
    assert _known(suite, store) is None, "what is remembered must be there, and no failure"
    with Store(store) as opened:
        opened.delete_failed()
    assert finished.remember(store, watch, watch, keys)
    assert _known(suite, store) is None, "a missing cell"


def test_a_change_while_it_ran_is_not_remembered(ready: tuple[Path, Path]) -> None:
    suite, store = ready
    before = finished.watch(suite)
    assert before is not None
    suite.write_text(SUITE.replace("victims: 2", "victims: 3"))
    suite.write_text(SUITE)
    assert not finished.remember(store, before, finished.watch(suite), ["a"]), "changed, and changed back"


def test_other_code_packages_or_data_are_planned_again(
    ready: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite, store = ready
    assert _known(suite, store, tmp_path) is None, "another data root"
    for name in ("gradleak/engine/loop.py", "attacks/idlg.py", "defenses/none.py"):
        assert (Path(__file__).parents[1] / name).resolve() in installation.own_files()
    with monkeypatch.context() as patch:
        package = tmp_path / "site" / "thing-1.0.dist-info"
        package.mkdir(parents=True)
        patch.syspath_prepend(str(package.parent))
        assert _known(suite, store) is None, "another package, or another place to look for them"
        assert _remember(suite, store) and _known(suite, store) == 2
        os.utime(package, ns=(1, 1))
        assert _known(suite, store) is None, "the same version, installed anew"
        package.rename(package.with_name("thing-1.1.dist-info"))
        assert _known(suite, store) is None, "another version"
    with monkeypatch.context() as patch:
        own = installation.own_files()
        edited = tmp_path / own[0].name
        edited.write_bytes(own[0].read_bytes() + b"\n# edited\n")
        patch.setattr(installation, "own_files", lambda: [edited, *own[1:]])
        assert _known(suite, store) is None, "a file of gradleak was edited"


def test_a_file_that_an_option_names_is_looked_at(
    ready: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite, store = ready
    named = SUITE.replace("tiny\n", "./facts.txt\n", 1).replace("name: ./facts.txt", "name: tiny")
    suite.write_text(named.replace("name: s,", "name: ./facts.txt,"))
    monkeypatch.chdir(tmp_path)
    assert _remember(suite, store) and _known(suite, store) == 2
    (tmp_path / "facts.txt").write_text("one")
    assert _known(suite, store) is None, "it is there now"
    assert _remember(suite, store) and _known(suite, store) == 2
    (tmp_path / "facts.txt").write_text("two")
    assert _known(suite, store) is None, "it was edited"


def test_nothing_is_remembered_of_what_cannot_be_seen(ready: tuple[Path, Path], tmp_path: Path) -> None:
    suite, _ = ready
    for change in (
        ("datasets: [digits]", "datasets: [{name: folder, options: {path: images}}]"),
        ("datasets: [digits]", "datasets: [mnist]"),  # which is not here
        ("name: s,", "name: s, client: {sgd: {loss: 'module:function'}},"),
        ("name: tiny", "name: tiny\nprior: {source: 'module:function'}"),
    ):
        suite.write_text(SUITE.replace(*change))
        assert finished.watch(suite) is None, change
    suite.write_text(SUITE)
    plugin = tmp_path / "mine.py"
    plugin.write_text((Path(registry.folders("defenses")[-1]) / "none.py").read_text())
    registry.add_file(plugin)
    assert finished.watch(suite) is None, "a plugin file, and all that it imports"


def test_the_data_root_is_looked_at(tmp_path: Path) -> None:
    suite, root = tmp_path / "tiny.yaml", tmp_path / "data"
    suite.write_text(SUITE.replace("datasets: [digits]", "datasets: [mnist]"))
    (root / "MNIST").mkdir(parents=True)
    (root / "MNIST" / "raw").write_bytes(b"1")
    first = finished.watch(suite, root)
    (root / "MNIST" / "raw").write_bytes(b"2")
    second = finished.watch(suite, root)
    assert first is not None and second is not None and first.state != second.state
    (root / "more").symlink_to(tmp_path)
    assert finished.watch(suite, root) is None, "a linked folder may hold anything"
