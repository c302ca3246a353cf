"""Small integers as bytes: what quantising defenses really send."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def pack_bits(values: Tensor, bits: int) -> bytes:
    """Encode integers in [0, 2^bits), any shape, with `bits` each; ceil(count * bits / 8) bytes."""
    numbers = values.detach().flatten().to("cpu", torch.int64).numpy()
    digits = (numbers[:, None] >> np.arange(bits)) & 1
    return np.packbits(digits.astype(np.uint8)).tobytes()


def unpack_bits(data: bytes, count: int, bits: int) -> Tensor:
    """Decode `count` integers [count], int64; the inverse of `pack_bits`."""
    digits = np.unpackbits(np.frombuffer(data, np.uint8), count=count * bits).reshape(count, bits)
    return torch.from_numpy((digits.astype(np.int64) << np.arange(bits)).sum(1))


def pack_floats(values: Tensor) -> bytes:
    """Encode numbers, any shape, as float32."""
    return bytes(values.detach().to("cpu", torch.float32).numpy().tobytes())
