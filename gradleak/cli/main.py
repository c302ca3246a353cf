"""The command line. Torch is imported by the commands that compute, and by no other."""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.padding import Padding

from .. import __version__
from ..errors import GradleakError, unknown
from ..paths import printable
from ..renamed import Renamed, arguments
from . import attack, audit, catalogue, check, doctor, new, prior, run, shared, tune, verify
from . import store as store_commands
from .asked import questions

BOARDS = ("defenses", "attacks", "pareto", "compute", "malicious", "detection")
"""Boards that `gradleak leaderboard` can show; by default the first two, and the last two where there is anything."""

RENAMED: Mapping[str, Mapping[str, Renamed]] = {}
"""Options by command that are still taken under an old name."""

app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Which defense stops which gradient inversion attack, and at what cost.",
)
app.add_typer(prior.app, name="prior")
app.command("attack")(attack.attack)
app.command("audit")(audit.audit)
app.command("check")(check.check)
app.command("doctor")(doctor.doctor)
app.command("new")(new.new)
app.command("run")(run.run)
app.command("tune")(tune.tune)
app.command("verify")(verify.verify)
app.add_typer(store_commands.app, name="store")

AllCode = Annotated[
    bool, typer.Option("--all-code", help="Also cells of older code, told apart; else each label shows its newest.")
]

Stores = Annotated[
    list[Path], typer.Argument(metavar="STORE...", help="Stores of `gradleak run`, bundles of `gradleak publish`.")
]


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 (a cell failed), 2 (a mistake), 130 (interrupted)."""
    given = list(sys.argv[1:] if words is None else words)
    debug = "--debug" in given
    try:
        given = arguments([part for part in given if part != "--debug"], RENAMED)
        code = app(given, prog_name="gradleak", standalone_mode=False)
    except GradleakError as error:
        if debug:
            traceback.print_exc()
        _say(str(error))
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        # Typer's usage errors, whose classes moved between its versions.
        if debug or not hasattr(error, "format_message"):
            raise
        print(f"gradleak: {' '.join(error.format_message().split())}", file=sys.stderr)
        return 2
    return code if isinstance(code, int) else 0


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"gradleak {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Options that come before a command; `--debug` may stand anywhere (see `main`)."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command("list")
def _list(
    group: Annotated[
        str,
        typer.Argument(
            metavar="[GROUP]",
            help="attacks, clients, datasets, defenses, models or servers [default: all, by name].",
        ),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Everything that is known, as JSON.")] = False,
    plugin: shared.PluginFiles = None,
    ensemble: Annotated[
        str, typer.Option(metavar="NAME", help="Only members of an ensemble of attacks, e.g. auto-v2.")
    ] = "",
) -> None:
    """Show the plugins of a group: family, threat model, needs, defaults, reference."""
    from .. import registry

    for path in plugin or []:
        registry.add_file(path)
    if not group:
        _print_names({each: registry.names(each) for each in registry.GROUPS}, as_json)
        return
    if group not in registry.GROUPS:
        raise unknown("group", group, registry.GROUPS)
    found = catalogue.describe(group)
    if ensemble:
        found = _members(ensemble, found)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _print_plugins(found)


def _members(ensemble: str, attacks: Sequence[catalogue.Facts]) -> list[catalogue.Facts]:
    """Return the attacks of an ensemble under the labels that its members have."""
    found = []
    for facts in attacks:
        declared = facts.get("ensembles") or {}
        name = facts["name"]
        variants = (
            declared.get(ensemble, {}) if isinstance(declared, dict) else {name: {}} if ensemble in declared else {}
        )
        for label, options in variants.items():
            title = label if label == name else f"{label} = {name}"
            found.append({**facts, "name": title, "defaults": {**facts["defaults"], **options}})
    if not found:
        raise GradleakError(f"--ensemble {ensemble}: no attack says that it is a member")
    return found


@app.command("leaderboard")
def _leaderboard(
    stores: Stores,
    format: Annotated[str, typer.Option(help="table, markdown, csv, json or latex.")] = "table",
    board: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help=f"{', '.join(BOARDS)}; may be repeated.")
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(metavar="A,B,…", help="Columns to show, e.g. rank,defense,psnr-db [default: what fits]."),
    ] = None,
    suite: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Show the cells of this suite, and no other.")
    ] = None,
    all_code: AllCode = False,
    plugin: shared.PluginFiles = None,
    data_root: Annotated[
        Path | None, typer.Option("--data-root", metavar="DIR", help="Where the suite's data is.")
    ] = None,
) -> None:
    """Print the defense board and the attack board of stores and bundles, merged."""
    gc.disable()  # What is read stays to the end, and looking through it again and again takes a tenth of the time.
    wanted = [part.strip() for part in (columns or "").split(",") if part.strip()]
    from .. import report
    from ..board import leaderboard, malicious, results
    from ..board.bundle import open_all

    for name in board or []:
        if name not in BOARDS:
            raise unknown("board", name, BOARDS)
    if format not in report.FORMATS:
        raise unknown("format", format, report.FORMATS)
    asked = None if suite is None else questions(suite, data_root, plugin or ())
    with open_all(stores) as opened:
        found = results.read(*opened, all_code=all_code, asked=asked)
    honest = malicious.one_kind(found)
    defenses, attacks = leaderboard.landing_board(honest), leaderboard.attack_board(honest)
    made = {
        "defenses": lambda: defenses,
        "attacks": lambda: attacks,
        "pareto": lambda: leaderboard.pareto_board(defenses),
        "compute": lambda: leaderboard.compute_board(attacks),
        "malicious": lambda: malicious.malicious_board(found),
        "detection": lambda: malicious.detection_board(found),
    }
    chosen = [made[name]() for name in board or BOARDS[:2]] + ([] if board else malicious.server_boards(found))
    if format == "table" and sys.stdout.isatty():
        report.check_columns(chosen, wanted)
        width, colour = Console().width, "NO_COLOR" not in os.environ
        print(report.terminal.write(chosen, wanted, width, colour), end="")
    else:
        print(report.render(chosen, format, wanted), end="")


@app.command("report")
def _report(
    stores: Stores,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new folder, or one of an earlier report.")],
    suite: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="A suite whose description heads the page and whose `reported` numbers are compared; may be repeated.",
        ),
    ] = None,
    all_code: AllCode = False,
) -> None:
    """Write a page that shows everything (DIR/index.html), and tables, rows and figures beside it."""
    from ..board import results
    from ..board.bundle import open_all
    from ..report import folder, reproduction

    reported = [item for path in suite or [] for item in reproduction.read_reported(path)]
    about = " ".join(filter(None, map(reproduction.read_description, suite or [])))
    with open_all(stores) as opened:
        written = folder.write(results.read(*opened, all_code=all_code), opened, out, reported, about)
    _say(f"{len(written)} files in {out}; see {out / folder.PAGE}")


@app.command("compare")
def _compare(
    before: Annotated[Path, typer.Argument(metavar="BEFORE", help="A store or bundle.")],
    after: Annotated[Path, typer.Argument(metavar="AFTER", help="Another, of the same victims.")],
    threshold: Annotated[
        float, typer.Option(min=0.0, metavar="DB", help="Exit with 1 if a change in mean PSNR is surely above.")
    ] = 1.0,
    format: Annotated[str, typer.Option(help="table, markdown, csv, json or latex.")] = "table",
    all_code: AllCode = False,
) -> None:
    """Print what changed from one store to another, paired by victim, with intervals."""
    gc.disable()
    from .. import report
    from ..board import results
    from ..board.bundle import open_all
    from ..board.compare import compare, past

    with open_all([before, after]) as (first, second):
        board = compare(*(results.read(store, all_code=all_code) for store in (first, second)))
    print(report.render([board], format), end="")
    changed = len(past(board, threshold))
    _say(f"{changed} changes above {threshold:g} dB" if changed else f"no change above {threshold:g} dB")
    if changed:
        raise typer.Exit(1)


@app.command("publish")
def _publish(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="A store that `gradleak run` wrote.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The bundle to write, e.g. bundle.zip.")],
) -> None:
    """Pack a store into one file that others can verify and merge; it holds the victims' images."""
    from ..board.bundle import publish

    manifest = publish(store, out)
    _say(f"{out}: {manifest['cells']} cells, {manifest['failed']} failed, {manifest['images']} images")


