"""Speed and memory of the engine's backends against `sequential`, and against breaching where it is installed.

    python benchmarks/perf/engine.py required    # the five cases that must be shown; with [peers] also breaching
    python benchmarks/perf/engine.py grid        # five models x victims x batch
    python benchmarks/perf/engine.py growth      # against victims, parameters and image size
    python benchmarks/perf/engine.py quality     # seconds to breaching's quality, 64 lenet victims, start-up counted

Contenders take turns in one process, one step each; a line shows the median and its ratio to `sequential`'s.
A step is what an attack does: matching loss and total variation, their gradient, signed Adam, the box. The
unit is one step of one victim. Images are real (dataset `photos`), guesses start from noise. Peak memory is
that of a process of its own, over what the problem takes. Every contender has one thread, as gradleak's workers
have, or `--threads N`; `--device cuda` measures on a GPU. Use it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gradleak import process, registry, seeds
from gradleak.dataset import Data
from gradleak.engine.backends import BACKENDS
from gradleak.engine.graphs import Recorded
from gradleak.engine.loop import Plan, finish, minimise
from gradleak.engine.optimisers import SCHEDULES, Adam, Variables
from gradleak.engine.problem import Backend, Direct, Facts, Guess, Problem, take
from gradleak.model import Normalise, initialise
from gradleak.search.penalties import total_variation
from gradleak.threat import Compute
from gradleak.update import LocalTraining, Network, local_update, one_hot, stack

TV = 1e-4
RATE = 0.1


@dataclass(frozen=True)
class Case:
    """One line's problem."""

    model: str
    victims: int
    batch: int = 1
    size: int = 32
    options: dict[str, Any] = field(default_factory=dict)
    least: tuple[float, float] | None = None
    """Ratios to `sequential` and to breaching that must be reached."""


LARGE_MLP: dict[str, Any] = {"widths": (1024, 1024)}
NARROW: dict[str, Any] = {"width": 16}
REQUIRED = [
    Case("lenet", 64, least=(8, 10)),
    Case("mlp", 32, options=LARGE_MLP, least=(4.5, 5)),
    Case("vit", 32, least=(1.8, 2)),
    Case("convnet", 8, options=NARROW, least=(1.6, 1.8)),
    Case("resnet18", 4, least=(1.35, 1.4)),
]
GRID = [
    Case(model, victims, batch, options=options)
    for model, options in [("lenet", {}), ("mlp", LARGE_MLP), ("convnet", NARROW), ("resnet18", NARROW), ("vit", {})]
    for victims in (1, 8, 32, 64)
    for batch in (1, 4, 8)
]
GROWTH = [
    *(Case("lenet", victims) for victims in (1, 2, 4, 8, 16, 32, 64, 128)),
    *(Case("mlp", 16, options={"widths": (width, width)}) for width in (64, 128, 256, 512, 1024, 2048)),
    *(Case("convnet", 8, size=size, options=NARROW) for size in (16, 24, 32, 48, 64)),
]
CASES = {"required": REQUIRED, "grid": GRID, "growth": GROWTH}


class Setup:
    """The victims of a case, what they sent, and where the search starts; the same for every contender."""

    def __init__(self, case: Case, device: torch.device):
        data = Data(registry.build("datasets", "photos"), "photos")
        images, labels = (tensor.to(device) for tensor in data.victims(case.victims, case.batch))
        flat = torch.nn.functional.interpolate(images.flatten(0, 1), (case.size, case.size), mode="area")
        self.images = flat.view(case.victims, case.batch, 3, case.size, case.size)
        self.labels = labels
        module = registry.build("models", case.model, case.options)
        self.module = initialise(module, (3, case.size, case.size), 10, 0).to(device)
        network = Network.of(self.module)
        targets = one_hot(labels, 10, torch.float32)
        sent = [local_update(network, x, y, LocalTraining()) for x, y in zip(self.images, targets, strict=True)]
        update = stack([{name: tensor.detach() for name, tensor in row.items()} for row in sent])
        (space,) = [layer for layer in self.module.modules() if isinstance(layer, Normalise)]
        self.mean, self.std = space.mean, space.std
        mean, std = self.mean, self.std
        self.facts = Facts(targets, update=update)
        noise = torch.randn(self.images.shape, generator=seeds.generator("perf", "start")).to(device)
        self.start: Variables = {"pixels": noise}
        self.problem = Problem(
            network=network,
            training=LocalTraining(),
            decode=lambda row, known: Guess(row["pixels"] * std + mean, known.targets),
            match=Direct("cosine"),
            penalty=lambda guess, row, known: TV * total_variation(guess.images),
        )

    def project(self, variables: Variables) -> None:
        """Clamp to the box."""
        variables["pixels"].clamp_(-self.mean / self.std, (1 - self.mean) / self.std)

    def psnr(self, images: Tensor) -> float:
        """Median PSNR of the victims' first images, dB."""
        error = (images - self.images).square().flatten(2).mean(-1)[:, 0]
        return float((-10 * error.log10()).median())


