"""How the site is built from these pages; `make docs` does it, without a network."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import generate  # noqa: E402

import gradleak  # noqa: E402

generate.write(HERE / "reference")

project = "gradleak"
author = "The gradleak developers"
release = gradleak.__version__
extensions = ["myst_parser"]
exclude_patterns = ["**.ipynb"]
myst_heading_anchors = 3
suppress_warnings = [
    # Files beside the pages are links on the forge.
    "myst.xref_missing",
    # Mermaid is drawn by the forge, and shown as text here.
    "misc.highlighting_failure",
    "myst.header",
]
html_theme = "furo"
html_title = f"gradleak {release}"
html_show_sphinx = False
