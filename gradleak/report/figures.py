"""Figures for papers and READMEs, as PNG and PDF."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FormatStrFormatter, LogLocator

from ..board.leaderboard import Board
from ..board.results import CONTEXT, HEADLINE, KNOWLEDGE, Results
from .columns import number
from .gallery import QUANTILES, Picture, Pictures, picks

DOTS = 160
"""Dots an inch of the PNG files."""
MOST = 8
"""Defenses that a figure of pictures or curves shows, from the most leaking one on; the page shows all."""

_STYLE: dict[Any, Any] = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "pdf.fonttype": 42}
_GREY = "#777777"


def write(results: Results, boards: Mapping[str, Board], pictures: Pictures, folder: Path) -> list[Path]:
    """Write gallery, heat map, Pareto plot and convergence curves to a folder; what has no data is left out.

    Args:
        results: what to show.
        boards: the boards `defenses`, `attacks` and `pareto` of these results.
        pictures: where images and curves come from.
        folder: made if it is not there; files of the same names are replaced.
    """
    context = richest(results)
    drawn: dict[str, Callable[[], Figure | None]] = {
        "gallery": lambda: gallery(results, pictures, context),
        "heat_map": lambda: heat_map(results, boards["defenses"], boards["attacks"]),
        "pareto": lambda: pareto(boards["pareto"]),
        "convergence": lambda: convergence(results, pictures, context),
    }
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in drawn.items():
        with rc_context(_STYLE):
            figure = draw()
            if figure is None:
                continue
            for form, facts in (("png", {"Software": None}), ("pdf", {"CreationDate": None, "Creator": None})):
                path = folder / f"{name}.{form}"
                # Neither date nor version goes in: equal results give equal files.
                figure.savefig(path, dpi=DOTS, metadata=facts, bbox_inches="tight")
                written.append(path)
    return written


def richest(results: Results) -> tuple[str, ...]:
    """Return the context that a figure of one context shows: the one with the most attacks on defenses.

    Ties go to the most leaking one, so that there is something to see, then to the first by name.
    """
    entries = results.panel.entries
    attacks = entries[~entries["control"]] if (~entries["control"]).any() else entries
    ranked = attacks.groupby(list(CONTEXT)).agg(count=("mean", "size"), mean=("mean", "mean")).reset_index()
    ranked = ranked.sort_values(["count", "mean", *CONTEXT], ascending=[False, False, True, True, True])
    model, dataset, setting = ranked[list(CONTEXT)].iloc[0]
    return str(model), str(dataset), str(setting)


def gallery(results: Results, pictures: Pictures, context: tuple[str, ...]) -> Figure | None:
    """Truth beside reconstruction at `QUANTILES` of the images, a line a defense, under the worst attack on it."""
    worst = _worst_attacks(results, context)
    lines = []
    for number_, entry in worst.iterrows():
        chosen = picks(results.rows[results.panel.entry_of_row == number_], "defense").to_dict("records")
        shown = [
            (
                pictures.truth(row["key"], row["victim"], row["image"]),
                pictures.reconstruction(row["key"], row["victim"], row["matched"]),
                row,
            )
            for row in chosen
        ]
        if any(truth is not None for truth, _, _ in shown):
            lines.append((entry, shown))
    if not lines:
        return None
    columns = 2 * len(QUANTILES)
    figure = Figure(figsize=(1.9 + 0.85 * columns, 0.45 + 1.05 * len(lines)))
    axes = figure.subplots(len(lines), columns, squeeze=False)
    figure.subplots_adjust(
        left=1.9 / figure.get_figwidth(), right=1, top=1 - 0.45 / figure.get_figheight(), bottom=0, wspace=0.04
    )
    for line, (entry, shown) in enumerate(lines):
        for place, (truth, found, row) in enumerate(shown):
            _image(axes[line, 2 * place], truth, "")
            _image(axes[line, 2 * place + 1], found, f"{number(row[HEADLINE])} dB")
        first = axes[line, 0]
        name = entry["attack"] + ("" if entry["knowledge"] == KNOWLEDGE[0] else f"\n({entry['knowledge']})")
        first.text(-0.12, 0.62, entry["defense"], transform=first.transAxes, ha="right", va="center", weight="bold")
        first.text(-0.12, 0.28, name, transform=first.transAxes, ha="right", va="center", color=_GREY, size=7)
    for place, share in enumerate(QUANTILES):
        axes[0, 2 * place].set_title("truth", size=7, color=_GREY, pad=3)
        axes[0, 2 * place + 1].set_title("reconstruction", size=7, color=_GREY, pad=3)
        axes[0, 2 * place].text(
            1.02, 1.28, f"{100 * share:.0f} % quantile", transform=axes[0, 2 * place].transAxes, ha="center"
        )
    return figure


def heat(results: Results) -> pd.DataFrame:
    """Return mean PSNR over contexts, lines (attack, knowledge), columns defenses; NaN where not run."""
    entries = results.panel.entries
    return entries.pivot_table(index=["attack", "knowledge"], columns="defense", values="mean", aggfunc="mean")


def heat_map(results: Results, defenses: Board, attacks: Board) -> Figure | None:
    """Mean PSNR of every attack against every defense, in the order of the boards."""
    table = heat(results)
    if not len(defenses.table) or not len(attacks.table):
        return None
    order = list(attacks.table[["attack", "knowledge"]].itertuples(index=False, name=None))
    table = table.reindex(index=pd.MultiIndex.from_tuples(order), columns=list(defenses.table["defense"]))
    values = table.to_numpy(dtype=float)
    figure = Figure(figsize=(1.8 + 0.55 * values.shape[1], 0.9 + 0.26 * values.shape[0]))
    axes = figure.subplots()
    colours = colormaps["YlOrBr"].with_extremes(bad="#eeeeee")
    shades = np.clip((values - 5) / 30, 0, 1)
    axes.imshow(np.ma.masked_invalid(shades), cmap=colours, vmin=0, vmax=1.2, aspect="auto")
    for (line, column), value in np.ndenumerate(values):
        dark = shades[line, column] > 0.8
        axes.text(column, line, number(value, 0), ha="center", va="center", color="white" if dark else "black", size=7)
    axes.set_xticks(range(values.shape[1]), list(table.columns), rotation=35, ha="right")
    axes.set_yticks(range(values.shape[0]), [_attack(*name) for name in order])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("mean PSNR, dB", loc="left", size=8)
    return figure


def pareto(board: Board) -> Figure | None:
    """Leakage against accuracy and bytes, with intervals; the front is filled."""
    table = board.table[board.table["above"].notna()]
    costs = {"test_accuracy": "test accuracy", "bytes": "bytes a message"}
    measured = [name for name in costs if table[name].notna().any()]
    if not measured:
        return None
    figure = Figure(figsize=(3.6 * len(measured), 2.8))
    for axes, name in zip(figure.subplots(1, len(measured), squeeze=False)[0], measured, strict=True):
        for place, line in enumerate(table.to_dict("records")):
            if not math.isfinite(line[name]):
                continue
            ends = [max(0.0, line["above"] - line["above_low"]), max(0.0, line["above_high"] - line["above"])]
            axes.errorbar(
                line[name],
                line["above"],
                yerr=None if not all(map(math.isfinite, ends)) else [[ends[0]], [ends[1]]],
                fmt="o",
                color=f"C{place % 10}",
                markerfacecolor=f"C{place % 10}" if line["front"] else "white",
                capsize=2,
                label=line["defense"],
            )
        if name == "bytes":
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            axes.xaxis.set_minor_formatter(EngFormatter(sep=""))
        axes.set_xlabel(costs[name])
        axes.set_ylabel("worst PSNR above the floor, dB")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), title="filled: on the front")
    return figure


def convergence(results: Results, pictures: Pictures, context: tuple[str, ...]) -> Figure | None:
    """The median loss of every attack over its iterations, relative to its start, one plot a defense."""
    plots: list[tuple[str, dict[str, npt.NDArray[np.float64]]]] = []
    names = results.rows[[*CONTEXT]].apply(tuple, axis=1) == context
    rows = results.rows[names]
    for defense in _worst_attacks(results, context)["defense"]:
        curves = {}
        faced = rows[(rows["defense"] == defense) & (rows["seed"] == rows["seed"].min())]
        for (attack, knowledge, key), group in faced.groupby(["attack", "knowledge", "key"]):
            curve = pictures.curve(str(key), sorted(set(group["victim"])))
            if len(curve) > 1 and curve[0] > 0:
                curves[_attack(str(attack), str(knowledge))] = curve / curve[0]
        if curves:
            plots.append((str(defense), curves))
    if not plots:
        return None
    wide = min(4, len(plots))
    high = math.ceil(len(plots) / wide)
    figure = Figure(figsize=(2.4 * wide + 1.4, 1.9 * high + 0.3))
    grid = figure.subplots(high, wide, squeeze=False, sharex=True, sharey=True)
    colours = {name: f"C{place % 10}" for place, name in enumerate(dict.fromkeys(n for _, c in plots for n in c))}
    for axes, (defense, curves) in zip(grid.flat, plots, strict=False):
        for name, curve in curves.items():
            axes.plot(np.linspace(0, 1, len(curve)), np.maximum(curve, 1e-12), color=colours[name], lw=1)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.set_title(defense, size=8)
    for axes in grid.flat[len(plots) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("loss / first loss")
    for axes in grid[-1]:
        axes.set_xlabel("share of iterations")
    figure.tight_layout()
    handles = [Line2D([0], [0], color=colour, lw=1, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def _worst_attacks(results: Results, context: tuple[str, ...]) -> pd.DataFrame:
    """Return the strongest entry against each defense in a context, the most leaking defenses first, at most `MOST`."""
    entries = results.panel.entries
    here = entries[list(CONTEXT)].apply(tuple, axis=1) == context
    attacks = entries[here & ~entries["control"] & entries["knowledge"].isin(KNOWLEDGE) & entries["mean"].notna()]
    return attacks.sort_values("mean", ascending=False, kind="stable").drop_duplicates("defense").head(MOST)


def _attack(attack: str, knowledge: str) -> str:
    return attack if knowledge == KNOWLEDGE[0] else f"{attack} ({knowledge})"


def _image(axes: Axes, image: Picture | None, caption: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    if image is None:
        axes.text(0.5, 0.5, "none", ha="center", va="center", color=_GREY, transform=axes.transAxes)
    else:
        axes.imshow(image, interpolation="nearest")
    if caption:
        axes.set_xlabel(caption, size=7, labelpad=2)
