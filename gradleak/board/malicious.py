"""The board of malicious servers, which shares no worst case with that of honest ones; and what clients see of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from ..scales import CAP
from .cost import operating_point
from .provenance import Provenance
from .results import CONTEXT, HEADLINE, KNOWLEDGE, Panel, Results, luck_of
from .schema import HONEST, server_of
from .statistics import Floats, Interval, Resamples, ends, mean_over_known, wilson
from .tables import Board

EXACT = 1e-6
"""Mean squared error below which an image counts as recovered exactly."""
ALIKE = 18.0
"""dB above which an image that a decoder draws counts as recovered, as where such a server was published."""

Place = tuple[str, ...]
"""A model, dataset, setting and defense."""


def malicious_board(results: Results) -> Board:
    """Return how many images each malicious server gets out of a batch under each defense, the most first.

    `recovered` is the mean number of images of a victim's batch that come back exactly under the worst attack, with its
    interval; `expected` what the server's formula says, `honest` what the worst attack gets from an honest server
    of the same clients. `best_image` is the PSNR of each victim's best image.
    """
    part = results.malicious if (results.cells["server"] != HONEST).any() else None
    lines = [] if part is None else list(_lines(part, _honest_counts(results)))
    table = pd.DataFrame(lines)
    if lines:
        order = ["server", "model", "dataset", "setting", "recovered", "defense"]
        table = table.sort_values(order, ascending=[True] * 4 + [False, True], kind="stable", ignore_index=True)
    notes = (
        f"exact: mean squared error below {EXACT:g}, images of a batch under the worst attack; [low, high]: 95 % "
        f"interval over victims. Where a decoder draws the images, those with a PSNR above {ALIKE:g} dB",
        "no worst case is taken over malicious and honest servers; honest: exact images of the worst attack on an "
        "honest server of the same clients",
        "refused: a client that looked at the model sent nothing, which scores the floor; false alarms: honest rounds "
        "that it refuses, on images and models that set no threshold",
        "class: threat model of Carletti et al. (USENIX Security 2025): F chooses the model, G knows public images too",
    )
    return Board("malicious", "Malicious servers", table, notes)


def one_kind(results: Results) -> Results:
    """Return the results of honest servers, or, where there are none, those of malicious ones: never both."""
    return results.honest if (results.cells["server"] == HONEST).any() else results


def server_boards(results: Results) -> list[Board]:
    """Return the boards of malicious servers and of what clients see of them; empty ones are left out."""
    return [board for board in (malicious_board(results), detection_board(results)) if len(board.table)]


def detection_board(results: Results) -> Board:
    """Return what share of rounds each defense that looks at the model refuses, server by server."""
    lines = []
    looked = results.cells[[bool(facts and facts.get("inspection")) for facts in results.cells["provenance"]]]
    for cell in looked.to_dict("records"):
        seen = Provenance.of(cell["provenance"]).inspection
        if seen is None:
            continue
        name = {"defense": cell["defense"], "server": cell["server"], **{each: cell[each] for each in CONTEXT}}
        facts = {"refused": seen.refused, "false_alarms": seen.false_alarms, "honest_rounds": seen.honest_rounds}
        lines.append({**name, "batch_size": cell["batch_size"], "seed": cell["seed"], **facts})
    found = pd.DataFrame(lines)
    notes = (
        "refused: share of victims whose clients send nothing; false alarms: the same for honest models, untrained and "
        "during training, on other images than those that set the threshold",
    )
    if not lines:
        return Board("detection", "Detection", found, notes)
    # Attacks share rounds; seeds do not.
    keys = ["defense", "server", *CONTEXT, "batch_size"]
    once = found.drop_duplicates([*keys, "seed"])
    table = once.groupby(keys).agg(
        refused=("refused", "mean"), false_alarms=("false_alarms", "mean"), honest_rounds=("honest_rounds", "sum")
    )
    table = table.reset_index()
    alarms = [wilson(rate, count) for rate, count in zip(table["false_alarms"], table["honest_rounds"], strict=True)]
    table["false_alarms_low"], table["false_alarms_high"] = [a.low for a in alarms], [a.high for a in alarms]
    return Board("detection", "Detection", table, notes)


def _lines(part: Results, honest: Mapping[Place, float]) -> Iterator[dict[str, Any]]:
    panel, counts = part.panel, _counts(part)
    best = _per_victim(part, part.rows[HEADLINE].clip(upper=CAP), "max")
    for place, entries in _places(panel):
        config, facts = _of_place(part.cells, place)
        index = entries.index.to_numpy()
        found, winner = _worst(panel, index, counts, config["setting"]["batch_size"])
        facts_of_winner = panel.entries.loc[winner]
        server, looked = facts.get("server") or {}, facts.get("inspection") or {}
        line: dict[str, Any] = dict(zip((*CONTEXT, "defense"), place, strict=True))
        line |= {"server": server_of(config), "surface": config["setting"]["server"].get("surface", "")}
        line |= {"threat_class": part.cells.loc[part.cells["setting"] == place[2], "threat_class"].iloc[0]}
        line |= {"images": config["setting"]["batch_size"], **ends("recovered", found)}
        line |= {"attack": facts_of_winner["attack"], "knowledge": facts_of_winner["knowledge"]}
        line |= {name: server.get(name) for name in ("expected", "queries", "added_parameters", "added_bytes")}
        line |= {"honest": honest.get(_client(config, place), math.nan)}
        line |= {"tampered_accuracy": server.get("accuracy"), "model_accuracy": facts.get("model_accuracy")}
        line |= {"best_image": float(np.nanmax(mean_over_known(best[index].T)))}
        line |= {"psnr": float(entries["mean"].max()), "psnr_floor": panel.floor_of(*place)}
        line |= {"refused": looked.get("refused"), "false_alarms": looked.get("false_alarms")}
        yield line


def _honest_counts(results: Results) -> dict[Place, float]:
    """Return how many images come back exactly from an honest server, by client and defense."""
    if (results.cells["server"] != HONEST).all():
        return {}
    part = results.honest
    counts = _counts(part)
    found: dict[Place, float] = {}
    for place, entries in _places(part.panel):
        config, _ = _of_place(part.cells, place)
        worst, _ = _worst(part.panel, entries.index.to_numpy(), counts, config["setting"]["batch_size"])
        client = _client(config, place)
        found[client] = max(found.get(client, 0.0), worst.estimate)
    return found


def _client(config: Mapping[str, Any], place: Place) -> Place:
    """Return what tells clients apart, whatever their server is."""
    setting = config["setting"]
    more = (setting.get("mode"), setting.get("epochs"), setting.get("precision"))
    return (*operating_point(place[0], place[1], config), *map(str, more), place[3])


def _places(panel: Panel) -> Iterator[tuple[Place, pd.DataFrame]]:
    """Yield the attacks that count in every context and under every defense."""
    entries = panel.entries
    counted = entries[~entries["control"] & entries["knowledge"].isin(KNOWLEDGE)]
    for names, group in counted.groupby([*CONTEXT, "defense"]):
        yield tuple(map(str, names)), group


def _of_place(cells: pd.DataFrame, place: Place) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a configuration, and what is known of the server and the clients, averaged over seeds."""
    chosen = np.logical_and.reduce(
        [cells[name] == label for name, label in zip((*CONTEXT, "defense"), place, strict=True)]
    )
    configs, facts = list(cells.loc[chosen, "config"]), list(map(Provenance.of, cells.loc[chosen, "provenance"]))
    found: dict[str, Any] = {"model_accuracy": _mean([each.model_accuracy for each in facts])}
    for part in ("server", "inspection"):
        known = [asdict(each) for each in (getattr(fact, part) for fact in facts) if each is not None]
        names = {name for each in known for name, value in each.items() if isinstance(value, int | float)}
        found[part] = {name: _mean([each.get(name) for each in known]) for name in names}
    return configs[0], found


