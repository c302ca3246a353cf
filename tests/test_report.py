from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradleak.board.leaderboard import Board
from gradleak.errors import GradleakError
from gradleak.report import FORMATS, columns, render, terminal
from gradleak.report.columns import number, rank, shown

DEFENSES = Board(
    "defenses",
    "Defenses: mlp · digits · default",
    pd.DataFrame(
        {
            "defense": ["top_k", "none"],
            "psnr": [12.345, 28.0],
            "psnr_low": [11.0, math.nan],
            "psnr_high": [13.96, math.nan],
            "psnr_attack": ["ig", "dlg"],
            "psnr_knowledge": ["public", "oblivious"],
            "psnr_floor": [10.0, 10.0],
            "psnr_q25": [11.0, 27.0],
            "psnr_median": [12.0, 28.0],
            "psnr_q75": [13.0, 29.0],
            "above": [2.345, 18.0],
            "above_low": [-0.04, 17.0],
            "above_high": [4.0, 19.0],
            "success_psnr_20": [0.0, 1.0],
            "lpips": [math.nan, math.nan],
            "bytes": [1234.0, 56789.0],
            "epsilon": [math.nan, math.nan],
            "failed": [3, 0],
            "trials": [16, 16],
            "doubt": ["adaptive", ""],
            "standing": ["at the floor", "3 of 4 attacks"],
            "rank_low": pd.array([1, 2], dtype="Int64"),
            "rank_high": pd.array([1, 2], dtype="Int64"),
        }
    ),
    notes=("16 victims; seeds: 0, 1", "[low, high]: 95 % interval"),
    strong=frozenset({0}),
)
ATTACKS = Board(
    "attacks",
    "Attacks: mlp · digits · default",
    pd.DataFrame(
        {
            "attack": ["ig", "mean-image"],
            "knowledge": ["public", "oblivious"],
            "family": ["optimisation", "control"],
            "above": [12.0, 0.0],
            "above_low": [11.0, 0.0],
            "above_high": [13.0, 0.0],
            "cells": [3, 4],
            "of_cells": [4, 4],
            "failed": [0, 0],
            "trials": [16, 16],
            "rank_low": pd.array([1, None], dtype="Int64"),
            "rank_high": pd.array([2, None], dtype="Int64"),
        }
    ),
)
FLAGS = Board("flags", "Doubts", pd.DataFrame({"flag": ["a | b"], "where": ["x_y"], "why": ["50 % of $ & #"]}))
BOARDS = [DEFENSES, ATTACKS, FLAGS]


def texts(board: Board) -> dict[str, tuple[str, ...]]:
    return {each.column.heading: each.cells for each in shown(board)}


def test_people_see_rounded_numbers_with_their_intervals() -> None:
    seen = texts(DEFENSES)
    assert seen["rank"] == ("1", "2") and seen["defense"] == ("top_k", "none")
    assert seen["PSNR, dB"] == ("12.3 [11.0, 14.0]", "28.0")
    assert seen["worst attack"] == ("ig (public)", "dlg")
    assert seen["above floor, dB"] == ("2.3 [0.0, 4.0]", "18.0 [17.0, 19.0]")
    assert seen["images ≥ 20 dB, %"] == ("0", "100")
    assert seen["bytes"] == ("1,234", "56,789")
    assert seen["failed"] == ("3/16", "") and seen["doubt"] == ("adaptive", "")
    assert seen["quartiles, dB"] == ("11.0 12.0 13.0", "27.0 28.0 29.0")


def test_what_nobody_measured_takes_no_column() -> None:
    assert {"LPIPS", "epsilon", "SSIM", "accuracy, %"}.isdisjoint(texts(DEFENSES))
    assert "failed" not in texts(ATTACKS)


def test_ranks_show_ties_and_controls_have_none() -> None:
    assert texts(ATTACKS)["rank"] == ("1-2", "")
    assert rank({"rank_low": 3, "rank_high": 3}) == "3"


@given(st.floats(-1e6, 1e6), st.integers(0, 3))
def test_numbers_read_back(value: float, digits: int) -> None:
    text = number(value, digits)
    assert float(text.replace(",", "")) == pytest.approx(value, abs=0.51 * 10**-digits)
    assert text not in ("-0", "-0.0", "-0.00", "-0.000")


