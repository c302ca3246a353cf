"""The contract's checks: plugins that keep it pass, and each promise has a plugin that breaks it."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

from gradleak import registry
from gradleak.cli.main import main
from gradleak.contract import checks, findings, imports

HEAD = """
    from dataclasses import dataclass
    import torch
    from gradleak.attack import Attack, Reconstruction
    from gradleak.dataset import Dataset, Images, Split
    from gradleak.defense import Defense
    from gradleak.model import Model, Normalise

    @dataclass(frozen=True, kw_only=True)
"""
ATTACK = (
    HEAD
    + """
    class Thing(Attack):
        family = "analytic"
        reference = "test"

        def reconstruct(self, observation, generator):
            images = generator.uniform(observation.batch_size, *observation.shape)
            LINE
            return Reconstruction(images=images)
"""
)
DEFENSE = (
    HEAD
    + """
    class Thing(Defense):
        family = "compression"
        reference = "test"

        def protect(self, update, public, generator):
            LINE
            return {name: tensor / 2 for name, tensor in update.items()}

        def simulate(self, update, public):
            return {name: tensor / 2 for name, tensor in update.items()}
"""
)
MODEL = (
    HEAD
    + """
    class Thing(Model):
        reference = "test"

        def build(self, shape, classes):
            size = shape[0] * shape[1] * shape[2]
            LINE
            return torch.nn.Sequential(
                torch.nn.Flatten(), torch.nn.Linear(size, 4), torch.nn.Sigmoid(), torch.nn.Linear(4, classes)
            )
"""
)
DATASET = (
    HEAD
    + """
    class Thing(Dataset):
        reference = "test"

        def read(self, root, download):
            stream = torch.Generator().manual_seed(0)
            images = torch.rand(12, 1, 4, 4, generator=stream)
            labels = torch.arange(12) % 2
            LINE
            return Split(Images(images[:6], labels[:6]), Images(images[6:].contiguous(), labels[6:]), ("a", "b"))
"""
)
SERVER = (
    HEAD.replace(
        "import torch\n",
        "import torch\n    from gradleak.server import Server\n    from gradleak.threat import Power\n"
        "    from gradleak.update import copied\n",
    )
    + """
    class Thing(Server):
        reference = "test"
        surface = Power.PARAMETERS

        def tamper(self, module, auxiliary, generator, client=0):
            changed = copied(module)
            weight = next(changed.parameters())
            with torch.no_grad():
                LINE
                weight.mul_(2).add_(torch.rand(weight.shape, generator=generator).to(weight))
            return changed
"""
)
KEPT = {"attacks": ATTACK, "defenses": DEFENSE, "models": MODEL, "datasets": DATASET, "servers": SERVER}

# The plugin, what is done to it, and the beginning of the promise that it breaks.
BROKEN = [
    ("attacks", "images = images[:, :, :1, :2]", "answers every victim"),
    ("attacks", "images = 2 * images", "answers every victim"),
    ("attacks", "images = images.float()", "answers every victim"),
    ("attacks", "images = images / len(images)", "answers no victim differently"),
    ("attacks", "images = torch.rand(images.shape, dtype=torch.float64)", "changes nothing it is handed"),
    ("attacks", "next(iter(observation.message.values())).zero_()", "changes nothing it is handed"),
    ("attacks", "import os; images = images * 0 + int.from_bytes(os.urandom(4), 'big') / 2**32", "gives the same"),
    ("attacks", "from gradleak.federation import client", "does not reach the truth"),
    ("attacks", "from gradleak.datasets import digits", "does not reach the truth"),
    ("attacks", "from gradleak.contract import Case", "does not reach the truth"),
    ("defenses", "return {name: tensor for name, tensor in update.items()}", "changes what is sent"),
    ("defenses", "return {name: tensor / 3 for name, tensor in update.items()}", "simulates victims in a stack"),
    ("defenses", "return {name: tensor / 0 for name, tensor in update.items()}", "sends finite messages"),
    ("defenses", "return {name: tensor.flatten() for name, tensor in update.items()}", "sends finite messages"),
    ("defenses", "return {name: torch.rand_like(tensor) for name, tensor in update.items()}", "sends finite messages"),
    ("defenses", "return {name: tensor.mul_(0.5) for name, tensor in update.items()}", "changes neither the update"),
    ("defenses", "return {name: torch.ones_like(tensor) for name, tensor in update.items()}", "packs messages"),
    ("models", "return torch.nn.Flatten()", "gives finite logits"),
    ("models", "torch.manual_seed(0)", "draws its weights"),
    (
        "models",
        "return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(size, classes), torch.nn.Hardsigmoid())",
        "can be differentiated twice",
    ),
    ("datasets", "images = images * 255", "holds images of one shape"),
    ("datasets", "labels = labels + 1", "holds images of one shape"),
    ("datasets", "images[6:] = images[:6]", "shows no private image"),
    ("datasets", "images = torch.rand(12, 1, 4, 4)", "reads the same images"),
    ("servers", "return module", "changes what its surface says"),
    ("servers", "changed.append(torch.nn.Linear(10, 10).to(weight))", "changes what its surface says"),
    ("servers", "next(module.parameters()).mul_(2)", "changes a copy"),
    ("servers", "weight = weight.add_(torch.rand(weight.shape).to(weight))", "changes a copy"),
    ("servers", "changed.append(torch.nn.Flatten(0))", "sends a model"),
]


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_files", {})


def plugin(folder: Path, code: str, line: str = "pass", name: str = "thing") -> Path:
    path = folder / f"{name}.py"
    path.write_text(textwrap.dedent(code).replace("LINE", line))
    return path


HALVES = "protect(self, update, public, generator): return {n: t / 2 for n, t in update.items()}"
SIGNS = "protect(self, update, public, generator): return {n: t.sign() for n, t in update.items()}"
GUESSES = "simulate(self, update, public): return {n: t.sign() for n, t in update.items()}"
SCORES = "nll(self, message, simulated, public): return simulated['4.bias'].square().sum()"

# What a defense declares, a method that it brings, and the beginning of what is said.
MISDECLARED = [
    ("linear = True", GUESSES, "linear = True"),
    ("additive = True", SIGNS, "additive = True"),
    ("linear = 1", HALVES, "linear, additive must be True or False"),
    ("linear = simulates = False", GUESSES, "simulates = False"),
    ("has_likelihood = True", HALVES, "has_likelihood = True, but there is no `nll`"),
    ("has_likelihood = False", SCORES, "has_likelihood = False, but there is an `nll`"),
    ("prepares = False", "prepare_model(self, module): return torch.nn.Sequential(module)", "prepares = False"),
    (
        "publishes = False",
        "public(self, template, batch_size, generator): return {'mask': torch.ones(3)}",
        "publishes = False",
    ),
    (
        "",
        "per_example(self, gradient, public): return {n: t / 2 for n, t in gradient.items()}",
        "per_example_gradients",
    ),
    ("is_adaptive_target = True", HALVES, "is_adaptive_target is True"),
    ("is_adaptive_target = False", SCORES, "is_adaptive_target is False"),
]


@pytest.mark.parametrize(("fact", "method", "said"), MISDECLARED)
def test_a_defense_is_held_to_what_it_declares(fact: str, method: str, said: str, tmp_path: Path) -> None:
    code = (
        HEAD
        + f"""
    class Thing(Defense):
        family = "compression"
        reference = "test"
        {fact}

        def {method}