def _mean(values: list[Any]) -> float:
    known = [float(value) for value in values if value is not None]
    return float(np.mean(known)) if known else math.nan


def _counts(part: Results) -> Floats:
    """Return images recovered [entries, victims], the mean over seeds; what failed or was refused recovers none."""
    rows = part.rows
    alike = {key for key, facts in zip(part.cells["key"], part.cells["provenance"], strict=True) if _draws(facts)}
    lost = rows["failed"] | rows["refused"]
    exact = (rows["mse"] < EXACT) & ~lost
    drawn = (rows[HEADLINE] > ALIKE) & ~lost
    return _per_victim(part, exact.where(~rows["key"].isin(alike), drawn).astype(float), "sum")


def _draws(facts: Mapping[str, Any] | None) -> bool:
    server = Provenance.of(facts).server
    return server is not None and server.counts == "alike"


def _per_victim(part: Results, values: pd.Series[float], over_images: str) -> Floats:
    """Return values [entries, victims] of rows, a sum or maximum over a victim's images, the mean over seeds."""
    rows, panel = part.rows, part.panel
    ranks = rows.groupby("stratum")["victim"].rank(method="dense").astype(int).to_numpy() - 1
    keys = pd.DataFrame({"entry": panel.entry_of_row, "victim": ranks, "seed": rows["seed"].to_numpy()})
    summed = values.reset_index(drop=True).groupby([keys["entry"], keys["victim"], keys["seed"]]).agg(over_images)
    means = summed.groupby(level=[0, 1]).mean()
    found = np.full((len(panel.entries), max(panel.clusters.values(), default=0)), np.nan)
    found[means.index.get_level_values(0), means.index.get_level_values(1)] = means.to_numpy()
    return found


def _worst(panel: Panel, entries: Any, counts: Floats, images: int) -> tuple[Interval, int]:
    """Return the most images that any of some entries recovers, with its interval, and which entry that is."""
    stratum = panel.stratum(int(entries[0]))
    resamples = Resamples({stratum: panel.clusters[stratum]})
    values = counts[entries][:, : panel.clusters[stratum]]
    means = resamples.means(stratum, values)
    leader = int(np.argmax(np.nan_to_num(means[:, 0], nan=-1.0)))
    largest: Floats = np.fmax.reduce(means, axis=0)
    ordered = means[np.argsort(-means[:, 0], kind="stable")]
    found = resamples.interval(largest, maximum=True, scale=(0.0, float(images)), luck=luck_of(ordered, resamples))
    # No fewer than none, and no more than there are.
    return Interval(found.estimate, max(0.0, found.low), min(float(images), found.high)), int(entries[leader])
