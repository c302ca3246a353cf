"""Where things are in a network, found by running it and verified: its head, its layers on the pixels, its chain.

Nothing here depends on the order in which modules are registered, nor on what they are called. Probes are run on
private copies of parameters and buffers in eval mode; the module is left as it was, and so is the global generator.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch import nn

from ..errors import GradleakError
from .found import NO_HEAD, Head, Link, OnPixels, Shape, Structure
from .marks import mark, mark_sent, sent_of, shape_of
from .probe import find

_KNOWN: WeakKeyDictionary[nn.Module, dict[object, Structure]] = WeakKeyDictionary()


def of(module: nn.Module, shape: Shape | None = None) -> Structure:
    """Return the structure of a network, found once for each module object.

    Args:
        module: the network, images [B, C, H, W] in [0, 1] to logits [B, K].
        shape: of an image, (C, H, W); by default what the network was built for.

    Raises:
        GradleakError: the shape is not known, or the network does not turn images of it into logits.
    """
    shape = shape or shape_of(module)
    if shape is None:
        raise GradleakError(
            "structure: the shape of the images that the network takes is not known; state it by "
            "structure.mark(module, (C, H, W))"
        )
    known, key = _KNOWN.setdefault(module, {}), (tuple(shape), sent_of(module))
    if key not in known:
        known[key] = find(module, shape)
    return known[key]


__all__ = [
    "NO_HEAD",
    "Head",
    "Link",
    "OnPixels",
    "Shape",
    "Structure",
    "mark",
    "mark_sent",
    "of",
    "sent_of",
    "shape_of",
]
