"""The program that measures label inference."""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from gradleak import registry
from gradleak.dataset import Data

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "papers" / "label_rules.py"


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("label_rules_program", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_batches_have_the_labels_they_are_said_to_have(program: ModuleType) -> None:
    stream = torch.Generator().manual_seed(0)
    data = Data(registry.build("datasets", "digits"), "digits")
    assert program.draw_labels("distinct", 7, 10, stream).unique().numel() == 7
    assert program.draw_labels("distinct", 25, 10, stream).bincount(minlength=10).tolist().count(3) == 5
    assert program.draw_labels("one class", 9, 10, stream).unique().numel() == 1
    labels = program.draw_labels("uniform", 64, 10, stream)
    images = program.draw_images(data, labels, stream)
    known = {tuple(image.flatten().tolist()): int(label) for image, label in zip(*_test(data), strict=True)}
    assert [known[tuple(image.flatten().tolist())] for image in images] == labels.tolist()
    assert len(images.flatten(1).unique(dim=0)) == 64


def test_rules_are_ordered_as_theory_says(program: ModuleType, tmp_path: Path) -> None:
    """Exact for one image; repeats cost the rules for distinct labels exactly what they cannot say."""
    torch.set_num_threads(1)
    options = Namespace(dataset="digits", models=["lenet"], batch_sizes=[1, 8, 16], batches=16, epochs=1)
    table = program.measure(options)
    share = table.set_index(["state", "labels", "batch_size", "rule"])["share"]
    single = table[(table["batch_size"] == 1) & (table["rule"] != "chance")]
    assert (single["share"] == 1).all() and set(single["rule"]) == set(program.label_rules.RULES)
    for state in ("untrained", "trained"):
        assert share[state, "one class", 8, "bias-sign"] == pytest.approx(1 / 8)
        assert share[state, "one class", 8, "bias-corrected"] == 1
        assert share[state, "uniform", 8, "bias-corrected"] > share[state, "uniform", 8, "bias-sign"] + 0.05
        assert share[state, "uniform", 8, "bias-corrected"] > share[state, "uniform", 8, "chance"] + 0.2
        assert (state, "uniform", 16, "yin") not in share.index
    assert ((table["low"] <= table["share"]) & (table["share"] <= table["high"])).all()
    program.draw(table, tmp_path / "label_rules")
    assert {path.suffix for path in tmp_path.iterdir()} == {".png", ".svg"}


def _test(data: Data) -> tuple[torch.Tensor, torch.Tensor]:
    return data.split.test.images, data.split.test.labels