def test_missing_and_infinite_numbers_have_words() -> None:
    assert [number(value) for value in (None, math.nan, pd.NA, math.inf)] == ["-", "-", "-", "inf"]


def test_terminal_table_is_aligned() -> None:
    text = terminal.write([DEFENSES])
    above, header, rule, first, second = text.splitlines()[2:7]
    assert text.startswith("Defenses: mlp · digits · default\n\n")
    assert set(rule) == {"─"}
    assert first.index("12.3 [11.0, 14.0]") + 17 == second.index("28.0") + 4 == header.index("PSNR, dB") + 8
    assert first.index("top_k") == second.index("none") == header.index("defense")
    # A heading wider than its cells has two lines.
    assert above.index("images ≥") + 8 == header.index("20 dB, %") + 8
    assert "[low, high]: 95 % interval" in text and "\x1b" not in text
    assert all(line == line.rstrip() for line in text.splitlines())


def headings(text: str) -> set[str]:
    """The headings of a terminal's table, whose two lines are aligned."""
    lines = text.split("─")[0].splitlines()[2:]
    spans = [
        (word.start(), word.end(), line, word[0])
        for line, row in enumerate(lines)
        for word in re.finditer(r"\S+(?: \S+)*", row)
    ]
    found = []
    for start, end, line, word in spans:
        upper = [each for first, last, other, each in spans if other < line and first < end and start < last]
        found.append(" ".join([*upper, word]))
    return {each for each in found if not any(other.startswith(f"{each} ") for other in found)}


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140])
def test_terminal_table_fits_and_says_what_it_left_out(width: int) -> None:
    text = terminal.write([DEFENSES], width=width)
    assert max(map(len, text.splitlines())) <= width
    # Below 46 characters even the columns that never go have to wrap; the doubt is one of them.
    assert "adaptive" in text or width == 40
    assert ("12.3 [11.0, 14.0]" in text) == (width >= 100)
    left_out = " ".join(text.partition("too narrow for: ")[2].split()).split("; ")
    if width >= 60:
        assert set(filter(None, left_out)) | headings(text) == set(texts(DEFENSES))


def test_what_matters_stays_at_80_columns() -> None:
    table = DEFENSES.table.assign(
        defense=["a-defense-with-a-long-name + another", "none"],
        doubt=["fit budget failed adaptive victims", ""],
        bytes=[1e9, 1.0],
        accuracy_lost=[0.5, 0.0],
    )
    text = terminal.write([replace(DEFENSES, table=table)], width=80)
    assert {"rank", "defense", "standing", "images ≥ 20 dB, %", "accuracy lost, points", "doubt"} <= headings(text)
    assert "fit +4" in text and "at floor" in text and "3/4 attacks" in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_worst_attack_is_cut_before_floor_and_cost_leave() -> None:
    table = DEFENSES.table.assign(psnr_attack="inverting-gradients with a very long label", epsilon=8.0)
    text = terminal.write([replace(DEFENSES, table=table)], width=112)
    assert {"floor, dB", "bytes", "epsilon", "doubt", "worst attack"} <= headings(text)
    assert "inverting-gradients w…" in text


def test_chosen_columns_are_shown_in_their_order() -> None:
    for form in ("table", "markdown", "latex"):
        text = render([DEFENSES], form, ["psnr-db", "standing"])
        assert text.index("PSNR, dB") < text.index("standing") and "worst attack" not in text
    with pytest.raises(GradleakError, match="unknown column 'psnr'; did you mean"):
        render(BOARDS, "table", ["psnr"])
    with pytest.raises(GradleakError, match="'csv' always has every column"):
        render(BOARDS, "csv", ["defense"])


def test_every_heading_explains_itself() -> None:
    for name in ("defenses", "attacks", "pareto", "compute"):
        assert all(column.tip for column in columns.of(name)), name
        assert len(set(columns.keys(name))) == len(columns.of(name))


def test_terminal_colours_only_the_separably_first() -> None:
    bold = re.findall(r"\x1b\[1m([^\x1b]*)", terminal.write([DEFENSES], colour=True))
    assert any("top_k" in text for text in bold)
    assert not any("none" in text for text in bold)


