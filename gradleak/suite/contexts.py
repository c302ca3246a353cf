"""Suites that list their contexts: each is a grid of one dataset, one model and one setting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import GradleakError, unknown
from .fields import Entry
from .schema import Context, Suite

_OWN = ("victims", "seeds", "knowledge", "attacks", "defenses")
"""What a context may say otherwise than its suite; None where it does not."""


def grids(suite: Suite) -> Iterator[tuple[str, Suite]]:
    """Yield each grid of a suite, and where the file has it: of its contexts, or, without any, the suite itself."""
    if not suite.contexts:
        yield "", suite
    for index, context in enumerate(suite.contexts):
        yield f"contexts[{index}]", grid_of(suite, context)


def grid_of(suite: Suite, context: Context) -> Suite:
    """Return the grid of one context, with all that it does not say itself from its suite."""
    own: dict[str, Any] = {key: value for key in _OWN if (value := getattr(context, key)) is not None}
    if "utility" in context.model_fields_set:
        own["utility"] = context.utility
    axes = {"datasets": [context.dataset], "models": [context.model], "settings": [context.setting]}
    return suite.model_copy(update={**axes, **own, "contexts": []})


def with_entries(suite: Suite) -> Suite:
    """Return a suite in whose contexts an attack or a defense that is named by its label is that entry."""
    found = []
    for context in suite.contexts:
        own = {}
        for axis in ("attacks", "defenses"):
            entries: Sequence[Entry] | None = getattr(context, axis)
            if entries is not None:
                listed = {entry.title: entry for entry in getattr(suite, axis)}
                own[axis] = [listed.get(entry.name, entry) if _bare(entry) else entry for entry in entries]
        found.append(context.model_copy(update=own))
    return suite.model_copy(update={"contexts": found})


def _bare(entry: Entry) -> bool:
    return entry == Entry(name=entry.name)


def budgeted(attacks: Sequence[Entry], budgets: Mapping[str, Mapping[str, Any]], where: str) -> list[Entry]:
    """Return attacks with the options that they have in one context.

    Raises:
        GradleakError: there is no attack of such a label.
    """
    titles = [entry.title for entry in attacks]
    for title in budgets:
        if title not in titles:
            raise unknown("label of attacks", title, titles, f"{where}: budgets")
    return [
        entry.model_copy(
            update={"label": entry.title, "options": {**entry.options, **budgets[entry.title]}},
        )
        if entry.title in budgets
        else entry
        for entry in attacks
    ]


def refuse_confusions(suite: Suite, where: str) -> None:
    """Refuse contexts that tables could not tell apart.

    Raises:
        GradleakError: two are of one dataset, model and setting by name, or one label stands for two things.
    """
    places: dict[tuple[str, ...], str] = {}
    meanings: dict[tuple[str, str], tuple[str, object]] = {}
    for index, context in enumerate(suite.contexts):
        place = f"contexts[{index}]"
        if (first := places.setdefault(context.titles, place)) != place:
            raise GradleakError(f"{where}: {place}: has the dataset, model and setting of {first}; name one otherwise")
        for kind, title, meaning in _named(grid_of(suite, context)):
            first, known = meanings.setdefault((kind, title), (place, meaning))
            if known != meaning:
                raise GradleakError(f"{where}: {place}: {kind} {title!r} is another one in {first}; name one otherwise")


def _named(grid: Suite) -> Iterator[tuple[str, str, object]]:
    for kind, axis in (("dataset", grid.datasets), ("model", grid.models), ("defense", grid.defenses)):
        for entry in axis:
            yield kind, entry.title, (entry.name, entry.options)
    for values in grid.settings:
        yield "setting", str(values.get("name", "default")), values