"""
    )
    (found,) = [each for each in checks.check_file(plugin(tmp_path, code)) if each.check.startswith("is what it")]
    assert found.ok is False and found.detail.startswith(said) and "\n" not in found.detail


@pytest.mark.parametrize("group", KEPT)
def test_a_plugin_that_keeps_its_promises_passes(
    group: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(plugin(tmp_path, KEPT[group]))]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    # Besides: two that read its source, its names, and three of what it does to the process.
    assert len(lines) == len(checks.CHECKS[group]) + 4 + 2 * (group in ("attacks", "defenses", "servers"))
    assert all(line.startswith("ok  ") for line in lines) and said.err == ""


@pytest.mark.parametrize(("group", "line", "promise"), BROKEN)
def test_each_promise_can_be_broken(group: str, line: str, promise: str, tmp_path: Path) -> None:
    found = checks.check_file(plugin(tmp_path, KEPT[group], line))
    broken = [each for each in found if each.ok is False]
    assert promise in [each.check[: len(promise)] for each in broken], found
    assert all(each.detail and "\n" not in each.detail for each in broken)


def test_the_exit_code_says_whether_a_promise_is_broken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(plugin(tmp_path, DEFENSE, "raise ValueError('a'\n'b')"))]) == 1
    said = capsys.readouterr()
    assert "BROKEN       sends finite messages" in said.out and ": ValueError: ab (thing.py:16)\n" in said.out
    assert re.search(r"thing\.py: \d of 15 promises are broken\n$", said.err)
    assert main(["check", str(tmp_path / "absent.py")]) == 2
    assert capsys.readouterr().err.endswith("absent.py: no such file\n")


def test_what_cannot_be_checked_is_said(tmp_path: Path) -> None:
    needy = plugin(tmp_path, ATTACK.replace("reference", "amount: float\n        reference"), name="needy")
    assert checks.check_file(needy)[3:] == [
        findings.Finding("can be built with its defaults", None, "no default for amount")
    ]
    gifd = {each.check: each for each in checks.check("attacks", "gifd")}
    assert [gifd[name].ok for name in gifd if name.startswith(("answers", "gives", "changes"))] == [None] * 4
    (_, found) = checks.check("datasets", "folder")
    assert (found.ok, found.detail) == (None, "no default for path")


def test_the_readme_s_defense_keeps_its_promises(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n# rounding\.py.*?\n(.*?)```", text, re.DOTALL)
    (tmp_path / "rounding.py").write_text(code)
    assert [each for each in checks.check_file(tmp_path / "rounding.py") if not each.ok] == []


def test_datasets_are_out_of_reach_through_what_builds_them(tmp_path: Path) -> None:
    for line in ("from gradleak import registry", "import gradleak", "from gradleak.dataset import Data"):
        (tmp_path / "spy.py").write_text(line + "\n")
        with pytest.raises(findings.Broken, match="reaches"):
            imports.keeps_away_from_the_truth(tmp_path / "spy.py")
    (tmp_path / "spy.py").write_text("from gradleak.dataset import Images\n")
    imports.keeps_away_from_the_truth(tmp_path / "spy.py")