def stepper(setup: Setup, backend: Backend) -> Callable[[], None]:
    """One step of all victims."""
    variables = {name: tensor.clone() for name, tensor in setup.start.items()}
    optimiser = Adam(signs=frozenset({"pixels"}))
    optimiser.start(variables)
    rate = torch.full((len(setup.images),), RATE, device=setup.images.device)
    if not backend.applies(setup.problem, variables, setup.facts):
        raise NotImplementedError
    facts = backend.prepare(setup.problem, setup.facts)

    def step() -> None:
        values = backend(setup.problem, variables, facts)
        optimiser.step(variables, values.gradients, rate)
        setup.project(variables)

    return step


class Peer:
    """breaching on the same victims, with its own `invertinggradients` attack, one victim after the other."""

    def __init__(self, setup: Setup, steps: int):
        import warnings

        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            import breaching

            scale = TV * float(setup.std.mean())  # its total variation is of normalised pixels
            config = breaching.get_attack_config(
                "invertinggradients",
                [f"optim.max_iterations={steps}", f"regularization.total_variation.scale={scale}"],
            )
        self.setup = setup
        body = torch.nn.Sequential(*list(setup.module.children())[1:])  # it normalises outside of the model
        body.eval()
        loss = torch.nn.CrossEntropyLoss()
        self.attacker = breaching.attacks.prepare_attack(
            body, loss, config, {"dtype": torch.float, "device": torch.device("cpu")}
        )

        class Metadata(dict[str, Any]):
            shape = tuple(setup.images.shape[2:])
            modality = "vision"
            mean = setup.mean.flatten().tolist()
            std = setup.std.flatten().tolist()

        metadata = Metadata()
        self.payload = [{"parameters": list(body.parameters()), "buffers": list(body.buffers()), "metadata": metadata}]
        # Parameters are matched by position: the order of the module with and without its first layer is the same.
        update = setup.facts.update
        self.names = [name for name, _ in setup.module.named_parameters()]
        self.update = update

    def attack(self, victim: int) -> Tensor:
        """Reconstruct one victim, [B, C, H, W] in [0, 1]."""
        metadata = {
            "num_data_points": self.setup.images.shape[1],
            "labels": self.setup.labels[victim],
            "local_hyperparams": None,
        }
        gradients = [self.update[name][victim] for name in self.names]
        shared = [{"gradients": gradients, "buffers": None, "metadata": metadata}]
        found, _ = self.attacker.reconstruct(
            self.payload, shared, server_secrets={}, initial_data=self.setup.start["pixels"][victim]
        )
        images: Tensor = found["data"] * self.setup.std + self.setup.mean
        return images.clamp(0, 1)


def has_breaching() -> bool:
    """Whether the extra `peers` is installed."""
    from importlib.util import find_spec

    return find_spec("breaching") is not None


def waited(device: torch.device) -> float:
    """Return the time, when the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def gemm_peak(device: torch.device) -> float:
    """Floating point operations a second of one large product, the best of several."""
    size = 8192 if device.type == "cuda" else 1024
    one = torch.randn(size, size, device=device)
    seconds = []
    for _ in range(10):
        started = waited(device)
        one @ one
        seconds.append(waited(device) - started)
    return 2 * size**3 / min(seconds)


def machine(device: torch.device) -> str:
    """Name what a line was measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} cores"
    return f"{platform.machine()}, {name}, torch {torch.__version__}"


def backends(device: torch.device) -> dict[str, Callable[[], Backend]]:
    """Return the contenders; on a GPU also those whose calls are recorded once and replayed."""
    found: dict[str, Callable[[], Backend]] = dict(BACKENDS)
    if device.type == "cuda":
        for name in ("vmap", "layerwise"):
            found[f"{name}, recorded"] = functools.partial(_recorded, name)
    return found


def operations(setup: Setup) -> float:
    """Counted floating point operations of one victim's step under `sequential`.

    All contenders are weighed by these, since the counter knows no groups of convolutions; one that needs
    fewer operations for the same answer can come out above the peak.
    """
    first = {name: tensor[:1] for name, tensor in setup.start.items()}
    with FlopCounterMode(display=False) as counter:
        BACKENDS["sequential"]()(setup.problem, first, take(setup.facts, slice(0, 1)))
    return float(counter.get_total_flops())


def _recorded(name: str) -> Backend:
    return Recorded(BACKENDS[name]())


