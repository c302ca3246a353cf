"""`gradleak store`: what is wrong with a store, what can be saved of it, and what of it is out of date."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import GradleakError
from ..paths import printable

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
    """Drop the cells of older versions of attacks, defenses, models or metrics, or those that a suite lacks."""
    from .. import registry
    from ..board.upkeep import prune

    for path in plugin or []:
        registry.add_file(path)
    keep = _is_current if suite is None else _is_of(suite, data_root)
    gone = prune(store, keep, dry_run)
    for key in gone if dry_run else []:
        print(printable(key[:12]))
    _say(f"{store}: {len(gone)} cells {'would be' if dry_run else 'were'} dropped")


def _is_of(path: Path, data_root: Path | None) -> Callable[[str, dict[str, Any]], bool]:
    from .. import suite
    from ..evaluation import workshop

    digest = workshop.Workshop(workshop.Resources(data_root=data_root)).digest
    keys = {cell.key for cell in suite.expand(suite.read(path), digest, data_root)}
    return lambda key, config: key in keys


def _is_current(key: str, config: dict[str, Any]) -> bool:
    """Whether a cell was computed by the versions that are here; of a plugin that is not here nothing is known."""
    from .. import registry
    from ..scales import METRICS
    from ..suite import CORE, UTILITY, Part, Utility, build_defense

    definitions = config.get("definitions", {})
    metrics = sorted(metric.id for metric in METRICS.values())
    if definitions.get("core", CORE) != CORE or definitions.get("metrics", metrics) != metrics:
        return False
    try:
        defense = Part.of(config["defense"])
        here = {
            "attack": Utility.VERSION
            if config["attack"]["name"] == UTILITY
            else registry.load("attacks", config["attack"]["name"]).version,
            "defense": build_defense(defense.name, defense.options).version,
            "model": registry.load("models", config["model"]["name"]).version,
        }
    except (GradleakError, KeyError, TypeError):
        return True
    return all(config[part].get("version", version) == version for part, version in here.items())


def _say(text: str) -> None:
    print(f"gradleak: {printable(text)}", file=sys.stderr)
