"""One HTML file that shows everything: boards, heat map, reconstructions, curves, doubts and method.

It needs no network. Pictures and curves lie in it as chunks of text that the browser splits when they are first
looked at, so that a page of many thousand cells opens at once.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image

from .. import __version__
from ..board.leaderboard import Board
from ..board.malicious import one_kind
from ..board.results import CONTEXT, HEADLINE, KNOWLEDGE, Results
from ..pictures import Picture
from ..scales import CAP, METRICS, THRESHOLDS
from . import papers
from .columns import Shown, number, shown
from .gallery import QUANTILES, Pictures, picks
from .method import METHOD
from .verdict import of_attacks, of_defenses, of_setting

CHUNK = 200
"""Lines of pictures or curves that are split at once."""
SIDE = 64
"""Pixels a side above which pictures are made smaller."""
MANY = 2000
"""Cells above which pictures are compressed with loss."""
POINTS = 40
"""Losses kept of a curve."""
MOST_FLAGS = 100
"""Flags of one kind that the page lists; the CSV has all."""
MOST_CONTEXTS = 40
"""Contexts above which the page has no board for each."""

_FIELDS = ("attack", "knowledge", "defense", *CONTEXT, "seed")
_LADDER = (*KNOWLEDGE, "oracle")


def write(
    results: Results,
    boards: Mapping[str, Board],
    pictures: Pictures,
    contexts: Sequence[Board],
    beside: Sequence[str],
    about: str = "",
) -> str:
    """Return the page.

    Args:
        results: what to show.
        boards: `defenses`, `attacks`, `pareto`, `compute` and `flags` of these results, perhaps `malicious`,
            `detection` and `reproduction`.
        pictures: where images and curves come from.
        contexts: a defense board for each context, or none.
        beside: names of files that lie beside the page.
        about: what the suite is, in the words of its author.
    """
    levels = _levels(results, boards)
    cells, chunks = _cells(results, pictures, levels)
    suites = sorted({name for name in results.cells["suite"] if name})
    settings = _settings(results)
    lossless = len(results.cells) <= MANY
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(_file("page.html.j2"))
    return template.render(
        title=f"gradleak: {', '.join(suites)}" if suites else "gradleak",
        about=about,
        settings=settings.items(),
        papers=_papers(results),
        sections=_sections(boards),
        defenses=[_with_settings(_board(board), settings) for board in (boards["defenses"], *contexts)],
        omitted=_omitted(results, contexts),
        attacks=_board(boards["attacks"]),
        pareto=_board(boards["pareto"]),
        compute=_board(boards["compute"]),
        flags=_board(_fewer(boards["flags"])),
        reproduction=_board(boards["reproduction"]) if "reproduction" in boards else None,
        malicious=_board(boards["malicious"]) if "malicious" in boards else None,
        detection=_board(boards["detection"]) if "detection" in boards else None,
        filters=_FIELDS,
        quantiles=", ".join(f"{100 * share:.0f} %" for share in QUANTILES),
        thumbnails=f"Pictures above {SIDE} pixels are made smaller"
        + ("." if lossless else f"; with more than {MANY} cells they are compressed with loss."),
        protocol=[*METHOD, *boards["defenses"].notes, *boards["attacks"].notes[:1], _thresholds()],
        parts=_parts(results),
        metrics=METRICS.values(),
        machines=_machines(results.cells),
        version=__version__,
        files=beside,
        style=Markup(_file("page.css")),
        script=Markup(_file("page.js")),
        data=_json(_payload(results, boards, levels, cells)),
        chunks=[(name, Markup("\n".join(lines))) for name, lines in chunks],
    )


def _payload(
    results: Results, boards: Mapping[str, Board], levels: dict[str, list[str]], cells: list[list[Any]]
) -> dict[str, Any]:
    """Return what the page's script reads."""
    return {
        "chunk": CHUNK,
        "quantiles": QUANTILES,
        "exact": CAP,
        "levels": levels,
        "cells": cells,
        # The heat map is a mean over contexts, and none of those is over both kinds of servers.
        "entries": _entries(one_kind(results), levels),
        "pareto": _points(boards["pareto"].table, ("test_accuracy", "bytes")),
        "compute": _points(boards["compute"].table, ("gradient_evaluations",)),
    }


def _sections(boards: Mapping[str, Board]) -> list[tuple[str, str]]:
    """Return anchors and names of the page's parts."""
    sections = {"defenses": "Defenses", "attacks": "Attacks"}
    served = {"malicious": "Malicious servers", "detection": "Detection"}
    sections |= {anchor: name for anchor, name in served.items() if anchor in boards}
    sections |= {"heat": "Heat map", "gallery": "Reconstructions"}
    sections |= {"convergence": "Convergence", "tradeoff": "Trade-off", "doubts": "Doubts"}
    sections |= {"reproduction": "Published numbers"} if "reproduction" in boards else {}
    return [*sections.items(), ("method", "Method")]


