"""Bundles: published, merged, verified; and refused or found out where somebody changed them."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

import pytest
import yaml

from gradleak import registry
from gradleak.board.bundle import MANIFEST, STORE, open_all, publish
from gradleak.board.results import read
from gradleak.board.store import Store
from gradleak.cli.main import main
from gradleak.errors import GradleakError
from gradleak.evaluation.verify import verify
from gradleak.evaluation.workshop import Resources

SUITE = {
    "name": "tiny",
    "victims": 2,
    "candidates": 10,
    "engine": {"backend": "sequential"},
    "knowledge": ["oblivious"],
    "controls": "listed",
    "datasets": ["digits"],
    "models": [{"mlp": {"widths": [8]}}],
    "settings": [{"name": "fedsgd", "grants": {"labels": "known"}}],
    "attacks": ["linear-leakage", {"inverting-gradients": {"iterations": 3}}, "mean-image"],
    "defenses": ["none"],
}
RESOURCES = Resources()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(SUITE))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADLEAK_CACHE", str(folder / "cache"))
        patch.setattr(registry, "_files", {})
        path = folder / "tiny.sqlite"
        assert main(["run", str(folder / "tiny.yaml"), "--store", str(path), "--executor", "local"]) == 0
    return path


@pytest.fixture
def bundle(store: Path, tmp_path: Path) -> Path:
    publish(store, tmp_path / "bundle.zip")
    return tmp_path / "bundle.zip"


def test_a_bundle_holds_the_store_and_is_the_same_twice(bundle: Path, store: Path, tmp_path: Path) -> None:
    manifest = publish(store, tmp_path / "again.zip")
    assert (manifest["cells"], manifest["failed"], manifest["images"]) == (3, 0, 6)
    assert bundle.read_bytes() == (tmp_path / "again.zip").read_bytes()
    with open_all([bundle]) as (packed,), Store(store) as original:
        assert read(packed).rows.equals(read(original).rows)


def test_stores_and_bundles_are_read_together(bundle: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["leaderboard", str(store), "--format", "csv"]) == 0
    alone = capsys.readouterr().out
    assert main(["leaderboard", str(bundle), str(store), "--format", "csv"]) == 0
    assert capsys.readouterr().out == alone


def test_a_published_bundle_is_never_overwritten(bundle: Path, store: Path) -> None:
    before = bundle.read_bytes()
    with pytest.raises(GradleakError, match="already exists"):
        publish(store, bundle)
    assert bundle.read_bytes() == before


def test_nothing_is_not_published(tmp_path: Path) -> None:
    Store(tmp_path / "empty.sqlite", create=True).close()
    with pytest.raises(GradleakError, match="no finished cell"):
        publish(tmp_path / "empty.sqlite", tmp_path / "b.zip")
    assert not (tmp_path / "b.zip").exists()


def rewritten(bundle: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(bundle) as opened:
        content = {name: opened.read(name) for name in opened.namelist()}
    path = bundle.with_name("rewritten.zip")
    with zipfile.ZipFile(path, "w") as opened:
        for name, data in {**content, **{name.replace("__", "."): data for name, data in members.items()}}.items():
            opened.writestr(name, data)
    return path


def test_a_tampered_bundle_is_refused(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with zipfile.ZipFile(bundle) as opened:
        content, manifest = opened.read(STORE), json.loads(opened.read(MANIFEST))
    assert manifest["sha256"] == {STORE: hashlib.sha256(content).hexdigest()}
    changed = rewritten(bundle, store__sqlite=content[:-1] + bytes([content[-1] ^ 1]))
    for command in (["verify"], ["leaderboard"]):
        assert main([*command, str(changed)]) == 2
        assert "was changed" in capsys.readouterr().err


def test_what_is_no_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(GradleakError, match=r"holds extra\.txt"):
        verify(rewritten(bundle, extra__txt=b""), RESOURCES)
    with pytest.raises(GradleakError, match="is not of format 1"):
        verify(rewritten(bundle, manifest__json=b'{"format": 2}'), RESOURCES)
    (tmp_path / "text.zip").write_text("no bundle")
    with pytest.raises(GradleakError, match="cannot be read"):
        verify(tmp_path / "text.zip", RESOURCES)
