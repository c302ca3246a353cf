"""Puts the published boards into README.md, between their markers, from results/*/leaderboard.csv.

python benchmarks/readme.py
"""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parents[1]


def board(folder: Path) -> str:
    """Return a published report's largest board of one context as a Markdown table, the safest defense first."""
    table = pd.read_csv(folder / "leaderboard.csv", low_memory=False)
    table = table[(table["board"] == "defenses") & ~table["title"].str.contains("mean over")]
    table = table[table["title"] == table["title"].value_counts().idxmax()]
    lines = [
        "| defense | worst case, PSNR dB | attack | floor | re-identified | test accuracy | bytes "
        "| epsilon of one message |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in table.to_dict("records"):
        said = ", ".join(row[name] for name in ("standing", "doubt") if isinstance(row[name], str))
        badge = f" ({said})" if said else ""
        lines.append(
            f"| {row['defense']}{badge} | {row['psnr']:.1f} [{row['psnr_low']:.1f}, {row['psnr_high']:.1f}]"
            f" | {row['psnr_attack']} | {row['psnr_floor']:.1f} | {row['reidentified']:.0%}"
            f" | {_or_dash(row['test_accuracy'], '.1%')} | {row['bytes']:,.0f} | {_or_dash(row['epsilon'], ',.1f')} |"
        )
    return "\n".join([f"{table['title'].iloc[0]}:", "", *lines])


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