def measure(
    case: Case, device: torch.device, repetitions: int, peers: bool, memory: bool, peak: float
) -> list[dict[str, Any]]:
    """One row a contender."""
    setup = Setup(case, device)
    contenders: dict[str, tuple[Callable[[], None], int]] = {}
    for name, kind in backends(device).items():
        with contextlib.suppress(NotImplementedError):
            contenders[name] = stepper(setup, kind()), case.victims
    if peers:
        steps = 20  # so that what an attack costs before its first step counts little
        peer = Peer(setup, steps)
        turns = iter(range(10**9))
        contenders["breaching"] = lambda: (peer.attack(next(turns) % case.victims), None)[1], steps
    for step, _ in contenders.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repetitions):
        for name, (step, units) in contenders.items():
            started = waited(device)
            step()
            seconds[name].append((waited(device) - started) / units)
    median = {name: statistics.median(row) for name, row in seconds.items()}
    work = operations(setup)
    rows = []
    for name in contenders:
        rows.append(
            {
                "model": case.model,
                "options": json.dumps(case.options),
                "parameters": sum(tensor.numel() for tensor in setup.module.parameters()),
                "victims": case.victims,
                "batch": case.batch,
                "size": case.size,
                "contender": name,
                "milliseconds": 1000 * median[name],
                "fastest": 1000 * min(seconds[name]),
                "slowest": 1000 * max(seconds[name]),
                "per_second": 1 / median[name],
                "to_sequential": median["sequential"] / median[name],
                "to_breaching": median["breaching"] / median[name] if peers else math.nan,
                "gemm_share": work / median[name] / peak,
                "peak_megabytes": peak_memory(case, name, device) if memory and name != "breaching" else math.nan,
                "must_reach": "" if case.least is None else f"{case.least[0]} / {case.least[1]}",
                "repetitions": repetitions,
                "threads": torch.get_num_threads(),
                "machine": machine(device),
            }
        )
    return rows


