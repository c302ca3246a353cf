"""Labels of parts, made distinct where one label stands for different options."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pandas as pd


def distinct(cells: pd.DataFrame, group: str) -> pd.Series[str]:
    """Return the labels of a group, made distinct where one label stands for different options."""
    # Thousands of cells share a few parts, and comparing parts costs a tenth of flattening them.
    known: dict[str, list[tuple[Any, dict[str, str]]]] = {}
    places = []
    for label, config in zip(cells[group].tolist(), cells["config"].tolist(), strict=True):
        variants, part = known.setdefault(label, []), _part(config, group)
        place = next((place for place, (other, _) in enumerate(variants) if other == part), len(variants))
        if place == len(variants):
            variants.append((part, options_of(config, group)))
        places.append((label, place))
    named = {
        (label, place): _named(label, place, [flat for _, flat in variants])
        for label, variants in known.items()
        for place in range(len(variants))
    }
    return pd.Series([named[each] for each in places], index=cells.index, dtype=str)


def _named(label: str, place: int, variants: list[dict[str, str]]) -> str:
    names = sorted({name for other in variants for name in other})
    differ = [name for name in names if len({other.get(name) for other in variants}) > 1]
    detail = ", ".join(f"{name}={variants[place].get(name, '-')}" for name in differ)
    return f"{label} ({detail})" if detail else label


def _part(config: Mapping[str, Any], group: str) -> Any:
    """Return all that `options_of` reads."""
    part = config[group]
    if group != "setting":
        return part
    return part, config.get("candidates"), config.get("engine"), config.get("secret")


def options_of(config: Mapping[str, Any], group: str) -> dict[str, str]:
    """Flatten a part of a configuration to comparable text; what is an axis of its own is left out.

    What applies to every cell alike (candidates of re-identification, the engine, the secret that clients draw from)
    counts as the setting's.
    """
    part = {name: value for name, value in config[group].items() if name != "label"}
    if group == "setting":
        part |= {"candidates": config.get("candidates"), **config.get("engine", {}), "secret": config.get("secret")}
        part["grants"] = {name: value for name, value in part.get("grants", {}).items() if name != "defense"}
        if "server" in part:
            part["server"] = json.dumps(part["server"], sort_keys=True)
    flat: dict[str, str] = {}
    for name, value in part.items():
        value = _asked(value)
        if isinstance(value, Mapping):
            flat |= {inner: json.dumps(item, sort_keys=True) for inner, item in value.items()}
        else:
            flat[name] = (
                value[:8] if name in ("digest", "code", "secret") and value else json.dumps(value, sort_keys=True)
            )
    return flat


def _asked(options: Any) -> Any:
    """Leave out the noise that was found for a wanted epsilon: it differs from context to context by right."""
    if isinstance(options, list):  # the options of a chain's members
        return [_asked(each) for each in options]
    if not isinstance(options, Mapping):
        return options
    found = options.get("epsilon") is not None
    return {name: _asked(value) for name, value in options.items() if not (found and name == "sigma")}
