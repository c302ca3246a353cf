"""Figures for papers and READMEs, as PNG and PDF."""

from __future__ import annotations

import math
import textwrap
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
from matplotlib.ticker import EngFormatter, FormatStrFormatter, LogLocator, NullFormatter

from ..board.leaderboard import FLOOR, Board
from ..board.results import CONTEXT, HEADLINE, KNOWLEDGE, Results
from ..paths import printable, written_whole
from ..pictures import Picture
from ..scales import CAP
from .columns import number
from .gallery import QUANTILES, Pictures, picks

CAPTIONS = "captions.md"
DOTS = 200
"""Dots an inch of the PNG files."""
WIDTH = 5.5
"""Inches that every figure is wide, the text of a paper, so that nothing is made smaller there."""
MOST = 8
"""Defenses that a figure of pictures or curves shows: half of them hold, half fall; the page shows all."""
MOST_LINES, MOST_COLUMNS = 24, 32
"""Attacks and defenses of a heat map at most, the strongest and safest."""
MOST_CURVES = 5
"""Curves in a plot of losses, those of the strongest attacks: more cannot be told apart by colour."""
SMALL = 6
"""Points of the smallest text."""

STYLE: dict[Any, Any] = {
    "font.size": 7,
    "axes.titlesize": 7,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "pdf.fonttype": 42,
}
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Told apart by colour-blind readers too (Okabe and Ito 2008)."""
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
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
    captions = []
    for name, draw in drawn.items():
        with rc_context(STYLE):
            figure = draw()
            if figure is None:
                continue
            captions.append(f"- {name}: {_captions(context)[name]}")
            for form, facts in (("png", {"Software": None}), ("pdf", {"CreationDate": None, "Creator": None})):
                with written_whole(folder / f"{name}.{form}") as path:
                    # Neither date nor version goes in: equal results give equal files.
                    figure.savefig(path, dpi=DOTS, metadata=facts, format=form)
                written.append(folder / f"{name}.{form}")
    if captions:
        with written_whole(folder / CAPTIONS) as path:
            path.write_text(printable("\n".join(captions), keep="\n") + "\n", encoding="utf-8")
        written.append(folder / CAPTIONS)
    return written


def _captions(context: tuple[str, ...]) -> dict[str, str]:
    """Return a sentence or two for under each figure."""
    where = " · ".join(context)
    quantiles = ", ".join(f"{100 * share:.0f} %" for share in QUANTILES)
    return {
        "gallery": f"Truth beside reconstruction under the strongest attack on each defense ({where}), for defenses "
        f"that hold and that fall: images at the {quantiles} quantiles by PSNR, never chosen by hand.",
        "heat_map": "Mean PSNR in dB of every attack (down, strongest first; in brackets what it knows of the defense) "
        "against every defense (across, safest first), over contexts. Higher leaks more; grey was not run.",
        "pareto": "Leakage of each defense, PSNR of the worst attack above the floor with 95 % intervals, against what "
        "it costs. Filled: no other defense is at least as good in everything and better in one thing.",
        "convergence": f"Median loss over victims, relative to its start, of the {MOST_CURVES} strongest attacks on "
        f"each defense ({where}).",
    }


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
    worst = _held_and_fallen(_worst_attacks(results, context))
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
    left, side = 1.25, (0.975 * WIDTH - 1.25) / columns
    figure = Figure(figsize=(WIDTH, 0.4 + (side + 0.16) * len(lines)))
    axes = figure.subplots(len(lines), columns, squeeze=False)
    top = 1 - 0.36 / figure.get_figheight()
    figure.subplots_adjust(left=left / WIDTH, right=0.975, top=top, bottom=0.16 / figure.get_figheight(), wspace=0.04)
    for line, (entry, shown) in enumerate(lines):
        for place, (truth, found, row) in enumerate(shown):
            _image(axes[line, 2 * place], truth, "")
            _image(axes[line, 2 * place + 1], found, _decibels(row[HEADLINE]))
        _line_name(axes[line, 0], entry)
    for place, share in enumerate(QUANTILES):
        axes[0, 2 * place].set_title("truth", size=SMALL, color=_GREY, pad=2)
        axes[0, 2 * place + 1].set_title("reconstruction", size=SMALL, color=_GREY, pad=2)
        axes[0, 2 * place].text(
            1.02, 1.24, f"{100 * share:.0f} % quantile", transform=axes[0, 2 * place].transAxes, ha="center"
        )
    return figure


def _decibels(value: float) -> str:
    return f"{CAP:g} dB (pixel-exact)" if value >= CAP else f"{number(value)} dB"


def _line_name(axes: Axes, entry: pd.Series[Any]) -> None:
    """Write a defense and the attack on it left of its pictures."""
    for height, text, size, colour in (
        (0.62, entry["defense"], 7, "black"),
        (0.3, _attack(entry["attack"], entry["knowledge"]), SMALL, _GREY),
    ):
        broken = "\n".join(textwrap.wrap(text, 24))
        axes.text(-0.1, height, broken, transform=axes.transAxes, ha="right", va="center", size=size, color=colour)


def _held_and_fallen(worst: pd.DataFrame) -> pd.DataFrame:
    """Return at most `MOST` lines of those sorted by leakage: the first and the last ones."""
    if len(worst) <= MOST:
        return worst
    return pd.concat([worst.head(MOST - MOST // 2), worst.tail(MOST // 2)])


def heat(results: Results) -> pd.DataFrame:
    """Return mean PSNR over contexts, lines (attack, knowledge), columns defenses; NaN where not run."""
    entries = results.panel.entries
    return entries.pivot_table(index=["attack", "knowledge"], columns="defense", values="mean", aggfunc="mean")


def heat_map(results: Results, defenses: Board, attacks: Board) -> Figure | None:
    """Mean PSNR of every attack against every defense, in the order of the boards."""
    table = heat(results)
    if not len(defenses.table) or not len(attacks.table):
        return None
    order = list(attacks.table[["attack", "knowledge"]].itertuples(index=False, name=None))[:MOST_LINES]
    names = list(defenses.table["defense"])[:MOST_COLUMNS]
    table = table.reindex(index=pd.MultiIndex.from_tuples(order), columns=names)
    values = table.to_numpy(dtype=float)
    below, beside = (
        [_short(name) for name in names],
        [_attack(_short(attack, 26), knowledge) for attack, knowledge in order],
    )
    # Upright names need their length; seven lines at least leave room for the name of the colour bar.
    high = 0.15 * max(7, len(beside)) + 0.6 * SMALL / 72 * max(map(len, below), default=0) + 0.2
    figure = Figure(figsize=(WIDTH, high), layout="constrained")
    axes = figure.subplots()
    colours = colormaps["cividis"].with_extremes(bad="#dddddd")
    low, high = 5, CAP
    shown = axes.imshow(np.ma.masked_invalid(values), cmap=colours, vmin=low, vmax=high, aspect="auto")
    for (line, column), value in np.ndenumerate(values):
        if math.isfinite(value):
            colour = "black" if value > (low + high) / 2 else "white"
            axes.text(column, line, number(value, 0), ha="center", va="center", color=colour, size=SMALL)
    axes.set_xticks(range(values.shape[1]), below, rotation=90)
    axes.set_yticks(range(values.shape[0]), beside)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(shown, ax=axes, extend="min", fraction=0.03, pad=0.01, label="mean PSNR, dB")
    return figure


def _short(text: str, most: int = 30) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def pareto(board: Board) -> Figure | None:
    """Leakage against accuracy and bytes, with intervals; the front is filled."""
    table = board.table[board.table["above"].notna()]
    costs = {"test_accuracy": "test accuracy", "bytes": "bytes a message"}
    measured = [name for name in costs if table[name].notna().any()]
    if not measured:
        return None
    figure = Figure(figsize=(WIDTH, 2.6 if len(measured) > 1 else 3.2), layout="constrained")
    drawn = []
    for axes, name in zip(figure.subplots(1, len(measured), squeeze=False)[0], measured, strict=True):
        lines = [line for line in table.to_dict("records") if math.isfinite(line[name])]
        drawn.append((axes, lines, name))
        for line in lines:
            _point(axes, line, name)
        if name == "bytes":
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(costs[name])
        axes.set_ylabel("worst PSNR above the floor, dB")
    # Where points lie on paper is known once the axes have their place.
    figure.draw_without_rendering()
    for axes, lines, name in drawn:
        _name_points(axes, lines, name)
    return figure


def _point(axes: Axes, line: dict[Any, Any], cost: str) -> None:
    """Draw a defense: filled on the front, a triangle at the floor, a circle beside it."""
    ends = [max(0.0, line["above"] - line["above_low"]), max(0.0, line["above_high"] - line["above"])]
    colour = _COLOURS[0] if line["front"] else _GREY
    axes.errorbar(
        line[cost],
        line["above"],
        yerr=None if not all(map(math.isfinite, ends)) else [[ends[0]], [ends[1]]],
        fmt="^" if line.get("standing") == FLOOR else "o",
        ms=4,
        lw=0.7,
        color=colour,
        markerfacecolor=colour if line["front"] else "white",
        capsize=1.5,
    )


def _name_points(axes: Axes, lines: list[dict[Any, Any]], cost: str) -> None:
    """Write the names of points beside them, lifted where another name is near: all of a few, else the front's."""
    named = lines if len(lines) <= MOST else [line for line in lines if line["front"]]
    letter, high = 0.55 * SMALL / 72 / (axes.get_position().width * WIDTH), 1 / 18
    placed: list[tuple[float, float, float]] = []
    for line in sorted(named, key=lambda each: (each["above"], each["defense"])):
        x, y = map(float, axes.transAxes.inverted().transform(axes.transData.transform((line[cost], line["above"]))))
        side = 1 if x < 0.5 else -1
        left, right = sorted((x, x + side * (0.05 + letter * len(line["defense"]))))
        while any(left < there[1] and there[0] < right and abs(y - there[2]) < high for there in placed):
            y += high / 4
        placed.append((left, right, y))
        axes.annotate(
            line["defense"],
            (line[cost], line["above"]),
            xytext=(x + 0.03 * side, y),
            textcoords="axes fraction",
            size=SMALL,
            va="center",
            ha="left" if side > 0 else "right",
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": _GREY, "shrinkA": 0, "shrinkB": 2},
        ).set_in_layout(False)