def test_markdown_is_a_table_with_bold_only_where_separable() -> None:
    lines = render([DEFENSES], "markdown").splitlines()
    assert lines[0] == "### Defenses: mlp · digits · default"
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 4 and len({len(row) for row in rows}) == 1
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
    assert r"**top\_k**" in rows[2] and "**" not in rows[3]
    assert set(rows[1]) <= set("|-: ")
    assert r"- \[low, high]: 95 % interval" in lines
    assert r"a \| b" in render([FLAGS], "markdown")


def test_csv_is_one_file_with_every_number_unrounded() -> None:
    rows = list(csv.DictReader(io.StringIO(render(BOARDS, "csv"))))
    assert [row["board"] for row in rows] == ["defenses", "defenses", "attacks", "attacks", "flags"]
    assert float(rows[0]["psnr"]) == 12.345 and rows[1]["psnr_low"] == "" and rows[2]["psnr"] == ""
    assert rows[0]["rank_low"] == "1" and rows[3]["rank_low"] == ""
    for row, line in zip(rows, DEFENSES.table.to_dict("records"), strict=False):
        assert {name for name in row if row[name]} - {"board", "title"} == {
            str(name) for name, value in line.items() if pd.notna(value) and value != ""
        }


def test_json_holds_every_number_and_null_for_none() -> None:
    boards = json.loads(render(BOARDS, "json"))["boards"]
    assert [board["name"] for board in boards] == ["defenses", "attacks", "flags"]
    assert boards[0]["rows"][0]["psnr"] == 12.345
    assert boards[0]["rows"][1]["psnr_low"] is None
    assert boards[1]["rows"][1]["rank_low"] is None and boards[1]["rows"][0]["rank_low"] == 1
    assert boards[0]["strong"] == [0] and boards[0]["notes"] == list(DEFENSES.notes)


def test_latex_escapes_and_balances() -> None:
    text = render(BOARDS, "latex")
    assert text.count(r"\begin{table*}") == text.count(r"\end{table*}") == 3
    assert r"\textbf{top\_k}" in text and r"\textbf{none}" not in text
    assert r"50 \% of \$ \& \#" in text
    assert r"$\geq$ \\ 20 dB, \%" in text
    assert r"seeds: 0, 1. {}[low, high]: 95 \% interval." in text
    assert r"\label{tab:gradleak-defenses}" in text and text.count(r"\caption{") == 3
    for block in text.split(r"\begin{tabular}")[1:]:
        columns = len(block[1 : block.index("}")])
        rows = [line for line in block.splitlines() if line.endswith(r" \\")]
        assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {columns - 1}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_ends_its_last_line_and_takes_an_empty_board(name: str) -> None:
    empty = Board("defenses", "Nothing", DEFENSES.table.head(0), notes=("no attack yet",))
    text = render([empty, ATTACKS], name)
    assert text.endswith("\n") and "mean-image" in text
    assert render([], name).strip() in ("", '{\n  "boards": []\n}')


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(GradleakError, match="unknown format 'markdwn'; did you mean 'markdown'"):
        render(BOARDS, "markdwn")


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_latex_compiles_and_fits_the_text(tmp_path: Path) -> None:
    odd = DEFENSES.table["defense"].to_list()
    odd[0] = "[x] & {é} % 'ε' 中 \\_^~ #1 $"
    many = pd.DataFrame({"flag": ["late"] * 60, "where": ["a · b · c " * 6] * 60, "why": ["much of it " * 9] * 60})
    boards = [replace(DEFENSES, table=DEFENSES.table.assign(defense=odd)), ATTACKS, Board("flags", "Doubts", many)]
    (tmp_path / "boards.tex").write_text(render(boards, "latex"), encoding="utf-8")
    packages = render(boards, "latex").splitlines()[0].removeprefix("% ")
    page = rf"\documentclass{{article}}{packages}\begin{{document}}\input{{boards}}\end{{document}}"
    (tmp_path / "page.tex").write_text(page)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
    made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout[-2000:]
    log = (tmp_path / "page.log").read_text(errors="replace")
    assert "Overfull" not in log and "too large" not in log and "multiply" not in log
