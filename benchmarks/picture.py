"""Draws the picture of the front page: colour photographs, and what the worst attack gets of them under each defense.

python benchmarks/picture.py results/picture.png

Squares of six photographs that scikit-image and scikit-learn ship are the clients' images. gradleak runs the suite
below on them, no attack sees a public image, and the picture is drawn from its store.
"""

from __future__ import annotations

import sys
import tempfile
from importlib import resources
from pathlib import Path

import yaml
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from gradleak.board import results
from gradleak.board.results import HEADLINE, Results
from gradleak.board.store import Store
from gradleak.cli.main import app
from gradleak.pictures import Picture
from gradleak.report.figures import DOTS, SMALL, STYLE, WIDTH
from gradleak.report.gallery import Pictures

SIDE = 32
"""Pixels of an image's side."""
SQUARES = {
    "astronaut": ("skimage.data", "astronaut.png", [(128, 0, 352, 224), (0, 0, 512, 512)]),
    "cat": ("skimage.data", "chelsea.png", [(90, 10, 350, 270), (75, 0, 375, 300)]),
    "coffee": ("skimage.data", "coffee.png", [(130, 20, 510, 400), (190, 60, 470, 340)]),
    "flower": ("sklearn.datasets.images", "flower.jpg", [(150, 20, 530, 400), (213, 0, 640, 427)]),
    "pagoda": ("sklearn.datasets.images", "china.jpg", [(210, 20, 617, 427), (20, 120, 320, 420)]),
    "rocket": ("skimage.data", "rocket.jpg", [(190, 30, 490, 330), (213, 0, 640, 427)]),
}
"""By class: package, file, and the private squares (left, top, right, bottom)."""
VICTIMS = 5
"""The first of the dataset's frozen list, which is half of the squares; the other half is for tuning."""

SUITE = {
    "name": "picture",
    "victims": VICTIMS,
    "candidates": VICTIMS,
    "datasets": [{"name": "folder", "label": "photographs", "options": {"path": "photographs", "size": SIDE}}],
    "models": [{"name": "mlp", "label": "mlp", "options": {"widths": [32]}}],
    "settings": [{"name": "one image", "batch_size": 1, "grants": {"labels": "known"}}],
    "attacks": [
        {"name": "linear-leakage"},
        {"name": "inverting-gradients", "options": {"iterations": 300, "tv": 0.001}, "label": "inverting-gradients"},
        "mean-image",
    ],
    "defenses": [
        "none",
        {"name": "quantise", "options": {"bits": 8}, "label": "quantise 8 bits"},
        {"name": "top-k", "options": {"ratio": 0.1}, "label": "top-k 10 %"},
        {"name": "sketch", "options": {"ratio": 0.1}, "label": "sketch 10 %"},
        {"name": "sign", "label": "sign"},
        {"name": "gaussian-noise", "options": {"sigma": 0.003}, "label": "noise 0.003"},
        {"name": "dp-sgd", "options": {"sigma": 0.6}, "label": "dp-sgd"},
    ],
}


def squares(folder: Path) -> None:
    """Write the private squares, and as a public one the upper left corner of each photograph."""
    for name, (package, file, boxes) in SQUARES.items():
        with resources.files(package).joinpath(file).open("rb") as stream, Image.open(stream) as image:
            photograph = image.convert("RGB")
        for place, box in enumerate([(0, 0, 2 * SIDE, 2 * SIDE), *boxes]):
            path = folder / ("test" if place else "train") / name / f"{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            photograph.crop(box).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(path)


def run(folder: Path) -> Path:
    """Run the suite on the squares and return its store."""
    squares(folder / "photographs")
    suite, store = folder / "picture.yaml", folder / "picture.sqlite"
    suite.write_text(yaml.safe_dump(SUITE))
    app(["run", str(suite), "--store", str(store), "--data-root", str(folder)], standalone_mode=False)
    return store


def draw(found: Results, pictures: Pictures) -> Figure:
    """Draw the truth, and a line for each defense with its strongest attack, the most leaking first."""
    attacks = found.panel.entries[~found.panel.entries["control"]]
    worst = attacks.sort_values("mean", ascending=False, kind="stable").drop_duplicates("defense")
    count, left = VICTIMS, 1.3
    side = (WIDTH - left) / count
    figure = Figure(figsize=(WIDTH, (side + 0.14) * (len(worst) + 1)))
    grid = figure.subplots(len(worst) + 1, count, squeeze=False)
    figure.subplots_adjust(left=left / WIDTH, right=0.995, top=0.995, bottom=0.02, wspace=0.03, hspace=0.2)
    for line, (number, entry) in enumerate(worst.iterrows(), 1):
        rows = found.rows[found.panel.entry_of_row == number].sort_values("victim")
        for place, row in enumerate(rows.to_dict("records")):
            image = pictures.reconstruction(row["key"], row["victim"], row["matched"])
            _show(grid[line, place], image, f"{min(row[HEADLINE], 54):.0f} dB")
            _show(grid[0, place], pictures.truth(row["key"], row["victim"], row["image"]), "")
        _name(grid[line, 0], entry["defense"], entry["attack"])
    _name(grid[0, 0], "private images", "")
    return figure


def _show(axes: Axes, image: Picture | None, caption: str) -> None:
    axes.set_axis_off()
    assert image is not None
    axes.imshow(image, interpolation="nearest")
    axes.text(0.5, -0.03, caption, transform=axes.transAxes, ha="center", va="top", size=SMALL)


def _name(axes: Axes, text: str, attack: str) -> None:
    for height, word, size, colour in ((0.6, text, 8, "black"), (0.35, attack, SMALL, "#777777")):
        axes.text(-0.08, height, word, transform=axes.transAxes, ha="right", va="center", size=size, color=colour)


def main() -> None:
    """Run, and draw into the file that is named."""
    target = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder, rc_context(STYLE), Store(run(Path(folder))) as store:
        found = results.read(store)
        figure = draw(found, Pictures(found, [store]))
        figure.savefig(target, dpi=DOTS, metadata={"Software": None})


if __name__ == "__main__":
    main()