def _omitted(results: Results, contexts: Sequence[Board]) -> str:
    if contexts or len(results.contexts) < 2:
        return ""
    return f"{len(results.contexts)} contexts are too many for a board each; choose them in the heat map."


def _file(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _json(value: Any) -> Markup:
    # A label must not be able to end the script that it lies in.
    return Markup(json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))


def _board(board: Board) -> dict[str, Any]:
    columns = shown(board)
    lost = board.table.get("accuracy_lost")
    verdicts = {"defenses": of_defenses, "attacks": of_attacks}
    return {
        "name": board.name,
        "title": board.title,
        "where": board.title.partition(": ")[2],
        "columns": [each.column for each in columns],
        "lines": [[_cell(each, line) for each in columns] for line in range(len(board.table))],
        "lost": [] if lost is None or lost.isna().all() else [number(value, 3, percent=True) for value in lost],
        "verdict": verdicts[board.name](board) if board.name in verdicts else [],
        "notes": board.notes,
        "strong": board.strong,
    }


def _cell(column: Shown, line: int) -> dict[str, str | None]:
    """Return the text of a cell, and a shorter one for narrow screens where that differs."""
    text, brief = column.cells[line], column.brief[line] if column.brief else None
    return {"text": text, "brief": None if brief == text else brief}


def _with_settings(board: dict[str, Any], settings: Mapping[str, str]) -> dict[str, Any]:
    """Add to a board's notes what its settings mean: the one that its title names, or else all."""
    own = [text for name, text in settings.items() if board["where"].endswith(f" · {name}")]
    return {**board, "settings": own or [f"{name}: {text}" for name, text in settings.items()]}


def _settings(results: Results) -> dict[str, str]:
    """Return what each setting means in words, by its name."""
    knowledge = [level for level in _LADDER if (results.cells["knowledge"] == level).any()]
    first = results.cells.drop_duplicates("setting").sort_values("setting")
    return {
        str(name): of_setting(config["setting"], knowledge)
        for name, config in zip(first["setting"], first["config"], strict=True)
    }


def _papers(results: Results) -> dict[str, dict[str, str]]:
    """Return reference and address of attacks and defenses that come along, by kind and label."""
    found = {}
    for kind in ("attack", "defense"):
        names = results.cells[[kind, f"{kind}_name"]].drop_duplicates()
        for label, name in names.itertuples(index=False, name=None):
            if text := papers.reference(f"{kind}s", name):
                found[f"{kind} {label}"] = {"reference": text, "link": papers.link(text)}
    return found


def _fewer(flags: Board) -> Board:
    kinds = flags.table.groupby("flag")
    lost = [f"{len(part) - MOST_FLAGS} more of {kind!r}" for kind, part in kinds if len(part) > MOST_FLAGS]
    if not lost:
        return flags
    notes = (*flags.notes, f"{', '.join(lost)}: see flags.csv")
    return replace(flags, table=kinds.head(MOST_FLAGS).reset_index(drop=True), notes=notes)


def _levels(results: Results, boards: Mapping[str, Board]) -> dict[str, list[str]]:
    """Return the labels of each field; attacks and defenses in the order of their boards."""
    found = {name: sorted(set(results.cells[name].astype(str))) for name in _FIELDS}
    found["knowledge"].sort(key=_LADDER.index)
    found["seed"].sort(key=int)
    for name in ("attack", "defense"):
        board = boards[f"{name}s"].table
        place = {label: line for line, label in reversed(list(enumerate(board[name] if len(board) else ())))}
        found[name].sort(key=lambda label: (place.get(label, math.inf), label))
    return found


def _numbers(lines: pd.DataFrame, levels: Mapping[str, list[str]], names: Iterable[str]) -> list[list[Any]]:
    """Return the labels of lines as positions in `levels`, None for a field that the lines do not have."""
    columns: list[list[Any]] = []
    for name in names:
        place = {label: number for number, label in enumerate(levels[name])}
        columns.append([place[str(label)] for label in lines[name]] if name in lines else [None] * len(lines))
    return [list(line) for line in zip(*columns, strict=True)]


def _entries(results: Results, levels: Mapping[str, list[str]]) -> list[list[Any]]:
    entries = results.panel.entries
    numbers = _numbers(entries, levels, _FIELDS)
    return [[*line, _finite(mean)] for line, mean in zip(numbers, entries["mean"], strict=True)]


