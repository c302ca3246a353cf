"""`gradleak store`: what is wrong with a store, what can be saved of it, and what of it is out of date."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import GradleakError
from ..paths import printable
from .asked import questions

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Check a store, rescue a damaged one, drop old cells."
)

StoreFile = Annotated[Path, typer.Argument(metavar="STORE", help="A store that `gradleak run` wrote.")]


@app.command("check")
def _check(store: StoreFile) -> None:
    """Look at everything in a store and say in words what is wrong; exit with 1 if anything is."""
    from ..board.upkeep import check

    found = check(store)
    for each in found:
        print(printable(f"{'ok' if each.ok else 'DAMAGED':8}  {each.check}: {each.detail}"))
    if wrong := sum(not each.ok for each in found):
        _say(f"{store}: {wrong} of {len(found)} parts are damaged; see: gradleak store rescue {store} NEW")
        raise typer.Exit(1)
    _say(f"{store}: nothing is wrong")


@app.command("rescue")
def _rescue(
    store: StoreFile,
    new: Annotated[Path, typer.Argument(metavar="NEW", help="The store to write; it must not be there yet.")],
) -> None:
    """Write every cell that can be read whole into a new store; the old file is not touched."""
    from ..board.upkeep import rescue

    saved, lost = rescue(store, new)
    _say(f"{new}: {saved} cells saved, {lost} could not be read whole; run its suite on it to compute the others")


@app.command("prune")
def _prune(
    store: StoreFile,
    suite: Annotated[
        Path | None,
        typer.Option("--suite", metavar="FILE", help="Keep the cells of this suite, and no other."),
    ] = None,
    plugin: Annotated[
        list[Path] | None, typer.Option("--plugin", metavar="FILE", help="A plugin file to add; may be repeated.")
    ] = None,
    data_root: Annotated[
        Path | None, typer.Option("--data-root", metavar="DIR", help="Where datasets are that do not come along.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be dropped, and drop nothing.")] = False,
) -> None:
    """Drop cells of other code than is installed here (attacks, defenses, models, datasets, engine, metrics).

    With a suite also those that it does not ask for. Of a plugin that is not here nothing is known: its cells stay.
    """
    from .. import registry
    from ..board.upkeep import prune
    from ..suite import question_of

    for path in plugin or []:
        registry.add_file(path)
    asked = None if suite is None else questions(suite, data_root)

    def keep(key: str, config: dict[str, Any]) -> bool:
        return (asked is None or question_of(config) in asked) and _is_current(config, data_root)

    gone = prune(store, keep, dry_run)
    for key in gone if dry_run else []:
        print(printable(key[:12]))
    _say(f"{store}: {len(gone)} cells {'would be' if dry_run else 'were'} dropped")


def _is_current(config: dict[str, Any], data_root: Path | None) -> bool:
    """Whether a cell was computed by the code that is here; of a plugin that is not here nothing is known."""
    from .. import registry
    from ..scales import METRICS
    from ..suite import CORE, UTILITY, Part, Utility, build_defense
    from ..suite.parts import code_of

    definitions = config.get("definitions", {})
    metrics = sorted(metric.id for metric in METRICS.values())
    if definitions.get("core", CORE) != CORE or definitions.get("metrics", metrics) != metrics:
        return False
    try:
        parts = {name: Part.of(config[name]) for name in ("attack", "defense", "model", "dataset")}
        defense = build_defense(parts["defense"].name, parts["defense"].options)
        here = {"defense": defense.version, "model": registry.load("models", parts["model"].name).version}
        if parts["attack"].name == UTILITY:
            here["attack"] = Utility.VERSION
            del parts["attack"]
        else:
            here["attack"] = registry.load("attacks", parts["attack"].name).version
        codes = {name: code_of(f"{name}s", part.name, part.options, data_root) for name, part in parts.items()}
    except (GradleakError, KeyError, TypeError):
        return True
    same = all(config[part].get("version", version) == version for part, version in here.items())
    return same and all(not code or parts[name].code == code for name, code in codes.items())


def _say(text: str) -> None:
    print(f"gradleak: {printable(text)}", file=sys.stderr)
