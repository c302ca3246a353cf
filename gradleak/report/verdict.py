"""What boards say, in sentences made from their numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from ..board.leaderboard import FLOOR, Board
from ..board.results import KNOWLEDGE
from ..scales import CAP

PRICE = 0.05
"""Share of accuracy that a defense may lose and still be called cheap."""
NAMED = 5
"""Names that a sentence lists."""


def of_defenses(board: Board) -> list[str]:
    """Say which defenses hold at what price, what may be wrong with that, and what happens without one."""
    table = board.table
    if not len(table):
        return ["No attack has faced any defense yet."]
    held = table[table["standing"] == FLOOR]
    return [_holding(table, held), *_doubtful(held), *_unranked(table), *_bare(table)]


def _holding(table: pd.DataFrame, held: pd.DataFrame) -> str:
    count = f"{len(held)} of {_count(len(table), 'defense')}"
    stay = "stays" if len(held) == 1 else "stay"
    if not len(held):
        return f"None of {_count(len(table), 'defense')} is shown to stay at the floor."
    if table["accuracy_lost"].isna().all():
        cost = "it costs" if len(held) == 1 else "they cost"
        return f"{count} {stay} at the floor: {_names(held['defense'])}. What {cost} in accuracy was not measured."
    cheap = held[held["accuracy_lost"] < PRICE]
    if not len(cheap):
        return f"{count} {stay} at the floor, none of them known to lose under {100 * PRICE:g} points of accuracy."
    verbs = "stays at the floor and loses" if len(cheap) == 1 else "stay at the floor and lose"
    first = f"{len(cheap)} of {_count(len(table), 'defense')} {verbs} under {100 * PRICE:g} points of accuracy"
    dear = len(held) - len(cheap)
    more = f" {dear} more {'stays' if dear == 1 else 'stay'} there at a higher or unknown price." if dear else ""
    return f"{first}: {_names(cheap['defense'])}.{more}"


def _doubtful(held: pd.DataFrame) -> list[str]:
    """Say which of the defenses at the floor may only look safe."""
    doubtful = held.loc[held["doubt"] != "", "defense"]
    if not len(doubtful):
        return []
    who = "All of these" if len(doubtful) == len(held) and len(held) > 1 else _names(doubtful)
    verb = "carries" if len(doubtful) == 1 else "carry"
    return [f"{who} {verb} a doubt: a better attack may still break {'it' if len(doubtful) == 1 else 'them'}."]


def _unranked(table: pd.DataFrame) -> list[str]:
    missing = int(table["rank_low"].isna().sum())
    if not missing:
        return []
    verb = "was" if missing == 1 else "were"
    return [f"{missing} of {len(table)} {verb} not fully evaluated and {'has' if missing == 1 else 'have'} no rank."]


def _bare(table: pd.DataFrame) -> list[str]:
    """Say what attacks recover where nobody defends."""
    bare = table[table["family"] == "none"]
    if len(bare) != 1 or bare["success_psnr_20"].isna().any():
        return []
    shares = [float(bare[f"success_psnr_{line}"].iloc[0]) for line in ("20", f"{CAP:g}")]
    exact = "" if math.isnan(shares[1]) else f", {100 * shares[1]:.0f} % pixel-exact"
    return [f"Without a defense {100 * shares[0]:.0f} % of images are recovered{exact}."]


def of_attacks(board: Board) -> list[str]:
    """Say which attack leads, by how much, and which break what others do not."""
    table = board.table
    ranked = table[table["rank_low"].notna()] if len(table) else table
    if not len(ranked):
        return ["No attack ran on enough cells to be ranked."]
    first = [_attack(line) for line in ranked[ranked["rank_low"] == 1].to_dict("records")]
    lead = ranked.iloc[0]
    gain = f"{lead['above']:.1f} dB above the floor on average"
    if len(first) == 1:
        said = f"{first[0]} leads, {gain}; it sets {_count(int(lead['sets']), 'worst case')}."
    else:
        said = f"{_names(first)} share the first rank; the best, {first[0]}, gets {gain}."
    if lead["above_low"] <= 0:
        said = f"No attack is surely above the floor; {first[0]} comes closest."
    specialists = table[table["rank_low"].isna() & (table["breaks"] != "") & ~table["control"].astype(bool)]
    names = list(dict.fromkeys(specialists["attack"]))
    return [said, *([f"Specialists that break some defenses: {_names(names)}."] if names else [])]


def _attack(line: Mapping[Any, Any]) -> str:
    knowledge = line["knowledge"]
    return str(line["attack"]) if knowledge == KNOWLEDGE[0] else f"{line['attack']} ({knowledge})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _names(names: Sequence[str] | pd.Series[str]) -> str:
    """List names, the first few where there are many."""
    known = list(names)
    if len(known) > NAMED:
        return f"{', '.join(known[:NAMED])} and {len(known) - NAMED} more"
    return f"{', '.join(known[:-1])} and {known[-1]}" if len(known) > 1 else "".join(known)


def of_setting(setting: Mapping[str, Any], knowledge: Sequence[str]) -> str:
    """Say in words what a setting of a configuration means."""
    images, steps = int(setting.get("batch_size", 1)), int(setting.get("local_steps", 1))
    trained = f"trains {_count(steps, 'local step')} on" if setting.get("local_lr") else "computes one gradient of"
    epochs = int(setting.get("epochs", 0))
    network = f"a network trained for {_count(epochs, 'epoch')}" if epochs else "an untrained network"
    after, rounds = int(setting.get("after_rounds", 0)), int(setting.get("rounds", 1))
    if after:
        network = f"{network}, after {_count(after, 'round')} of federated training under the same defense"
    known = ", ".join(_grants(setting.get("grants") or {}, knowledge))
    client = f"A client {trained} {_count(images, 'image')} with {network}"
    sent, seen = ("once", "this message") if rounds == 1 else (f"{rounds} times, with new randomness", "these messages")
    server = setting.get("server") or {}
    if server:
        what = "the model's parameters" if server.get("surface") == "parameters" else "the model's layers"
        before = f"A malicious server ({server.get('name')}) changes {what} before it sends them."
        return f"{client}. {before} It sees what the client sends, and is given {known}."
    return f"{client} and sends the result {sent}. The attacker sees {seen} and the model, and is given {known}."


def _grants(grants: Mapping[str, Any], knowledge: Sequence[str]) -> list[str]:
    found = []
    if grants.get("labels") == "known":
        found.append("the labels")
    if grants.get("auxiliary"):
        found.append("public images of the same kind")
    if grants.get("generator"):
        found.append("a generator of such images")
    if grants.get("batch_norm", "none") != "none":
        found.append(f"{grants['batch_norm']} batch normalisation statistics")
    if grants.get("local_training"):
        found.append("how the client trains")
    levels = [level for level in knowledge if level != KNOWLEDGE[0]]
    return [*found, f"in some attacks the defense ({', '.join(levels)})"] if levels else found or ["nothing else"]