def _cells(
    results: Results, pictures: Pictures, levels: Mapping[str, list[str]]
) -> tuple[list[list[Any]], list[tuple[str, list[str]]]]:
    """Return a line a cell, and the chunks of text with its pictures and curves.

    A line holds the numbers of its labels, mean PSNR, failed images, images, for each quantile (number of the true
    picture or -1, PSNR, status), and its own number.
    """
    rows = results.rows.sort_values(["key", "victim", "image"], kind="stable", ignore_index=True)
    chosen = picks(rows)
    sums = rows.groupby("key", sort=True).agg(
        mean=(HEADLINE, "mean"), failed=("failed", "sum"), images=("image", "size"), victims=("victim", _unique)
    )
    described = results.cells.set_index("key", drop=False).loc[sums.index]
    numbers = pd.DataFrame(_numbers(described, levels, _FIELDS), columns=list(_FIELDS), index=sums.index)
    ordered = numbers.sort_values(list(_FIELDS), kind="stable").index
    of_cell = {key: part for key, part in zip(sums.index, _grouped(chosen), strict=True)}
    lossless = len(sums) <= MANY
    truths: dict[tuple[str, int, int], int] = {}
    lines: list[list[Any]] = []
    truth_lines: list[str] = []
    found: list[str] = []
    curves: list[str] = []
    for line, key in enumerate(ordered):
        shown_images, texts = [], []
        for row in of_cell[key]:
            place = (pictures.list_of(key), int(row["victim"]), int(row["image"]))
            if place not in truths:
                truth = pictures.truth(key, *place[1:])
                truths[place] = -1 if truth is None else len(truth_lines)
                if truth is not None:
                    truth_lines.append(_webp(truth, lossless))
            shown_images.append([truths[place], _finite(row[HEADLINE]), row["status"]])
            image = pictures.reconstruction(key, row["victim"], row["matched"])
            texts.append("" if image is None else _webp(image, lossless))
        cell = sums.loc[key]
        head = [int(value) for value in numbers.loc[key]]
        lines.append([*head, _finite(cell["mean"]), int(cell["failed"]), int(cell["images"]), shown_images, line])
        found.append(" ".join(texts))
        curves.append(_curve(pictures.curve(key, cell["victims"])))
    kinds = {"truths": truth_lines, "pictures": found, "curves": curves}
    chunks = [
        (f"{kind}-{start // CHUNK}", content[start : start + CHUNK])
        for kind, content in kinds.items()
        for start in range(0, len(content), CHUNK)
    ]
    return lines, chunks


def _unique(values: pd.Series[int]) -> list[int]:
    return [int(value) for value in values.unique()]


def _grouped(chosen: pd.DataFrame) -> list[list[dict[str, Any]]]:
    records: list[dict[str, Any]] = chosen[["victim", "image", "matched", "status", HEADLINE]].to_dict("records")  # type: ignore[assignment]
    return [records[start : start + len(QUANTILES)] for start in range(0, len(records), len(QUANTILES))]


def _webp(picture: Picture, lossless: bool) -> str:
    image = Image.fromarray(picture)
    if max(image.size) > SIDE:
        image.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    image.save(content, "WEBP", lossless=lossless, quality=75, method=0)
    return base64.b64encode(content.getvalue()).decode()


def _curve(losses: npt.NDArray[np.float64]) -> str:
    """Return at most `POINTS` losses, evenly spaced from the first to the last, as text."""
    losses = losses[np.isfinite(losses)]
    if len(losses) > POINTS:
        losses = losses[np.linspace(0, len(losses) - 1, POINTS).round().astype(int)]
    return " ".join(f"{loss:.3g}" for loss in losses)


def _points(table: pd.DataFrame, costs: Sequence[str]) -> list[dict[str, Any]]:
    points = []
    for line in table.to_dict("records"):
        name = str(line.get("defense") or line.get("attack"))
        if line.get("knowledge", KNOWLEDGE[0]) != KNOWLEDGE[0]:
            name += f" ({line['knowledge']})"
        low, high = _finite(line["above_low"]), _finite(line["above_high"])
        point = {"name": name, "y": _finite(line["above"]), "low": low, "high": high, "front": bool(line["front"])}
        values = {cost: _finite(line[cost]) for cost in costs}
        points.append({**point, **values, "x": values[costs[0]]})
    return points


def _finite(value: Any) -> float | None:
    return float(value) if pd.notna(value) and math.isfinite(value) else None


def _thresholds() -> str:
    return f"success means {', '.join(line.name for line in THRESHOLDS)}"


def _parts(results: Results) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return every attack, defense, model, dataset and setting with the options behind its label."""
    found = []
    parts = [(f"{group}s", group, results.cells) for group in ("attack", "defense", *CONTEXT)]
    if len(results.utility):
        parts.append(("trainings for test accuracy", "attack", results.utility))
    for title, group, cells in parts:
        texts: dict[str, str] = {}
        for label, config in zip(cells[group], cells["config"], strict=True):
            if label not in texts:
                part = {name: value for name, value in config[group].items() if name != "label"}
                texts[label] = json.dumps(part, ensure_ascii=False)
        found.append((title, sorted(texts.items())))
    return found


def _machines(cells: pd.DataFrame) -> list[str]:
    started = sorted(filter(None, cells["started"]))
    versions = {", ".join(f"{name} {each}" for name, each in sorted(found.items())) for found in cells["versions"]}
    lines = [
        f"devices: {', '.join(sorted(set(filter(None, cells['device'])))) or 'unknown'}",
        *(f"versions: {text}" for text in sorted(filter(None, versions))),
        f"{cells['seconds'].sum():,.0f} s of computation in {len(cells)} cells",
    ]
    return [*lines, f"first cell {started[0]}, last {started[-1]}"] if started else lines
