"""Puts the published boards into README.md, between their markers, from results/*/defenses.csv.

python benchmarks/readme.py
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

ROOT = Path(__file__).parents[1]


HEAD = (
    "| defense | standing | images ≥ 20 dB, % | exact, % | PSNR, dB | floor | worst attack | accuracy | lost, points "
    "| bytes | epsilon | doubt |\n"
    "| --- | --- | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: | --- |"
)


def board(folder: Path) -> str:
    """Return a published report's first board as a Markdown table, the safest defense first."""
    table = pd.read_csv(folder / "defenses.csv", low_memory=False)
    lines = [HEAD, *map(_line, table.to_dict("records"))]
    return "\n".join([f"{table['title'].iloc[0]}:", "", *lines])


def _line(row: Mapping[Any, Any]) -> str:
    cells = [
        row["defense"],
        _text(row["standing"]),
        f"{row['success_psnr_20']:.0%}".rstrip("%"),
        f"{row['success_psnr_54']:.0%}".rstrip("%"),
        f"{row['psnr']:.1f} [{row['psnr_low']:.1f}, {row['psnr_high']:.1f}]",
        f"{row['psnr_floor']:.1f}",
        row["psnr_attack"],
        _or_dash(row["test_accuracy"], ".1%"),
        _or_dash(100 * row["accuracy_lost"], ".1f"),
        f"{row['bytes']:,.0f}",
        _or_dash(row["epsilon"], ",.1f"),
        _text(row["doubt"]),
    ]
    return f"| {' | '.join(cells)} |"


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _or_dash(value: float, form: str) -> str:
    return "-" if pd.isna(value) else format(value, form)


def main() -> None:
    """Rewrite every block `<!-- board:NAME -->` … `<!-- end -->` of the README."""
    readme = ROOT / "README.md"

    def block(match: re.Match[str]) -> str:
        return f"{match[1]}\n\n{board(ROOT / 'results' / match[2])}\n\n<!-- end -->"

    text = re.sub(r"(<!-- board:(\w+) -->).*?<!-- end -->", block, readme.read_text(), flags=re.DOTALL)
    readme.write_text(text)


if __name__ == "__main__":
    main()
