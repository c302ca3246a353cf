"""Checks of single values of a suite."""

from __future__ import annotations

from typing import Any

from pydantic_core import PydanticCustomError


def printable(text: str) -> str:
    """Refuse what is no single line of text."""
    if not text.isprintable():
        raise PydanticCustomError("printable", "Input should be one line without control characters")
    return text


def no_path(name: str) -> str:
    """Refuse a name that would be a path."""
    if "/" in name or "\\" in name:
        raise PydanticCustomError("name", "Input should be a name, without / and \\")
    return name


def width(value: Any) -> Any:
    """Take a number of trials, or auto."""
    if value != "auto" and not (type(value) is int and 1 <= value < 2**63):
        raise ValueError("a number of trials (1 or more), or auto")
    return value


def batch(value: Any) -> Any:
    """Take a number of images, or setting."""
    if value != "setting" and not (type(value) is int and 1 <= value < 2**63):
        raise PydanticCustomError("batch", "Input should be a number of images (1 or more), or setting")
    return value


def entry(value: Any) -> Any:
    """Return the long form of `name` or `{name: {options}}`."""
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, dict) and len(value) == 1 and "name" not in value:
        name, options = next(iter(value.items()))
        return {"name": name, "options": {} if options is None else options}
    return value


def several(value: Any) -> Any:
    """Return one value as a list of it."""
    return value if isinstance(value, list) else [value]
