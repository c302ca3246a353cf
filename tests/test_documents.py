"""What documents tell to type is typed here, in order, on real files; by `make test-docs` the long ones too."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from gradleak import registry
from gradleak.cli.main import main
from gradleak.dataset import Data
from tests.documents import NAMES, PAGES, ROOT, blocks, run

NOT_RUN = Counter(
    {"README.md": 2, "docs/cluster.md": 2, "docs/lpips.md": 2, "docs/tuning.md": 1, "docs/tutorial.md": 1}
)
"""How many blocks of a page cannot be run: a device, a cluster, the package index, the home folder."""
LONG = {"docs/plugins.md", "docs/tuning.md"}
"""Pages that take about twenty seconds each; their commands have tests of their own besides."""
CAPTURED = {"my-images": "my-images", "labels.csv": "labels.csv", "my_models.py": "my_models.py"}
CAPTURED |= {"sent.safetensors": "sent.safetensors", "gradient.safetensors": "gradient.safetensors"}
TAKEN_FOR_GRANTED = {
    "README.md": CAPTURED,
    "docs/audit.md": CAPTURED,
    "docs/board.md": {"results.sqlite": "mine.sqlite"},
    "docs/datasets.md": {"data/my-images": "my-images"},
    "docs/plugins.md": {"mine.yaml": "mine.yaml"},
    "docs/store.md": {"mine.sqlite": "mine.sqlite", "damaged.sqlite": "damaged.sqlite", "mine.yaml": "mine.yaml"},
}
"""Files that a page speaks of without making them, and which of the fixture's they are."""
SUITE = """
name: kept
victims: 2
datasets: [digits]
models: [{mlp: {widths: [16]}}]
settings: [{grants: {labels: known}}]
attacks: [linear-leakage, mean-image]
defenses: [none, {gaussian-noise: {sigma: 0.5, clip: 1.0}}]
"""


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the documents take for granted: photographs, a model, its update, a suite and its store."""
    place = tmp_path_factory.mktemp("kept")
    split = Data(registry.build("datasets", "photos"), "photos").split
    chosen = torch.arange(0, len(split.test), len(split.test) // 64)[:64]
    images, numbers = split.test.images[chosen], split.test.labels[chosen].tolist()
    for number, (image, label) in enumerate(zip(images, numbers, strict=True)):
        file = place / "my-images" / split.classes[label] / f"{number:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)).save(file)
    lines = [f"{split.classes[label]}/{number:02}.png,{label}" for number, label in enumerate(numbers)]
    (place / "labels.csv").write_text("\n".join(["file,label", *lines]))
    (place / "my_models.py").write_text(
        "from torch import nn\n\n\ndef build():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 16), nn.ReLU(), nn.Linear(16, 10))\n"
    )
    _capture(images[:1], numbers[0], place)
    (place / "mine.yaml").write_text(SUITE)
    assert main(["run", str(place / "mine.yaml"), "--store", str(place / "mine.sqlite"), "--workers", "1"]) == 0
    pages = bytearray((place / "mine.sqlite").read_bytes())
    at = pages.rindex(b'"attack"')  # the last cell's own line
    pages[at - 20 : at + 20] = bytes(40)
    (place / "damaged.sqlite").write_bytes(pages)
    return place


def _capture(images: torch.Tensor, label: int, place: Path) -> None:
    """Save what a server sent, and the gradient that one client sent back."""
    layers = torch.nn.Linear(3 * 32 * 32, 16), torch.nn.Linear(16, 10)
    model = torch.nn.Sequential(torch.nn.Flatten(), layers[0], torch.nn.ReLU(), layers[1])
    loss = torch.nn.functional.cross_entropy(model(images), torch.tensor([label]))
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    save_file(model.state_dict(), place / "sent.safetensors")
    save_file(dict(zip(model.state_dict(), gradient, strict=True)), place / "gradient.safetensors")


def _place(page: str, kept: Path, place: Path) -> None:
    """Put into a folder what somebody has who has read so far: a checkout, and the files that the page speaks of."""
    for name in ("benchmarks", "examples", "results"):
        (place / name).symlink_to(ROOT / name)
    for name, source in TAKEN_FOR_GRANTED.get(page, {}).items():
        (place / name).parent.mkdir(exist_ok=True)
        copy = shutil.copytree if (kept / source).is_dir() else shutil.copy
        copy(kept / source, place / name)


@pytest.mark.parametrize("page", [pytest.param(each, marks=[pytest.mark.documents] * (each in LONG)) for each in NAMES])
def test_what_a_page_tells_to_type_runs(
    page: str, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _place(page, kept, tmp_path)
    monkeypatch.chdir(tmp_path)
    run(ROOT / page, tmp_path)


def test_few_blocks_are_not_run_and_each_says_why() -> None:
    marked = [block for page in PAGES for block in blocks(page) if block.mark]
    left_out = [block for block in marked if block.not_run]
    assert Counter(block.page for block in left_out) == NOT_RUN, [(block.page, block.not_run) for block in left_out]
    for block in marked:
        assert block.not_run or block.reduced != block.text, f"{block.page}: <!-- {block.mark} -->"


def test_no_command_hides_outside_of_a_block() -> None:
    for page in PAGES:
        found = re.findall(r"^ {4}(?:\$ )?(?:gradleak|make|pip|pytest|python) .*$", page.read_text(), re.MULTILINE)
        assert not found, f"{page.name}: {found[0].strip()}: put it into a fenced block, which is run"


def test_a_wrong_command_is_noticed(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same page with an option, a column, an attack and a name that there are not."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "board.md").read_text(encoding="utf-8")
    wrong = {
        "--format csv": "--form csv",
        "rank,defense": "rank,defence",
        "gradleak report": "gradleak reports",
        "leaderboard results.sqlite   ": "leaderboard absent.sqlite   ",
        "```sh\ngradleak": "```sh\nmake gradleak",
    }
    _place("docs/board.md", kept, tmp_path)
    for right, mistake in wrong.items():
        assert right in page
        (tmp_path / "board.md").write_text(page.replace(right, mistake), encoding="utf-8")
        with pytest.raises(AssertionError, match="board"):
            run(tmp_path / "board.md", tmp_path)


def test_a_mark_that_no_longer_fits_is_noticed(tmp_path: Path) -> None:
    text = "<!-- run with: victims: 1 instead of victims: 16 -->\n```yaml\n# a.yaml\nvictims: 8\n```\n"
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(AssertionError, match="has no 'victims: 16'"):
        run(tmp_path / "page.md", tmp_path)
