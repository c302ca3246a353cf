"""Bundles: published, merged, verified; and refused or found out where somebody changed them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sqlite3
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
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


@pytest.fixture
def forged(store: Path, tmp_path: Path) -> Callable[..., Path]:
    """Publish a store after changing it: what a careful cheat would send."""

    def make(statement: str, *values: object) -> Path:
        copy = tmp_path / "forged.sqlite"
        shutil.copy(store, copy)
        with contextlib.closing(sqlite3.connect(copy)) as database, database:
            assert database.execute(statement, values).rowcount > 0
        publish(copy, tmp_path / "forged.zip")
        return tmp_path / "forged.zip"

    return make


def differing(path: Path, sample: int = 0) -> dict[str, str]:
    return {found.check: found.detail for found in verify(path, RESOURCES, sample) if found.ok is False}


def test_an_honest_bundle_is_verified(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = verify(bundle, RESOURCES, sample=3)
    assert all(each.ok for each in found), found
    checks = {each.check: each.detail for each in found}
    assert checks["metrics"] == "6 images; largest difference 0 dB"
    again = [detail for check, detail in checks.items() if check.startswith("run again")]
    assert len(again) == 3 and all(detail.endswith("identical") for detail in again)
    assert main(["verify", str(bundle), "--sample", "0"]) == 0
    said = capsys.readouterr()
    assert "DIFFERS" not in said.out and said.err.endswith("bundle.zip: verified\n")


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
    with pytest.raises(GradleakError, match="is there already"):
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


def test_improved_numbers_are_found(forged: Callable[..., Path]) -> None:
    assert "psnr" in differing(forged("UPDATE rows SET psnr = psnr + 0.1 WHERE victim = 1"))["metrics"]


def test_missing_victims_are_found(forged: Callable[..., Path]) -> None:
    assert "rows" in differing(forged("DELETE FROM rows WHERE victim = 1"))


def test_scores_without_reconstructions_are_found(forged: Callable[..., Path]) -> None:
    path = forged("DELETE FROM blobs WHERE kind = 'reconstruction' AND victim = 0")
    assert "no reconstruction" in differing(path)["metrics"]


def test_other_options_are_found(forged: Callable[..., Path]) -> None:
    path = forged("UPDATE cells SET config = replace(config, '\"iterations\": 3', '\"iterations\": 4')")
    assert "keys" in differing(path)


def test_a_control_that_is_no_control_is_found(forged: Callable[..., Path]) -> None:
    path = forged("UPDATE cells SET provenance = replace(provenance, '\"optimisation\"', '\"control\"')")
    assert "attacks and defenses" in differing(path)


def test_other_images_are_found(forged: Callable[..., Path], store: Path) -> None:
    with Store(store) as opened:
        (name,) = opened.victim_lists()
        images, _ = opened.truth(name, 0)
    statement = "UPDATE victims SET data = (SELECT data FROM victims WHERE victim = 1) WHERE victim = 0"
    assert np.isfinite(images).all() and "victims" in differing(forged(statement))


def test_forged_reconstructions_are_found_by_running_again(forged: Callable[..., Path], store: Path) -> None:
    """Reconstructions and scores that agree with each other, but that no attack ever made."""
    with Store(store) as opened:
        cells = opened.cells()
    leaky, weak = (cells[cells["attack_name"] == name]["id"].item() for name in ("linear-leakage", "mean-image"))
    statement = (
        "UPDATE blobs SET data = (SELECT b.data FROM blobs b WHERE b.cell = ? AND b.victim = blobs.victim"
        " AND b.kind = 'reconstruction') WHERE cell = ? AND kind = 'reconstruction'"
    )
    path = forged(statement, leaky, weak)
    with contextlib.closing(sqlite3.connect(path.with_name("forged.sqlite"))) as database, database:
        for name in ("matched", "mse", "psnr", "ssim", "lpips_64", "reidentified"):
            database.execute(
                f"UPDATE rows SET {name} = (SELECT r.{name} FROM rows r WHERE r.cell = ? AND r.victim = rows.victim)"
                " WHERE cell = ?",
                (leaky, weak),
            )
    path.unlink()
    publish(path.with_name("forged.sqlite"), path)
    assert differing(path) == {}
    assert [name for name in differing(path, sample=3) if name.startswith("run again")]


def test_an_absent_dataset_is_said_and_not_called_verified(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build = registry.build

    def without_digits(group: str, name: str, *rest: object) -> object:
        if group == "datasets":
            raise GradleakError("not on this machine")
        return build(group, name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(registry, "build", without_digits)
    found = {each.check: each.ok for each in verify(bundle, RESOURCES)}
    assert found["victims"] is None and found["metrics"] is None
    assert not [name for name in found if name.startswith("run again")]
    assert main(["verify", str(bundle)]) == 0
    assert "2 of" in capsys.readouterr().err
