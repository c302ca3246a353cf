"""Reads what is written on a command line: times, shapes, numbers, plugins with their options."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import yaml

from ..errors import GradleakError

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


def seconds(text: str, flag: str) -> float:
    """Return the seconds of `90`, `90s`, `10m` or `1.5h`.

    Raises:
        GradleakError: the text is no time above 0.

    >>> seconds("1.5h", "--budget")
    5400.0
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    value = float(found[1]) * _UNITS[found[2]] if found else math.nan
    if not value > 0:
        raise GradleakError(f"{flag} {text}: write a time, such as 90s, 10m or 1h")
    return value


def shape(text: str, flag: str = "--shape") -> tuple[int, int, int]:
    """Return (C, H, W) of `3,32,32` or `3x32x32`.

    Raises:
        GradleakError: the text is no shape.

    >>> shape("3x32x32")
    (3, 32, 32)
    """
    parts = text.replace("x", ",").split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise GradleakError(f"{flag} {text}: write channels, height and width, such as 3,32,32")
    channels, height, width = (int(part) for part in parts)
    return channels, height, width


def whole_numbers(text: str, flag: str) -> list[int]:
    """Return the numbers of `3,1,1`.

    Raises:
        GradleakError: one of them is no number.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise GradleakError(f"{flag} {text}: write whole numbers, such as 3,1,1")
    return [int(part) for part in parts]


def options(given: Sequence[str], flag: str = "--options") -> dict[str, Any]:
    """Return options of `'{lr: 0.1}'` or `lr=0.1`, several of which add up.

    Raises:
        GradleakError: one is neither.

    >>> options(["lr=0.1", "{signed: true, widths: [8, 8]}"])
    {'lr': 0.1, 'signed': True, 'widths': [8, 8]}
    """
    found: dict[str, Any] = {}
    for text in given:
        try:
            name, equals, value = text.partition("=")
            parsed = {name: yaml.safe_load(value)} if equals and name.isidentifier() else yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise GradleakError(f"{flag} {text}: not valid YAML ({' '.join(str(error).split())})") from error
        if not isinstance(parsed, dict):
            raise GradleakError(f"{flag} {text}: write '{{name: value}}' or name=value")
        found |= parsed
    return found


def plugin(text: str, flag: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the options of `name` or `'name: {option: value}'`.

    Raises:
        GradleakError: it is neither.

    >>> plugin("top-k: {ratio: 0.1}", "--defense")
    ('top-k', {'ratio': 0.1})
    """
    try:
        parsed = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise GradleakError(f"{flag} {text}: not valid YAML ({' '.join(str(error).split())})") from error
    if isinstance(parsed, str):
        return parsed, {}
    if isinstance(parsed, dict) and len(parsed) == 1:
        (name, given), *_ = parsed.items()
        if isinstance(name, str) and isinstance(given, dict | None):
            return name, given or {}
    raise GradleakError(f"{flag} {text}: write a name, or 'name: {{option: value}}'")


def numbers(text: str, flag: str) -> list[float]:
    """Return the numbers of `0.5,0.5,0.5`.

    Raises:
        GradleakError: one of them is no number.
    """
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise GradleakError(f"{flag} {text}: write numbers, such as 0.5,0.5,0.5") from error
    if not all(map(math.isfinite, found)):
        raise GradleakError(f"{flag} {text}: finite numbers are needed")
    return found
