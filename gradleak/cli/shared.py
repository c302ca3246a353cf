"""Options that `gradleak attack` and `gradleak audit` share: a model of one's own, its training, a budget."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str, typer.Option("--model", metavar="MODULE:FUNCTION", help="Returns the model; also FILE.py:FUNCTION.")
]
ModelOptions = Annotated[
    list[str] | None, typer.Option("--model-options", metavar="OPTIONS", help="Of the function, as '{width: 8}'.")
]
LocalBatchSize = Annotated[
    int | None, typer.Option("--local-batch-size", min=1, metavar="N", help="Images of a local step [default: all].")
]
Mode = Annotated[str, typer.Option("--mode", help="Of batch normalisation: eval or train.")]
Budget = Annotated[str, typer.Option("--budget", metavar="TIME", help="As 90s, 10m or 1h.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, or cuda:N.")]
