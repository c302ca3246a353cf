"""`gradleak check`: what a plugin must promise, looked at in a process of its own."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import unknown
from . import values

if TYPE_CHECKING:
    from ..contract.process import Job


def check(
    plugin: Annotated[
        str,
        typer.Argument(metavar="PLUGIN", help="A file with an attack, defense, model, dataset or server, or a name."),
    ],
    group: Annotated[
        str,
        typer.Option(
            "--group", metavar="GROUP", help="Of a name: attacks, clients, defenses, models, datasets or servers."
        ),
    ] = "",
    options: Annotated[
        list[str] | None,
        typer.Option("--options", metavar="OPTIONS", help="Its options, as '{lr: 0.1}' or lr=0.1; may be repeated."),
    ] = None,
    dataset: Annotated[str, typer.Option(metavar="NAME", help="Whose images are attacked [default: digits].")] = "",
    model: Annotated[
        str, typer.Option(metavar="NAME", help="What clients train [default: the first that suits].")
    ] = "",
    shape: Annotated[
        str, typer.Option(metavar="C,H,W", help="Random images of this shape; of a model, the one shape it is for.")
    ] = "",
    data_root: Annotated[
        Path | None, typer.Option("--data-root", metavar="DIR", help="Where the data of a dataset is.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, metavar="SECONDS", help="Time for each promise.")] = 60.0,
    board: Annotated[
        bool, typer.Option("--board", help="Also run it beside reference methods on a few digits, and show the board.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Everything that is found, as JSON.")] = False,
) -> None:
    """Check what a plugin must promise, on a small case; exit with 1 if it does not keep it.

    It runs in a process of its own, which may end, crash or be ended after its time.
    """
    from .. import registry
    from ..contract import process

    if group and group not in registry.GROUPS:
        raise unknown("group", group, registry.GROUPS)
    root = None if data_root is None else str(data_root)
    job = process.Job(
        plugin, group, values.options(options or []), dataset, model, values.shape(shape) if shape else None, root
    )
    found = []
    for each in process.findings(job, timeout):
        found.append(each)
        if not as_json:
            print(f"{each.state:11}  {each.check}{': ' if each.detail else ''}{each.detail}", flush=True)
    broken = sum(each.state == "BROKEN" for each in found)
    shown = _boards(job, as_json) if board and not broken else None
    if as_json:
        listed = [{"state": each.state, **asdict(each)} for each in found]
        boards = {} if shown is None else {"boards": json.loads(shown)}
        print(json.dumps({"plugin": plugin, "broken": broken, "findings": listed, **boards}, indent=2))
    elif shown is not None:
        print(f"\n{shown}", end="")
    if broken:
        print(f"gradleak: {plugin}: {broken} of {len(found)} promises are broken", file=sys.stderr)
        raise typer.Exit(1)


def _boards(job: Job, as_json: bool) -> str:
    """Run the plugin beside others; return the boards as text.

    Raises:
        GradleakError: as `gradleak.evaluation.beside.boards`.
    """
    from .. import registry, report
    from ..evaluation import beside
    from ..evaluation.workshop import Resources

    if job.is_file:
        ((group, name),) = registry.add_file(Path(job.plugin))
    else:
        group, name = job.group or registry.groups_of(job.plugin)[0], job.plugin
    found = beside.boards(group, name, job.options, Resources(data_root=None if job.root is None else Path(job.root)))
    return report.render(found, "json" if as_json else "table")
