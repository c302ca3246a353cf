"""Leakage against the size of a sketch, from the published rows of benchmarks/papers/sketch.yaml.

    python benchmarks/papers/sketch_curve.py

A curve shows, for each size s, the mean PSNR of the strongest attack of the suite that inverts the desketched gradient
(oblivious) or matches in sketch space (public), with 95 % intervals over victims; lines mark what no defense leaks, the
floor, and where s is the number of unknown pixels. Writes sketch_curve.csv, .png and .svg beside the rows.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from gradleak.board.statistics import Interval, Resamples

PIXELS = 64


def curve(rows: pd.DataFrame) -> pd.DataFrame:
    """Return a line for every defense and knowledge: kind, size, noise and the strongest attack's PSNR, in dB.

    Raises:
        ValueError: a number is missing, so that victims would be compared with others.
    """
    if rows["psnr"].isna().any():
        raise ValueError("rows without PSNR: the run is not complete")
    lines = []
    for (defense, level), part in rows[rows["attack_family"] != "control"].groupby(["defense", "knowledge"]):
        options: dict[str, Any] = json.loads(part["config"].iloc[0])["defense"]["options"]
        lines.append(
            {
                "defense": defense,
                "knowledge": level,
                "kind": options.get("kind", "none"),
                "size": options.get("size"),
                "noise": bool(options.get("sigma")),
                **_best(part),
            }
        )
    floor = rows[rows["attack_family"] == "control"].groupby(["victim", "image"])["psnr"].mean()
    lines.append({"defense": "floor", "knowledge": "oblivious", "kind": "floor", "noise": False, "psnr": floor.mean()})
    return pd.DataFrame(lines).sort_values(["noise", "kind", "knowledge", "size"], ignore_index=True)


def draw(table: pd.DataFrame, path: Path) -> None:
    """Draw the curves; full lines know the sketch, dashed ones do not, dotted ones know it and face noise too."""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    sketches = table[table["size"].notna()]
    colours = {kind: f"C{number}" for number, kind in enumerate(sorted(sketches["kind"].unique()))}
    styles = {("public", False): "-", ("oblivious", False): "--", ("public", True): ":"}
    names = {
        ("public", False): "matched in sketch space",
        ("oblivious", False): "desketched gradient",
        ("public", True): "with noise of epsilon 7.8",
    }
    for (kind, noise), part in sketches.groupby(["kind", "noise"]):
        for level, line in part.groupby("knowledge"):
            place = (str(level), bool(noise))
            if place not in styles:
                continue
            axis.errorbar(
                line["size"],
                line["psnr"],
                yerr=np.abs(line[["low", "high"]].to_numpy() - line[["psnr"]].to_numpy()).T,
                marker=".",
                capsize=2,
                color=colours[kind],
                linestyle=styles[place],
                label=f"{kind}, {names[place]}",
            )
    for kind, text in (("none", "no defense"), ("floor", "mean image")):
        level = float(table.loc[table["kind"] == kind, "psnr"].iloc[0])
        axis.axhline(level, color="grey", linewidth=0.8)
        axis.text(PIXELS / 4, level, text, va="bottom", color="grey", fontsize=8)
    axis.axvline(PIXELS, color="grey", linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.set_xlabel(f"numbers sent, s (line: {PIXELS} unknown pixels)")
    axis.set_ylabel("PSNR of the strongest attack (dB)")
    axis.legend(fontsize=7, handlelength=4)
    # Neither date nor version goes in: equal results give equal files.
    figure.savefig(path.with_suffix(".png"), dpi=150, metadata={"Software": None})
    with plt.rc_context({"svg.hashsalt": path.name}):
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
    plt.close(figure)


def _best(part: pd.DataFrame) -> dict[str, float]:
    """PSNR of the attack of highest mean, with the interval of a maximum of means over victims."""
    values = part.pivot_table(index="attack", columns="victim", values="psnr").to_numpy()
    resamples = Resamples({"victims": values.shape[1]})
    interval: Interval = resamples.interval(resamples.means("victims", values).max(axis=0), maximum=True)
    return {"psnr": interval.estimate, "low": interval.low, "high": interval.high}


def main() -> None:
    """Read, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=Path("results/papers/sketch/rows.parquet"))
    options = parser.parse_args()
    table = curve(pd.read_parquet(options.rows))
    path = options.rows.with_name("sketch_curve")
    table.to_csv(path.with_suffix(".csv"), index=False, float_format="%.4f")
    draw(table, path)
    print(table.to_string(index=False, float_format="%.1f"))


if __name__ == "__main__":
    main()