def _say(text: str) -> None:
    print(f"gradleak: {printable(text)}", file=sys.stderr)


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _print_names(names: Mapping[str, Sequence[str]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(names, indent=2))
        return
    console = Console(highlight=False, markup=False, emoji=False)
    for group, found in names.items():
        console.print(f"{group} ({len(found)}): gradleak list {group}", style="bold", soft_wrap=True)
        console.print(Padding(", ".join(found), (0, 0, 0, 4)))


def _print_plugins(found: Sequence[dict[str, Any]]) -> None:
    """One paragraph a plugin, so that nothing is cut off on a narrow screen."""
    console = Console(highlight=False, markup=False, emoji=False)
    for facts in found:
        kind = [str(facts[key]) for key in ("family", "threat_model", "surface") if facts.get(key)]
        title = f"{facts['name']}  ({', '.join(kind)})" if kind else facts["name"]
        console.print(title, style="bold", soft_wrap=True)
        if facts["error"]:
            console.print(f"    error: {facts['error']}", style="red", soft_wrap=True)
            continue
        lines = {"": facts["summary"], "reference": facts["reference"]}
        for key in ("needs", "defaults"):
            if facts.get(key):
                lines[key] = ", ".join(f"{name}={_short(value)}" for name, value in facts[key].items())
        for key, text in lines.items():
            console.print(f"    {key}: {text}" if key else f"    {text}", soft_wrap=True)
