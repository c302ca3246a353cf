"""`gradleak tune`: an attack's options, searched on tuning victims."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import GradleakError
from ..paths import printable, written_whole
from . import shared, values

if TYPE_CHECKING:
    from ..evaluation.tuning import Choice, Range, Trial

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"


def tune(
    attack: Annotated[str, typer.Argument(metavar="ATTACK", help="A name, or a plugin file.")],
    suite: Annotated[Path, typer.Option("--suite", metavar="FILE", help="A suite with `tuning: true`.")],
    trials: Annotated[int, typer.Option("--trials", min=1, metavar="N", help="How many options to try.")] = 20,
    range_: Annotated[
        list[str] | None,
        typer.Option(
            "--range",
            metavar="NAME=LOW..HIGH",
            help="What to search, also NAME=A,B,C; may be repeated [default: the attack's own options].",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="An option that is not searched; may be repeated."),
    ] = None,
    objective: Annotated[
        str, typer.Option("--objective", metavar="METRIC", help="Whose mean counts: psnr (capped), ssim, lpips, …")
    ] = "psnr",
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Of the search.")] = 0,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The record.")] = Path("tuned.json"),
    store: Annotated[
        Path | None, typer.Option("--store", metavar="FILE", help="Of all trials [default: beside the record].")
    ] = None,
    workers: Annotated[int | None, typer.Option("--workers", min=1, metavar="N", help="Worker processes.")] = None,
    device: shared.Device = "cpu",
    data_root: shared.DataRoot = None,
    plugin: shared.PluginFiles = None,
) -> None:
    """Search an attack's options on tuning victims, and write a record that says how they were found.

    The same command goes on where it was interrupted: trials are cells of a store.
    """
    from .. import registry
    from ..evaluation import executors, tuning
    from ..evaluation.workshop import Resources

    files = [*(plugin or []), *([Path(attack)] if attack.endswith(".py") else [])]
    added = [name for path in files for group, name in registry.add_file(path)]
    name = added[-1] if attack.endswith(".py") else attack
    fixed = values.options(set_ or [], "--set")
    space = tuning.space_of(name, dict(searched(text) for text in range_ or []), fixed)
    bench = tuning.Bench(
        suite,
        store or out.with_suffix(".sqlite"),
        executors.build("processes", workers),
        Resources(data_root=data_root, device=device),
        tuple(files),
    )
    print(f"gradleak: searching {', '.join(f'{key} {each}' for key, each in space.items())}", file=sys.stderr)
    record = tuning.tune(name, bench, space, fixed, objective, trials, seed, _tell)
    with written_whole(out) as beside:
        beside.write_text(json.dumps(record.stored(), indent=2, default=str) + "\n", encoding="utf-8")
    best, first = record.best, record.trials[0]
    print(printable(f"best: {_shown(best.options)}: {best.value:.4g} ({first.value:.4g} with the defaults)"))
    print(printable(f'tuning = "{record.tuning}"'))
    print(f"gradleak: the record is {out}", file=sys.stderr)


def searched(text: str) -> tuple[str, Range | Choice]:
    """Return option and space of `lr=0.01..1`, `steps=2..8` or `schedule=step,cosine`.

    Raises:
        GradleakError: it is none.
    """
    from ..evaluation.tuning import Choice, Range

    name, _, given = text.partition("=")
    wrong = GradleakError(f"--range {text}: write NAME=LOW..HIGH, or NAME=A,B,C")
    if not name.isidentifier() or not given:
        raise wrong
    if found := re.fullmatch(rf"({_NUMBER})\.\.({_NUMBER})", given):
        whole = all(re.fullmatch(r"[-+]?\d+", each) for each in found.groups())
        low, high = map(float, found.groups())
        if not low < high:
            raise GradleakError(f"--range {text}: the first end has to be below the second")
        return name, Range(low, high, whole)
    if ".." in given:
        raise wrong
    parsed = values.options([f"{{{name}: [{given}]}}"], "--range")[name]
    if len(parsed) < 2 or not all(isinstance(each, bool | int | float | str) for each in parsed):
        raise wrong
    return name, Choice(tuple(parsed))


def _tell(number: int, trial: Trial) -> None:
    line = f"gradleak: trial {number}: {_shown(trial.options)}: {trial.value:.4g}, {trial.seconds:.0f} s"
    print(printable(line), file=sys.stderr, flush=True)


def _shown(options: Any) -> str:
    return ", ".join(
        f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}" for name, value in options.items()
    )
