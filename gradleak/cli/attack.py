"""`gradleak attack`: one captured update, without any truth."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import GradleakError, unknown
from ..paths import printable, written_whole
from ..process import keep_memory
from . import shared, values

if TYPE_CHECKING:
    from ..captured import Captured
    from ..threat import Observation

KINDS = ("gradient", "weight-difference")
"""What an update can be."""


_Update = Annotated[
    Path, typer.Option("--update", metavar="FILE", help="The captured update: safetensors, or a state dict.")
]
_Shape = Annotated[str, typer.Option("--shape", metavar="C,H,W", help="Of an image, e.g. 3,32,32.")]
_Weights = Annotated[
    Path | None, typer.Option("--weights", metavar="FILE", help="What the server sent: safetensors or a state dict.")
]
_Kind = Annotated[str, typer.Option("--kind", help="gradient, or weight-difference (after minus before).")]
_BatchSize = Annotated[int, typer.Option("--batch-size", min=1, metavar="N", help="Images of the client.")]
_Labels = Annotated[str, typer.Option("--labels", metavar="3,1,…", help="Known labels [default: inferred].")]
_LocalSteps = Annotated[int, typer.Option("--local-steps", min=1, metavar="N", help="Known local steps.")]
_LocalLr = Annotated[float | None, typer.Option("--local-lr", metavar="RATE", help="Known local rate.")]
_Defense = Annotated[
    str, typer.Option("--defense", metavar="NAME", help="A known one, as 'gaussian-noise: {sigma: 0.1, clip: 1}'.")
]
_Method = Annotated[str, typer.Option("--attack", metavar="NAME", help="auto, or an attack.")]
_Options = Annotated[
    list[str] | None, typer.Option("--options", metavar="OPTIONS", help="Of a named attack, as '{lr: 0.1}'.")
]
_Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Of the attack's draws.")]
_Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Where page, JSON and images go.")]


def attack(
    model: shared.Model,
    update: _Update,
    shape: _Shape,
    weights: _Weights = None,
    model_options: shared.ModelOptions = None,
    kind: _Kind = "",
    batch_size: _BatchSize = 1,
    labels: _Labels = "",
    local_steps: _LocalSteps = 1,
    local_batch_size: shared.LocalBatchSize = None,
    local_lr: _LocalLr = None,
    loss: shared.Loss = "cross-entropy",
    optimiser: shared.Optimiser = "sgd",
    mode: shared.Mode = "eval",
    defense: _Defense = "",
    method: _Method = "auto",
    options: _Options = None,
    budget: shared.Budget = "5m",
    seed: _Seed = 0,
    device: shared.Device = "cpu",
    out: _Out = Path("attacked"),
) -> None:
    """Attack a captured update: images, and what can be known of them without a truth.

    OUT/index.html shows the images, OUT/report.json holds the numbers: the attack's own loss, how much of the update is
    left unexplained, whether restarts agree, and what was assumed.
    """
    from .. import registry, sources
    from ..captured import attack as run
    from ..suite import build_defense
    from ..threat import Observation
    from ..update import LocalTraining

    keep_memory()
    limit, size = values.seconds(budget, "--budget"), values.shape(shape)
    name, own = values.plugin(optimiser, "--optimiser")
    given = values.options(options or [])
    _check(kind, mode, local_lr is not None or (local_steps == 1 and local_batch_size is None))
    module = sources.network(model, weights, values.options(model_options or [], "--model-options")).to(device)
    tensors = {name: tensor.to(device) for name, tensor in sources.tensors(update, "--update").items()}
    local = None if local_lr is None else LocalTraining(steps=local_steps, batch_size=local_batch_size, lr=local_lr)
    observation = Observation.of(
        module,
        tensors,
        size,
        batch_size=batch_size,
        labels=values.whole_numbers(labels, "--labels") if labels else None,
        local=local,
        weight_difference=None if not kind else kind == KINDS[1],
        mode=mode,  # type: ignore[arg-type]
        client=registry.build("clients", name, {"loss": loss, **own}, "--optimiser"),
        defense=build_defense(*values.plugin(defense, "--defense"), "--defense") if defense else None,
    )
    found = run(observation, method, seed=seed, budget=limit, tell=_tell, **given)
    write(found, observation, out, f"{update.name}, {model}")
    for line in found.lines():
        print(printable(line))
    print(f"gradleak: images, report.json and a page are in {out}", file=sys.stderr)


def _check(kind: str, mode: str, rate_is_known: bool) -> None:
    if kind and kind not in KINDS:
        raise unknown("kind", kind, KINDS, "--kind")
    if mode not in ("eval", "train"):
        raise unknown("mode", mode, ("eval", "train"), "--mode")
    if not rate_is_known:
        raise GradleakError("--local-steps and --local-batch-size need --local-lr; leave them out if it is unknown")


def _tell(method: str) -> None:
    print(f"gradleak: trying {method}", file=sys.stderr, flush=True)


def write(found: Captured, observation: Observation, out: Path, title: str) -> None:
    """Write the images, report.json and index.html into a folder, which is made if it is not there.

    Raises:
        GradleakError: it cannot be written.
    """
    from ..pictures import png
    from ..report.document import document, listed, table

    files: dict[str, bytes] = {}
    for victim, images in enumerate(found.images.detach().float().cpu().numpy()):
        for number, image in enumerate(images):
            files[f"victim{victim}-image{number}.png"] = png(image)
    facts = {"title": title, "shape": list(observation.shape), "classes": observation.classes, **found.report()}
    files["report.json"] = (json.dumps(facts, indent=2, allow_nan=False) + "\n").encode()
    ran = [each for each in found.tried if each.seconds]
    lines = [(each.method, f"{each.seconds:.0f} s", _number(each.mismatch), each.note) for each in ran]
    skipped = [f"{each.method}: {each.note}" for each in found.tried if not each.seconds]
    page = document(
        f"Attacked: {title}",
        [
            "<p>No truth was looked at: whether these are the client's images is told by how little of the update they "
            "leave unexplained (0: nothing; 1: as much as a guess of nothing) and by whether restarts agree.</p>",
            found._repr_html_(),
            "<h2>What was tried</h2>",
            table(("attack", "time", "unexplained", "note"), lines),
            "<h2>What could not run</h2>" if skipped else "",
            listed(skipped) if skipped else "",
        ],
    )
    files["index.html"] = page.encode()
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            with written_whole(out / name) as path:
                path.write_bytes(content)
    except OSError as error:
        raise GradleakError(f"--out {out}: cannot be written ({error.strerror})") from error


def _number(value: float) -> Any:
    return f"{value:.2g}" if math.isfinite(value) else "-"
