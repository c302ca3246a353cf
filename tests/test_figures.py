from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.text import Text

from gradleak.board.leaderboard import attack_board, defense_board, pareto_board
from gradleak.board.results import Results, read
from gradleak.board.store import CellResult, ImageRow, Store, victim_list
from gradleak.report import figures
from gradleak.report.gallery import Pictures

PSNR = {
    ("mean-image", "none"): 10.0,
    ("mean-image", "noise"): 10.0,
    ("dlg", "none"): 30.0,
    ("dlg", "noise"): 12.0,
    ("ig", "none"): 20.0,
    ("ig", "noise"): 16.0,
}


def cell(attack: str, defense: str, dataset: str, victims: int = 5) -> CellResult:
    parts = {"attack": attack, "defense": defense, "model": "mlp", "dataset": dataset}
    config = {name: {"name": label, "label": label, "options": {}} for name, label in parts.items()}
    best = PSNR[attack, defense] + (5 if dataset == "photos" else 0)
    return CellResult(
        key=f"{attack}-{defense}-{dataset}",
        config={**config, "setting": {"name": "default", "batch_size": 1}, "victims": victims},
        rows=[ImageRow(victim=victim, image=0, matched=0, psnr=best + victim) for victim in range(victims)],
        provenance={
            "attack_family": "control" if attack == "mean-image" else "optimisation",
            "defense_family": "none" if defense == "none" else "noise",
            "bytes": 1000.0 * len(defense),
        },
        reconstructions={victim: np.full((1, 1, 8, 8), victim / 10) for victim in range(victims)},
        traces={} if attack == "mean-image" else {victim: np.geomspace(4, 1, 20) for victim in range(victims)},
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    opened = Store(tmp_path / "s.sqlite", create=True)
    for dataset in ("digits", "photos"):
        for attack, defense in PSNR:
            made = cell(attack, defense, dataset)
            opened.write(made)
            opened.write_victims(victim_list(made.config), np.zeros((5, 1, 1, 8, 8)), np.zeros((5, 1), int))
    return opened


@pytest.fixture
def results(store: Store) -> Results:
    return read(store)


def texts(figure: Figure) -> list[str]:
    return [found.get_text() for axes in figure.axes for found in (*axes.texts, axes.xaxis.label, axes.title)]


def test_figures_are_written_and_equal_twice(results: Results, store: Store, tmp_path: Path) -> None:
    defenses = defense_board(results)
    boards = {"defenses": defenses, "attacks": attack_board(results), "pareto": pareto_board(defenses)}
    pictures = Pictures(results, [store])
    first = figures.write(results, boards, pictures, tmp_path / "a")
    assert {path.stem for path in first} == {"gallery", "heat_map", "pareto", "convergence", "captions"}
    assert [path.suffix for path in first] == [".png", ".pdf"] * 4 + [".md"]
    captions = first[-1].read_text()
    assert all(f"- {path.stem}: " in captions for path in first[:-1])
    for path, again in zip(first, figures.write(results, boards, pictures, tmp_path / "b"), strict=True):
        assert path.read_bytes() == again.read_bytes(), path.name


def test_one_context_is_chosen_by_what_there_is_to_see(results: Results, store: Store) -> None:
    assert figures.richest(results) == ("mlp", "photos", "default")
    store.write(CellResult(**{**vars(cell("ig", "none", "digits")), "key": "more", "config": _labelled("extra")}))
    assert figures.richest(read(store)) == ("mlp", "digits", "default")


def _labelled(label: str) -> dict[str, object]:
    config = dict(cell("ig", "none", "digits").config)
    return {**config, "attack": {"name": label, "label": label, "options": {}}}


def test_the_gallery_shows_quantiles_of_the_worst_attack(results: Results, store: Store) -> None:
    found = figures.gallery(results, Pictures(results, [store]), ("mlp", "photos", "default"))
    assert found is not None
    said = texts(found)
    # Defenses from the most leaking one on, each with its worst attack; 5 images: the lowest, the middle, the highest.
    assert [text for text in said if text in ("none", "noise", "dlg", "ig")] == ["none", "dlg", "noise", "ig"]
    assert [text for text in said if text.endswith(" dB")] == [
        "35.0 dB", "37.0 dB", "39.0 dB", "21.0 dB", "23.0 dB", "25.0 dB"
    ]  # fmt: skip
    shown = [axes.images[0].get_array() for axes in found.axes]
    shades = [float(np.asarray(image).mean()) for image in shown]
    assert shades[1::2] == pytest.approx([0, round(0.2 * 255), round(0.4 * 255)] * 2)
    assert shades[::2] == [0] * 6


def test_the_gallery_needs_the_truth(results: Results, tmp_path: Path) -> None:
    with Store(tmp_path / "empty.sqlite", create=True) as empty:
        assert figures.gallery(results, Pictures(results, [empty]), ("mlp", "photos", "default")) is None


def test_the_heat_map_is_the_mean_over_contexts(results: Results) -> None:
    table = figures.heat(results)
    assert table.loc[("ig", "oblivious"), "noise"] == pytest.approx(16 + 2 + 2.5)
    found = figures.heat_map(results, defense_board(results), attack_board(results))
    assert found is not None
    assert "20" in texts(found) and [label.get_text() for label in found.axes[0].get_xticklabels()] == ["noise", "none"]


def test_the_pareto_plot_shows_what_was_measured(results: Results) -> None:
    found = figures.pareto(pareto_board(defense_board(results)))
    assert found is not None and [axes.get_xlabel() for axes in found.axes] == ["bytes a message"]
    board = pareto_board(defense_board(results))
    board.table["bytes"] = np.nan
    assert figures.pareto(board) is None


def test_curves_are_relative_to_their_start(results: Results, store: Store) -> None:
    found = figures.convergence(results, Pictures(results, [store]), ("mlp", "photos", "default"))
    assert found is not None
    lines = [line for axes in found.axes for line in axes.get_lines()]
    assert len(lines) == 4  # two attacks on two defenses; the control does not iterate
    for line in lines:
        values = np.asarray(line.get_ydata(), dtype=float)
        assert (values[0], values[-1]) == pytest.approx((1, 0.25))


def test_figures_fit_the_text_and_can_be_read(results: Results, store: Store) -> None:
    defenses = defense_board(results)
    place = ("mlp", "photos", "default")
    with rc_context(figures.STYLE):
        drawn = [
            figures.gallery(results, Pictures(results, [store]), place),
            figures.heat_map(results, defenses, attack_board(results)),
            figures.pareto(pareto_board(defenses)),
            figures.convergence(results, Pictures(results, [store]), place),
        ]
    for figure in drawn:
        assert figure is not None and figure.get_figwidth() == figures.WIDTH
        written = [text for text in figure.findobj(Text) if text.get_text()]
        assert written and min(float(text.get_fontsize()) for text in written) >= figures.SMALL
    assert len(drawn[1].axes) == 2  # type: ignore[union-attr]  # the map and its colour bar
    looks = {(line.get_color(), line.get_linestyle()) for line in drawn[3].axes[0].get_lines()}  # type: ignore[union-attr]
    assert len({style for _, style in looks}) == len(looks) == 2


def test_the_gallery_shows_those_that_hold_and_those_that_fall() -> None:
    worst = pd.DataFrame({"defense": [f"d{place}" for place in range(20)], "mean": np.linspace(50, 10, 20)})
    assert list(figures._held_and_fallen(worst)["defense"]) == [f"d{place}" for place in (0, 1, 2, 3, 16, 17, 18, 19)]
    assert figures._decibels(60.0) == figures._decibels(54.0) == "54 dB (pixel-exact)"
    assert figures._decibels(53.94) == "53.9 dB" and figures._decibels(float("nan")) == "- dB"
