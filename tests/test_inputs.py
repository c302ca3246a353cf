"""Inputs that would end in a traceback, a hang or a killed process: one line each, before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from PIL import Image

from gradleak import suite
from gradleak.datasets import _tree
from gradleak.errors import GradleakError
from gradleak.evaluation import runner
from gradleak.evaluation.evaluate import evaluate
from gradleak.evaluation.workshop import Resources, Workshop

SUITE = {
    "name": "tiny",
    "victims": 1,
    "candidates": 2,
    "controls": "listed",
    "datasets": ["digits"],
    "models": [{"mlp": {"widths": [4]}}],
    "settings": [{"grants": {"labels": "known"}}],
    "attacks": ["mean-image"],
    "defenses": ["none"],
}


def _write(folder: Path, **changes: object) -> Path:
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump({**SUITE, **changes}))
    return path


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"models": [{"mlp": {"widths": [10**11]}}]}, "model 'mlp': its weights take"),
        ({"models": [{"mlp": {"widths": [10**18, 10**18]}}]}, "model 'mlp'"),
        ({"victims": 10**21}, "it has 299 for evaluation"),
        ({"candidates": 10**21}, "candidates asked for; it has"),
    ],
)
def test_what_is_too_large_is_refused_before_it_is_made(tmp_path: Path, changes: dict[str, object], says: str) -> None:
    with pytest.raises(GradleakError) as caught:
        runner.plan(_write(tmp_path, **changes), tmp_path / "x.sqlite", Resources())
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_device_without_numbers_is_refused() -> None:
    with pytest.raises(GradleakError, match="device 'meta' is not available") as caught:
        Resources(device="meta")
    assert "\n" not in str(caught.value)


def test_a_plugin_that_exits_fails_its_cell_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gradleak.attacks.mean_image import MeanImage

    def leave(*_: object) -> None:
        raise SystemExit(3)

    (cell,) = suite.expand(suite.read(_write(tmp_path)), Workshop().digest)
    monkeypatch.setattr(MeanImage, "reconstruct", leave)
    result = evaluate(cell, Workshop())
    assert result.status == "failed" and result.error.startswith("SystemExit: 3")


def test_a_picture_that_unpacks_to_too_much_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "bomb.png"
    Image.new("L", (64, 64)).save(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(GradleakError, match="cannot be read as an image") as caught:
        _tree._open(str(file), 8, 1)
    assert "\n" not in str(caught.value)