def convergence(results: Results, pictures: Pictures, context: tuple[str, ...]) -> Figure | None:
    """The median loss of every attack over its iterations, relative to its start, one plot a defense."""
    plots: list[tuple[str, dict[str, npt.NDArray[np.float64]]]] = []
    here = results.rows[[*CONTEXT]].apply(tuple, axis=1) == context
    controls = set(results.panel.entries.loc[results.panel.entries["control"], "attack"])
    rows = results.rows[here & ~results.rows["attack"].isin(controls)]
    for defense in _held_and_fallen(_worst_attacks(results, context))["defense"]:
        curves: dict[str, npt.NDArray[np.float64]] = {}
        faced = rows[(rows["defense"] == defense) & (rows["seed"] == rows["seed"].min())]
        strongest = faced.groupby(["attack", "knowledge", "key"])[HEADLINE].mean().sort_values(ascending=False)
        for attack, knowledge, key in strongest.index:
            if len(curves) == MOST_CURVES:
                break
            group = faced[faced["key"] == key]
            curve = pictures.curve(str(key), sorted(set(group["victim"])))
            if len(curve) > 1 and curve[0] > 0:
                curves[_attack(str(attack), str(knowledge))] = curve / curve[0]
        if curves:
            plots.append((str(defense), curves))
    if not plots:
        return None
    wide = min(4, len(plots))
    high = math.ceil(len(plots) / wide)
    figure = Figure(figsize=(WIDTH, 1.25 * high + 0.6), layout="constrained")
    grid = figure.subplots(high, wide, squeeze=False, sharex=True, sharey=True)
    found = list(dict.fromkeys(name for _, curves in plots for name in curves))
    looks: dict[str, dict[str, Any]] = {
        name: {"color": _COLOURS[place % len(_COLOURS)], "ls": _DASHES[place % len(_DASHES)], "lw": 1}
        for place, name in enumerate(found)
    }
    lowest = min(float(np.nanmin(curve)) for _, curves in plots for curve in curves.values())
    for axes, (defense, curves) in zip(grid.flat, plots, strict=False):
        for name, curve in curves.items():
            axes.plot(np.linspace(0, 1, len(curve)), np.maximum(curve, 1e-12), **looks[name])
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(FormatStrFormatter("%g") if lowest > 0.05 else NullFormatter())
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.set_title("\n".join(textwrap.wrap(defense, 22)))
    for axes in grid.flat[len(plots) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("loss / first loss")
    for axes in grid[-1]:
        axes.set_xlabel("share of iterations")
    handles = [Line2D([0], [0], label=name, **look) for name, look in looks.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _worst_attacks(results: Results, context: tuple[str, ...]) -> pd.DataFrame:
    """Return the strongest entry against each defense in a context, the most leaking defenses first."""
    entries = results.panel.entries
    here = entries[list(CONTEXT)].apply(tuple, axis=1) == context
    attacks = entries[here & ~entries["control"] & entries["knowledge"].isin(KNOWLEDGE) & entries["mean"].notna()]
    return attacks.sort_values("mean", ascending=False, kind="stable").drop_duplicates("defense")


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
        axes.set_xlabel(caption, size=SMALL, labelpad=1)
