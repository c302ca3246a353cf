"""Images as notebooks and pages show them."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Picture = npt.NDArray[np.uint8]
"""[H, W, 3]."""
_SIDE = 96
"""Pixels to which small images are enlarged, unsmoothed."""


def picture(image: npt.NDArray[Any]) -> Picture:
    """Return an image [C, H, W] as colours; what is not finite is mid-grey, channels other than 1 or 3 are averaged."""
    values = np.where(np.isfinite(image), image, 0.5).clip(0, 1)
    if len(values) != 3:
        values = np.repeat(values.mean(axis=0, keepdims=True), 3, axis=0)
    return np.round(values * 255).astype(np.uint8).transpose(1, 2, 0)


def png(image: npt.NDArray[Any]) -> bytes:
    """Return an image [C, H, W] as a PNG file."""
    content = io.BytesIO()
    Image.fromarray(picture(image)).save(content, "PNG")
    return content.getvalue()


def tag(image: npt.NDArray[Any], title: str = "") -> str:
    """Return an image [C, H, W] as an element of HTML that needs no file; the title is plain text of ours."""
    side = max(_SIDE, *image.shape[1:])
    source = base64.b64encode(png(image)).decode()
    style = f"width:{side}px;image-rendering:pixelated;margin:2px"
    return f'<img src="data:image/png;base64,{source}" title="{title}" alt="{title}" style="{style}">'


def row(images: Iterable[npt.NDArray[Any]], titles: Iterable[str] = ()) -> str:
    """Return images side by side."""
    named = list(titles)
    tags = [tag(image, named[index] if index < len(named) else "") for index, image in enumerate(images)]
    return f"<div>{''.join(tags)}</div>"
