"""Options that several commands share, each named once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str, typer.Option("--model", metavar="MODULE:FUNCTION", help="Returns the model; also FILE.py:FUNCTION.")
]
ModelOptions = Annotated[
    list[str] | None, typer.Option("--model-options", metavar="OPTIONS", help="Of the function, as '{width: 8}'.")
]
Loss = Annotated[str, typer.Option("--loss", metavar="NAME", help="cross-entropy, bce, mse or module:function.")]
Optimiser = Annotated[
    str, typer.Option("--optimiser", metavar="NAME", help="Of local steps, as 'sgd: {momentum: 0.9}' or adam.")
]
LocalBatchSize = Annotated[
    int | None, typer.Option("--local-batch-size", min=1, metavar="N", help="Images of a local step [default: all].")
]
Mode = Annotated[str, typer.Option("--mode", help="Of batch normalisation: eval or train.")]
Budget = Annotated[str, typer.Option("--budget", metavar="TIME", help="As 90s, 10m or 1h.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, or cuda:N.")]
DataRoot = Annotated[
    Path | None, typer.Option("--data-root", metavar="DIR", help="Where datasets are that do not come along.")
]
PluginFiles = Annotated[
    list[Path] | None, typer.Option("--plugin", metavar="FILE", help="A plugin file to add; may be repeated.")
]
Secret = Annotated[
    str | None,
    typer.Option(
        "--secret",
        metavar="HEX|FILE",
        help="What clients draw their noise from: 32 digits, or a store or bundle whose table is to be made again"
        " [default: the store's own; a new store draws one].",
    ),
]
