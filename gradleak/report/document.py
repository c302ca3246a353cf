"""A page of its own that needs no network: what `gradleak attack` and `gradleak audit` write."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

_STYLE = """
:root { color-scheme: light dark; }
body { margin: 2rem auto; max-width: 60rem; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .75rem; border-bottom: 1px solid #8886; text-align: left; vertical-align: top; }
.verdict { padding: 1rem; border: 2px solid; border-radius: .5rem; font-size: 1.15rem; }
.leaks { border-color: #c0392b; } .holds { border-color: #27803f; } .unsure { border-color: #b9770e; }
figure { display: inline-block; margin: .5rem; } figcaption { font-size: .85rem; }
"""


def document(title: str, parts: Iterable[str]) -> str:
    """Return a page of parts that are HTML already."""
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def listed(lines: Iterable[str]) -> str:
    """Return lines of text as a list."""
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """Return lines of text as a table."""
    columns = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in lines)
    return f"<table><tr>{columns}</tr>{rows}</table>"
