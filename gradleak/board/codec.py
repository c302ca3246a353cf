"""Numbers and arrays to what a table holds, and back; what comes back is measured before it is believed."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from .schema import Array, ImageRow

MOST_BYTES = 2**31
"""Bytes of one array, unpacked: more than any batch of images that an attack ever returned."""

_KINDS = "fiub"
"""Kinds of NumPy numbers that a store holds."""


def pack(array: Array) -> tuple[str, str, bytes]:
    """Return shape, type and compressed content of an array."""
    array = np.ascontiguousarray(array)
    return json.dumps(array.shape), array.dtype.str, zlib.compress(array.tobytes(), level=1)


def unpack(shape: str, dtype: str, data: bytes) -> Array:
    """Return what `pack` packed.

    Raises:
        ValueError: it is no array, not of plain numbers, too large, or its content has another length.
    """
    sides = json.loads(shape)
    if not isinstance(sides, list) or len(sides) > 8 or not all(type(side) is int and side >= 0 for side in sides):
        raise ValueError(f"no shape: {shape[:40]}")
    kind = _dtype(dtype)
    size = math.prod(sides) * kind.itemsize
    if size > MOST_BYTES:
        raise ValueError(f"{size} bytes (at most {MOST_BYTES})")
    if not isinstance(data, bytes):
        raise ValueError("no bytes")
    reader = zlib.decompressobj()
    try:
        content = reader.decompress(data, size + 1)
    except zlib.error as error:
        raise ValueError(f"damaged content ({error})") from error
    if len(content) != size or not reader.eof or reader.unused_data:
        raise ValueError("content of another length than its shape")
    return np.frombuffer(content, dtype=kind).reshape(sides).copy()


def _dtype(text: str) -> np.dtype[Any]:
    try:
        kind = np.dtype(text)
    except (TypeError, ValueError, SyntaxError) as error:
        raise ValueError(f"no type of numbers: {text[:20]!r}") from error
    if kind.kind not in _KINDS or kind.itemsize > 8 or kind.fields or kind.subdtype:
        raise ValueError(f"no type of numbers: {text[:20]!r}")
    return kind


def dump(value: Any) -> str:
    """Return plain data as JSON of one form."""
    return json.dumps(plain(value), sort_keys=True, allow_nan=False)


def plain(value: Any) -> Any:
    """Return plain data: NumPy numbers as Python's, and None for what is not finite (JSON has no NaN)."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def row_values(row: ImageRow, traces: Mapping[int, Array]) -> tuple[Any, ...]:
    """Return a row as the table holds it; late progress comes from the trace if it was left out."""
    values = asdict(row)
    if row.late_progress is None and row.victim in traces:
        values["late_progress"] = late_progress(traces[row.victim])
    return tuple(dump(value) if name == "extras" else plain(value) for name, value in values.items())


def late_progress(trace: Array) -> float | None:
    """Return the share of a loss's fall that came in the last tenth of its trace [T], in [0, 1].

    Losses are taken as best so far. None where nothing fell or fewer than ten losses are there.
    """
    losses = np.asarray(trace, dtype=float)
    losses = losses[np.isfinite(losses)]
    if len(losses) < 10:
        return None
    best = np.minimum.accumulate(losses)
    fall = best[0] - best[-1]
    return float((best[-1 - len(best) // 10] - best[-1]) / fall) if fall > 0 else None
