"""`gradleak prior`: train an image prior and look at it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Generators that settings may grant to attacks.")


@app.command("train")
def _train(
    dataset: Annotated[str, typer.Option("--dataset", help="Dataset whose train split is learned.")],
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="A dataset option; may be repeated.")
    ] = None,
    latent: Annotated[int | None, typer.Option("--latent", min=1, help="Length of the code.")] = None,
    width: Annotated[int | None, typer.Option("--width", min=1, help="Channels at full resolution.")] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", min=1, help="Passes over the train split.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of weights and batches.")] = 0,
    sheet: Annotated[Path | None, typer.Option("--sheet", help="Where to write a PNG of samples.")] = None,
    data_root: Annotated[Path | None, typer.Option("--data-root", help="Folder of the datasets.")] = None,
    download: Annotated[bool, typer.Option("--download", help="Allow downloads of datasets.")] = False,
    cache: Annotated[Path | None, typer.Option("--cache", help="Folder of trained networks.")] = None,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
) -> None:
    """Train a generator on a dataset's train split, or find it in the cache; write a sheet of its samples."""
    import yaml
    from rich.progress import Progress

    from .. import registry
    from ..dataset import Data
    from ..errors import GradleakError
    from ..training.priors import Recipe, sample_sheet, train_prior

    options: dict[str, Any] = {}
    for item in option or []:
        key, separator, value = item.partition("=")
        if not separator:
            raise GradleakError(f"--option {item}: expected KEY=VALUE")
        options[key] = yaml.safe_load(value)
    given = {"latent": latent, "width": width, "epochs": epochs}
    recipe = Recipe(seed=seed, **{name: value for name, value in given.items() if value is not None})
    data = Data(registry.build("datasets", dataset, options), dataset, data_root, download)
    with Progress(transient=True) as progress:
        task = progress.add_task(f"prior of {dataset}", total=recipe.epochs)
        generator = train_prior(
            data, recipe, cache, device, lambda done, total: progress.update(task, completed=done, total=total)
        )
    path = sheet or Path(f"prior-{dataset}.png")
    sample_sheet(generator, path)
    typer.echo(f"{dataset}: {sum(p.numel() for p in generator.parameters())} parameters; samples in {path}")