def peak_memory(case: Case, contender: str, device: torch.device) -> float:
    """Peak memory of two steps in a process of their own, over that of the problem, MB."""
    command = [sys.executable, __file__, "_memory", json.dumps(asdict(case)), contender, str(device)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def _memory(case: Case, contender: str, device: torch.device) -> None:
    setup = Setup(case, device)
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
        step = stepper(setup, backends(device)[contender]())
        step()
        step()
        print((torch.cuda.max_memory_allocated(device) - held) / 2**20)
        return
    with contextlib.suppress(OSError):  # Linux forgets the peak of what came before
        Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    step = stepper(setup, BACKENDS[contender]())
    step()
    step()
    print((_resident("VmHWM") - before) / 1024)


def _resident(name: str) -> float:
    """A figure of this process in kB; NaN where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return float(line.split()[1])
    return math.nan


def show(rows: list[dict[str, Any]], suite: str, output: Path) -> None:
    """Print a case, and save what there is so far."""
    table = pd.DataFrame(rows)
    output.mkdir(parents=True, exist_ok=True)
    table.to_csv(output / f"engine-{suite}.csv", index=False, float_format="%.4g")
    case = table[["model", "victims", "batch", "size", "options"]].iloc[-1]
    same = (table[case.index] == case).all(axis=1)
    shown = ["contender", "milliseconds", "per_second", "to_sequential", "to_breaching", "gemm_share", "peak_megabytes"]
    print(*(f"{name} {value}" for name, value in case.items()), "must reach", table[same]["must_reach"].iloc[0])
    print(table[same][shown].to_string(index=False, float_format="{:.3g}".format), flush=True)


def plot(path: Path, suite: str) -> None:
    """Draw the ratios to `sequential`, or for `growth` the time against what grows."""
    mpl.use("agg")
    from matplotlib import pyplot as plt

    table = pd.read_csv(path)
    if suite == "growth":
        panels = [("lenet", "victims"), ("mlp", "parameters"), ("convnet", "size")]
        figure, axes = plt.subplots(1, 3, figsize=(11, 3.5), layout="constrained")
        for axis, (model, quantity) in zip(axes, panels, strict=True):
            for contender, part in table[table.model == model].groupby("contender"):
                axis.loglog(part[quantity], part.milliseconds * part.victims, "o-", label=contender)
            axis.set(title=model, xlabel=quantity, ylabel="milliseconds a step of all victims")
        axes[0].legend()
    else:
        wide = table.assign(case=table.model + " " + table.victims.astype(str) + "x" + table.batch.astype(str))
        wide = wide.pivot_table(index="case", columns="contender", values="to_sequential", sort=False)
        figure, axis = plt.subplots(figsize=(2 + 0.7 * len(wide), 4), layout="constrained")
        wide.plot.bar(ax=axis, logy=True, ylabel="speed over sequential", xlabel="model, victims x batch")
        axis.axhline(1, color="black", linewidth=0.8)
    figure.savefig(path.with_suffix(".svg"))


def quality(iterations: int, victims: int, threads: int, output: Path, name: str) -> None:
    """Whole attacks in processes of their own: breaching's quality, and our seconds to within 0.5 dB of it."""
    rows = [_whole("breaching", iterations, victims, threads)]
    enough = rows[0]["psnr"] - 0.5

    def reached(budget: int) -> bool:
        rows.append(_whole("gradleak", budget, victims, threads))
        return bool(rows[-1]["psnr"] >= enough)

    budget = max(1, iterations // 64)
    while not reached(budget) and budget < iterations:
        budget = min(iterations, 2 * budget)
    for share in (0.625, 0.75, 0.875):  # the last doubling was coarse
        if reached(int(share * budget)):
            break
    table = pd.DataFrame(rows)
    table["seconds_ratio"] = rows[0]["seconds"] / table["seconds"]
    table["within_half_a_decibel"] = table["psnr"] >= enough
    output.mkdir(parents=True, exist_ok=True)
    table.to_csv(output / f"engine-{name}.csv", index=False, float_format="%.4g")
    print(table.to_string(index=False, float_format="{:.4g}".format))


def _whole(contender: str, iterations: int, victims: int, threads: int) -> dict[str, Any]:
    started = time.perf_counter()
    command = [sys.executable, __file__, "_whole", contender, str(iterations), str(victims), str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.perf_counter() - started
    return {
        "contender": contender,
        "iterations": iterations,
        "victims": victims,
        "threads": threads,
        "seconds": seconds,
        **json.loads(done.stdout.splitlines()[-1]),
    }


def _attack(contender: str, iterations: int, victims: int) -> None:
    setup = Setup(Case("lenet", victims), torch.device("cpu"))
    if contender == "breaching":
        peer = Peer(setup, iterations)
        images = torch.stack([peer.attack(victim) for victim in range(victims)])
        backend = ""
    else:
        plan = Plan(
            optimiser=lambda: Adam(signs=frozenset({"pixels"})),
            rate=RATE,
            schedule=SCHEDULES["step"],
            iterations=iterations,
            project=setup.project,
        )
        compute = Compute(width=victims)
        outcome = minimise(setup.problem, setup.start, setup.facts, torch.arange(victims), plan, compute)
        images = finish(setup.problem, outcome.variables, setup.facts, victims).images
        backend = outcome.backend
    print(json.dumps({"psnr": setup.psnr(images), "backend": backend}))


def main() -> None:
    """Run what the command line says."""
    if sys.argv[1:2] == ["_memory"]:
        torch.set_num_threads(1)  # but the usual allocator, which gives back what is free
        case = json.loads(sys.argv[2])
        _memory(Case(**case), sys.argv[3], torch.device(sys.argv[4]))
        return
    if sys.argv[1:2] == ["_whole"]:
        process.tune(int(sys.argv[5]))
        _attack(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=[*CASES, "quality"])
    parser.add_argument("--only", help="cases whose model has this name")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1, help="torch's threads, for every contender")
    parser.add_argument("--device", type=torch.device, default="cpu", help="cpu or cuda; peers run on the CPU only")
    parser.add_argument("--no-peers", action="store_true", help="leave breaching out")
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory")
    parser.add_argument("--iterations", type=int, default=1000, help="breaching's steps for `quality`")
    parser.add_argument("--victims", type=int, default=64, help="victims for `quality`")
    parser.add_argument("--output", type=Path, default=Path("results/perf"))
    given = parser.parse_args()
    process.tune(given.threads)
    name = given.suite if given.threads == 1 else f"{given.suite}-{given.threads}-threads"
    if given.device.type != "cpu":
        name = f"{name}-{given.device.type}"
    peers = has_breaching() and not given.no_peers and given.device.type == "cpu"
    if not peers:
        print("breaching is not compared with; install gradleak[peers]", file=sys.stderr)
    if given.suite == "quality":
        if not peers:
            sys.exit("quality is that of breaching, which is not installed")
        quality(given.iterations, given.victims, given.threads, given.output, name)
        return
    peak = gemm_peak(given.device)
    print(f"peak of a matrix product: {peak / 1e9:.1f} GFLOP/s")
    rows: list[dict[str, Any]] = []
    for case in CASES[given.suite]:
        if given.only in (None, case.model):
            rows += measure(case, given.device, given.repetitions, peers, not given.no_memory, peak)
            show(rows, name, given.output)
    plot(given.output / f"engine-{name}.csv", given.suite)


if __name__ == "__main__":
    main()
