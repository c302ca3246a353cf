"""The one error that users see."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GradleakError(Exception):
    """A mistake in what the user asked for: one line that names what was wrong, where, and what is allowed."""


def unknown(kind: str, name: str, known: Iterable[str], where: str = "") -> GradleakError:
    """Error for a name that does not exist, with the nearest names first and then all that are allowed.

    >>> print(unknown("attack", "dgl", ["dlg", "idlg", "spear"], "attacks[0]"))
    attacks[0]: unknown attack 'dgl'; did you mean 'dlg' or 'idlg'? (allowed: dlg, idlg, spear)
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    place = f"{where}: " if where else ""
    return GradleakError(f"{place}unknown {kind} {name!r}{hint} (allowed: {', '.join(known)})")
