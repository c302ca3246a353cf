"""What a defense costs and guarantees: bytes, seconds, epsilon, and the accuracy that training under it leaves."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from ..privacy import Guarantee
from .provenance import Provenance
from .results import CONTEXT, UNDEFENDED, Results
from .statistics import LEVEL, ends, over_seeds


def price(provenance: pd.Series[Any]) -> dict[str, Any]:
    """Return what a defense costs and guarantees; the weakest guarantee where several settings differ."""
    facts = [Provenance.of(fact) for fact in provenance]
    line: dict[str, Any] = {
        "bytes": _mean(fact.bytes for fact in facts),
        "dense_bytes": _mean(fact.dense_bytes for fact in facts),
        "client_seconds": _mean(fact.client_seconds for fact in facts),
    }
    looked = [fact.inspection.false_alarms for fact in facts if fact.inspection is not None]
    line["false_alarms"] = float(np.mean(looked)) if looked else math.nan
    # A cell that failed says nothing of its guarantee.
    weakest = _weakest(fact.epsilon for fact in facts if fact.epsilon is not None)
    line["epsilon"] = math.nan if weakest is None else weakest.epsilon
    line["delta"] = math.nan if weakest is None else weakest.delta
    line["noise"] = math.nan if weakest is None or weakest.noise is None else weakest.noise
    line["accountant"] = "" if weakest is None else weakest.accountant
    line["unit"] = "" if weakest is None else weakest.unit
    return line


def _weakest(guarantees: Iterable[Any]) -> Guarantee | None:
    """Return the weakest guarantee, None if anything has none."""
    found = list(guarantees)
    if not found or not all(isinstance(each, Guarantee) for each in found):
        return None
    weakest: Guarantee = max(found, key=lambda each: each.epsilon)
    return weakest


def _mean(values: Iterable[float | None]) -> float:
    """Return the mean of what is known, NaN if nothing is."""
    return float(pd.Series(list(values), dtype=float).mean())


def guarantees(results: Results) -> list[str]:
    """Say what the epsilons are of, what neighbouring inputs differ in, and who computed them."""
    facts = map(Provenance.of, [*results.cells["provenance"], *_of_the_attacked(results)["provenance"]])
    made = {
        f"delta {each.delta:g}, {each.accountant}, neighbours: {each.unit.partition(',')[0]}"
        for fact in facts
        for each in (fact.epsilon, fact.training_epsilon)
        if isinstance(each, Guarantee)
    }
    if not made:
        return []
    return [
        "epsilon: of all that the attacker saw of an example: its message, or where clients are summed up the sum; "
        f"training epsilon: of every message of the training run; {'; '.join(sorted(made))}"
    ]


def operating_point(model: str, dataset: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what tells one client from another: its model and dataset, batch, local steps and what it trains."""
    setting = config["setting"]
    steps = (setting.get("batch_size", 1), setting.get("local_steps", 1), setting.get("local_batch_size"))
    rest = (setting.get("local_lr"), setting.get("trainable", "all"))
    return (model, dataset, *map(str, (*steps, *rest)))


def accuracies(results: Results) -> pd.DataFrame:
    """Return all cells, attacked or trained, with the `accuracy` and `guarantee` of training under their defense.

    Of trainings only those of a client that is attacked here: with the same batch and local steps.
    """
    names = [*CONTEXT, "attack", "seed", "defense", "defense_family", "provenance"]
    cells = pd.concat([results.cells[names], _of_the_attacked(results)[names]], ignore_index=True)
    facts = [Provenance.of(fact) for fact in cells.pop("provenance")]
    known = [each.training_epsilon if isinstance(each.training_epsilon, Guarantee) else None for each in facts]
    accuracy = pd.to_numeric(pd.Series([each.test_accuracy for each in facts], dtype=object))
    cells = cells.assign(accuracy=accuracy, guarantee=pd.Series(known, dtype=object))
    return cells[cells["accuracy"].notna() | cells["guarantee"].notna()]


def _of_the_attacked(results: Results) -> pd.DataFrame:
    """Return the trainings of clients that are attacked."""
    attacked = {operating_point(*each) for each in _places(results.cells)}
    own = [operating_point(*each) in attacked for each in _places(results.utility)]
    return results.utility.loc[np.array(own, dtype=bool)]


def _places(cells: pd.DataFrame) -> Iterable[tuple[Any, ...]]:
    return zip(*(cells[name].tolist() for name in ("model", "dataset", "config")), strict=True)


def utility(accuracies: pd.DataFrame, defense: str) -> dict[str, float]:
    """Return the accuracy that training under a defense leaves, what that is below no defense, and its guarantee.

    Intervals are over seeds, each with its mean over models and datasets; without a defense the same ones count.
    """
    same = [*CONTEXT, "attack", "seed"]
    chosen = accuracies[accuracies["defense"] == defense]
    if not len(chosen):
        nothing = over_seeds(np.array([]))
        return {**ends("test_accuracy", nothing), **ends("accuracy_lost", nothing), "training_epsilon": math.nan}
    known = accuracies[accuracies["accuracy"].notna()]
    own = known[known["defense"] == defense].groupby(same)["accuracy"].mean()
    bare = known[known["defense_family"] == UNDEFENDED].groupby(same)["accuracy"].mean()
    line = ends("test_accuracy", over_seeds(own.groupby("seed").mean().to_numpy()))
    line |= ends("accuracy_lost", over_seeds((bare - own).dropna().groupby("seed").mean().to_numpy()))
    weakest = _weakest(chosen["guarantee"])
    line["training_epsilon"] = math.nan if weakest is None else weakest.epsilon
    return line


def trainings(results: Results) -> list[str]:
    """Say how the models behind the accuracies were trained."""
    joined = _of_the_attacked(results)
    recipes = {json.dumps(config["attack"]["options"], sort_keys=True) for config in joined["config"]}
    seeds, others = joined["seed"].nunique(), len(results.utility) - len(joined)
    frozen = "accuracy: clients train with the model's own statistics of batch normalisation, also in mode train"
    by_batch = any(config["setting"].get("mode") == "train" for config in results.cells["config"])
    left_out = f"accuracy: {others} trainings are left out, whose clients have another batch or other local steps"
    said = [
        f"accuracy: {recipe['clients']} clients, {recipe['rounds']} rounds of {recipe['batch_size']} images a client, "
        f"{recipe['local_steps']} local step(s), server rate the best of {', '.join(map(str, recipe['lr']))} on "
        f"images held out; Student's {100 * LEVEL:.0f} % interval over {seeds} seeds"
        for recipe in map(json.loads, sorted(recipes))
    ]
    return said + [left_out] * bool(others) + [frozen] * (by_batch and len(joined) > 0)
