"""`gradleak audit`: does my training leak?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import GradleakError
from ..paths import printable
from ..process import keep_memory
from . import shared, values

if TYPE_CHECKING:
    from ..auditing import Audit

ABOVE, UNSURE = 1, 3
"""Exit codes of `--fail-above`: more came back than allowed; less did, but no search came to its end."""


_Data = Annotated[
    str, typer.Option("--data", metavar="FOLDER|MODULE:FUNCTION", help="Images; a function returns (images, labels).")
]
_Weights = Annotated[
    Path | None, typer.Option("--weights", metavar="FILE", help="Of the model: safetensors or a state dict.")
]
_Labels = Annotated[
    str,
    typer.Option("--labels", metavar="CSV|MODULE:FUNCTION", help="Of a folder's files [default: its class folders]."),
]
_Shape = Annotated[str, typer.Option("--shape", metavar="C,H,W", help="To which files are fitted.")]
_Mean = Annotated[str, typer.Option("--mean", help="By channel, if the model expects normalised images: 0.485,0.456,…")]
_Std = Annotated[str, typer.Option("--std", help="By channel, with --mean.")]
_BatchSize = Annotated[int, typer.Option("--batch-size", min=1, metavar="N", help="Images of a client.")]
_LocalSteps = Annotated[int, typer.Option("--local-steps", min=1, metavar="N", help="With --local-lr.")]
_LocalLr = Annotated[
    float | None, typer.Option("--local-lr", metavar="RATE", help="Of local steps [default: one gradient].")
]
_Defense = Annotated[
    list[str] | None,
    typer.Option("--defense", metavar="NAME", help="Of the training, as 'top-k: {ratio: 0.1}'; may be repeated."),
]
_Victims = Annotated[int | None, typer.Option("--victims", min=2, metavar="N", help="Clients to attack.")]
_FailAbove = Annotated[
    float | None,
    typer.Option(
        "--fail-above",
        min=0.0,
        max=1.0,
        metavar="SHARE",
        help="Exit with 1 if more of the images come back, with 3 if that is not sure.",
    ),
]
_Remedies = Annotated[
    bool, typer.Option("--remedies/--no-remedies", help="If it leaks, try the defenses of the registry.")
]
_Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Of clients and attacks.")]
_Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Where page, JSON and store go.")]


def audit(
    model: shared.Model,
    data: _Data,
    weights: _Weights = None,
    model_options: shared.ModelOptions = None,
    labels: _Labels = "",
    shape: _Shape = "",
    mean: _Mean = "",
    std: _Std = "",
    loss: shared.Loss = "cross-entropy",
    optimiser: shared.Optimiser = "sgd",
    batch_size: _BatchSize = 1,
    local_steps: _LocalSteps = 1,
    local_batch_size: shared.LocalBatchSize = None,
    local_lr: _LocalLr = None,
    mode: shared.Mode = "eval",
    defense: _Defense = None,
    victims: _Victims = None,
    budget: shared.Budget = "10m",
    fail_above: _FailAbove = None,
    remedies: _Remedies = True,
    seed: _Seed = 0,
    device: shared.Device = "cpu",
    out: _Out = Path("audit"),
) -> None:
    """Attack your own training: what share of your images comes back, to whom, and which defense would stop that.

    OUT/index.html says it in words and pictures, OUT/report.json in numbers; OUT/audit.sqlite is a store for
    `gradleak leaderboard` and `gradleak report`.
    """
    from .. import sources
    from ..auditing import audit as run

    keep_memory()
    limit = values.seconds(budget, "--budget")
    module = sources.network(model, weights, values.options(model_options or [], "--model-options"))
    out.mkdir(parents=True, exist_ok=True)
    found = run(
        module,
        _data(data),
        labels=_labels(labels),
        shape=values.shape(shape) if shape else None,
        batch_size=batch_size,
        client=_client(optimiser, loss),
        local_steps=local_steps,
        local_batch_size=local_batch_size,
        local_lr=local_lr,
        mode=mode,
        defense=_chain(defense or []),
        normalise=_normalise(mean, std),
        budget=limit,
        victims=victims,
        remedies=None if remedies else (),
        seed=seed,
        device=device,
        store=_fresh(out / "audit.sqlite"),
        tell=_tell,
    )
    found.write(out)
    _conclude(found, out, fail_above)


def _conclude(found: Audit, out: Path, fail_above: float | None) -> None:
    """Print what was found, and exit as `--fail-above` asks."""
    for line in found.lines():
        print(printable(line))
    print(f"gradleak: {found.seconds:.0f} s; see {out / 'index.html'}", file=sys.stderr)
    if fail_above is not None and (passes := found.passes(fail_above)) is not True:
        raise typer.Exit(UNSURE if passes is None else ABOVE)


def _normalise(mean: str, std: str) -> tuple[list[float], list[float]] | None:
    if bool(mean) != bool(std):
        raise GradleakError("--mean and --std belong together")
    return (values.numbers(mean, "--mean"), values.numbers(std, "--std")) if mean else None


def _fresh(store: Path) -> Path:
    """Return the path of a store, without what an earlier audit left there."""
    for end in ("", "-wal", "-shm"):
        Path(f"{store}{end}").unlink(missing_ok=True)
    return store


def _data(given: str) -> Any:
    from .. import sources

    if Path(given).is_dir() or ":" not in given:
        return Path(given)
    return sources.imported(given, "--data")()


def _labels(given: str) -> Any:
    from .. import sources

    if not given:
        return None
    return Path(given) if Path(given).is_file() or ":" not in given else sources.imported(given, "--labels")


def _client(optimiser: str, loss: str) -> dict[str, Any] | None:
    name, options = values.plugin(optimiser, "--optimiser")
    return None if (name, options, loss) == ("sgd", {}, "cross-entropy") else {name: {"loss": loss, **options}}


def _chain(given: list[str]) -> tuple[str, dict[str, Any]]:
    parts = [values.plugin(each, "--defense") for each in given]
    if len(parts) < 2:
        return parts[0] if parts else ("none", {})
    return " + ".join(name for name, _ in parts), dict(parts)


def _tell(what: str, left: float) -> None:
    print(f"gradleak: {what}; {max(0.0, left):.0f} s left", file=sys.stderr, flush=True)
