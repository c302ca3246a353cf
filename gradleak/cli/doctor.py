"""`gradleak doctor`: what this machine has, and what to do about what it lacks."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from .. import __version__

PACKAGES = ("torch", "torchvision", "torchmetrics", "lpips", "opacus", "numpy", "scipy", "pandas", "pydantic")
EXTRAS = {
    "ray": ("ray", "running suites on a cluster"),
    "tune": ("optuna", "`gradleak tune`"),
    "flower": ("flwr", "updates of Flower clients"),
    "timm": ("timm", "models of timm"),
    "quantum": ("pennylane", "an independent check of quantum encodings"),
    "peers": ("breaching", "the comparison of speed with breaching"),
}
"""Optional extras: the package that each brings, and what it is for."""


@dataclass(frozen=True)
class Fact:
    """One thing about this machine."""

    name: str
    found: str
    do: str = ""
    """What to do about an absence; empty where nothing is missing."""
    optional: bool = True
    """Whether everything else works without it."""


def doctor(as_json: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False) -> None:
    """Say what this machine has: versions, devices, cache, LPIPS weights, extras; and what to do about what is missing.

    It exits with 1 if something is missing that gradleak cannot do without.
    """
    found = list(facts())
    wrong = [fact for fact in found if fact.do and not fact.optional]
    if as_json:
        print(json.dumps({"ok": not wrong, "facts": [asdict(fact) for fact in found]}, indent=2))
    else:
        width = max(len(fact.name) for fact in found)
        for fact in found:
            print(f"{fact.name:{width}}  {fact.found}")
            if fact.do:
                print(f"{'':{width}}  -> {fact.do}")
    if wrong:
        raise typer.Exit(1)


def facts() -> Iterator[Fact]:
    """Yield everything that is looked at."""
    yield Fact("gradleak", __version__)
    yield Fact("python", f"{platform.python_version()} on {platform.platform()}")
    yield from _packages()
    yield from _devices()
    yield _cache()
    yield from _lpips()
    yield from _extras()


def _packages() -> Iterator[Fact]:
    there = {package: _installed(package) for package in PACKAGES}
    yield Fact("packages", ", ".join(f"{package} {number}" for package, number in there.items() if number))
    for package, number in there.items():
        if not number:
            yield Fact(package, "not installed", f"pip install {package}", optional=False)


def _devices() -> Iterator[Fact]:
    import torch

    yield Fact("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads")
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    cpu_only = torch.version.cuda is None
    do = ""
    if not names:
        do = (
            "this torch is built for CPUs; where there is a GPU, install another (https://pytorch.org/get-started)"
            if cpu_only
            else "no GPU is seen; where there is one, look at its driver (nvidia-smi) and at CUDA_VISIBLE_DEVICES"
        )
    yield Fact("cuda", names or "none", do)


def _cache() -> Fact:
    from ..process import default_cache

    cache = default_cache()
    nearest = next(folder for folder in (cache, *cache.parents) if folder.exists())
    if os.access(nearest, os.W_OK):
        return Fact("cache", f"{cache}, writable (GRADLEAK_CACHE)")
    do = "set GRADLEAK_CACHE to a folder that can be written: trained networks are kept there"
    return Fact("cache", f"{cache}, NOT writable (GRADLEAK_CACHE)", do, optional=False)


def _lpips() -> Iterator[Fact]:
    from ..evaluation import perceptual

    for trunk in perceptual.SOURCES:
        state = perceptual.state(trunk)
        there, _, how = state.partition("; ")
        yield Fact(f"lpips {trunk}", there, f"{how}; without it LPIPS is not measured" if how else "")


def _extras() -> Iterator[Fact]:
    for extra, (package, purpose) in EXTRAS.items():
        number = _installed(package)
        found = f"{package} {number}" if number else f"{package} not installed"
        yield Fact(f"[{extra}]", found, "" if number else f"for {purpose}: pip install 'gradleak[{extra}]'")


def _installed(package: str) -> str:
    """Return the version of a package; empty if it is not there."""
    if importlib.util.find_spec(package) is None:
        return ""
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"
