"""Plugins of others: each kind of mistake is one line that names the file, its line, and what was expected."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from gradleak import plugins, registry
from gradleak.cli.main import main
from gradleak.contract import behaviour, checks, findings, process
from gradleak.contract.victims import Ask
from gradleak.errors import GradleakError

HEAD = """
from dataclasses import dataclass
import torch
from gradleak.attack import Attack, GradientMatching, Reconstruction
from gradleak.dataset import Dataset
from gradleak.defense import Defense
from gradleak.model import Model

@dataclass(frozen=True, kw_only=True)
class Thing(BASE):
    family = "FAMILY"
    reference = "test"
"""
KINDS = {"attack": ("Attack", "analytic"), "search": ("GradientMatching", "optimisation")}
KINDS |= {"defense": ("Defense", "noise"), "model": ("Model", ""), "dataset": ("Dataset", "")}
SUITE = """
name: x
version: 1
victims: 2
attacks: [ATTACK]
defenses: [DEFENSE]
models: [MODEL]
controls: listed
datasets: [DATASET]
settings: [{name: one, batch_size: 1, grants: {labels: known}}]
"""
USUAL = {"attack": "{dlg: {iterations: 3}}", "defense": "none", "model": "{mlp: {widths: [4]}}", "dataset": "digits"}

# What is written, and what its line says; @ stands for the line that is to be named.
CELLS = [
    (
        "search",
        "def distance(self, guess, observed): #@\n  return torch.stack([t.sum() for t in guess.values()])",
        "[4]; a",
    ),
    ("search", "def distance(self, guess, observed): #@\n  return 1.0", "distance returned 1.0; a scalar tensor"),
    ("search", "def distance(self, guess, observed): #@\n  pass", "distance returned None"),
    ("search", "def distance(self, guess, observed): #@\n  return guess['2.bias'].detach().sum()", "without a graph"),
    (
        "search",
        "def distance(self, guess, observed): #@\n  return guess['2.bias'].sum() * float('nan')",
        "returned nan",
    ),
    (
        "search",
        "def distance(self, guess, observed): #@\n  return guess['2.bias'].mul_(2).sum()",
        "changed '2.bias' of",
    ),
    ("search", "def distance(self, guess, observed):\n  return guess['no'].sum() #@", "KeyError: 'no'"),
    (
        "search",
        "def penalty(self, images): #@\n  return images.sum((-1, -2))",
        "penalty returned shape [1, 1]; a scalar",
    ),
    ("search", "def penalty(self, images): #@\n  return images.sum() / 0", "penalty returned inf at the start"),
    ("search", "def initial(self, observation, generator): #@\n  return {}", "initial returned an empty dict"),
    ("search", "def initial(self, observation, generator): #@\n  return {'pixels': torch.zeros(1, 8)}", "[2, ...] is"),
    ("search", "def decode(self, variables, facts): #@\n  return variables", "decode returned a dict; a Guess is"),
    ("attack", "def reconstruct(self, o, g):\n  raise SystemExit(7) #@", "SystemExit: 7"),
    ("attack", "def reconstruct(self, o, g):\n  raise ValueError('one\\ntwo') #@", "ValueError: one two"),
    (
        "attack",
        "def reconstruct(self, o, g): #@\n  o.update['2.bias'].data.zero_()\n"
        "  return Reconstruction(images=torch.ones(2, 1, *o.shape))",
        "reconstruct changed message '2.bias'",
    ),
    (
        "defense",
        "def protect(self, update, public, generator): #@\n  return {n: t.flatten()[:3] for n, t in update.items()}",
        "shape [3] for '2.weight'; [4, 64] is needed",
    ),
]
# Refused before anything runs.
INVALID = [
    ("attack", "def reconstruct(self, observation, generator): #@\n  pass", "NoneType (allowed: Reconstruction)"),
    (
        "attack",
        "def reconstruct(self, o, g): #@\n  return Reconstruction(images=torch.ones(2, 64))",
        "images of shape [2, 64]",
    ),
    (
        "attack",
        "def reconstruct(self, o, g): #@\n  return Reconstruction(images=torch.ones(2, 1, *o.shape),"
        "details={'a': 3.0})",
        "details['a'] are float (allowed: a tensor)",
    ),
]
# What is found before anything runs.
PLANS = [
    (
        "defense",
        "def protect(self, update, public, generator): #@\n  return list(update)",
        "protect returned a list; a dict",
    ),
    (
        "defense",
        "def protect(self, update, public, generator): #@\n  return {n: t + torch.rand(1) for n, t in update.items()}",
        "drew from the global generator",
    ),
    (
        "defense",
        "def encode(self, images, targets, generator):\n  return images @ targets, targets #@",
        "RuntimeError: ",
    ),
    ("model", "def build(self, shape, classes): #@\n  return None", "build returned NoneType; a torch.nn.Module"),
    (
        "model",
        "def build(self, shape, classes): #@\n  return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 7))",
        "returned shape [2, 7] for 2 images; [2, 10]",
    ),
    (
        "model",
        "def build(self, shape, classes): #@\n  return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(9))",
        "has no size yet",
    ),
    ("dataset", "def read(self, root, download):\n  return open('/nowhere/file') #@", "FileNotFoundError"),
    ("defense", "def prepare_model(self, module):\n  return module.absent #@", "AttributeError"),
    (
        "attack",
        "def reconstruct(self, o, g): ...\ndef unsuited(self, *args):\n  raise SystemExit(3) #@",
        "SystemExit: 3",
    ),
]
# Whole files that cannot be loaded.
FILES = [
    ("import sys; sys.exit('bye') #@", "importing it raised SystemExit: bye"),
    ("import os; os._exit(3) #@", "importing it raised SystemExit: os._exit(3)"),
    ("\nx = 1 / 0 #@", "ZeroDivisionError"),
    ("def ( #@", "SyntaxError"),
    ("import absent_library #@", "No module named 'absent_library'"),
    (
        "from gradleak.defense import Defense\nclass A(Defense): #@\n  family = reference = 'x'",
        "is not a dataclass of its own",
    ),
    (
        "from dataclasses import dataclass\nfrom gradleak.defense import Defense\n@dataclass #@\n"
        "class A(Defense): pass",
        "a plugin is frozen; write @dataclass(frozen=True",
    ),
    (
        "from dataclasses import dataclass\nfrom gradleak.attack import Attack\n@dataclass(frozen=True) #@\n"
        "class A(Attack):\n  family = reference = 'x'",
        "lacks the method reconstruct",
    ),
    (
        "from dataclasses import dataclass\nfrom gradleak.defense import Defense\n@dataclass(frozen=True) #@\n"
        "class A(Defense):\n  family = 'noise'",
        "does not declare reference",
    ),
]


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_files", {})


def write(folder: Path, kind: str, body: str, name: str = "thing") -> tuple[Path, int]:
    """Write a plugin; return its file and the line that it marks."""
    base, family = KINDS[kind]
    text = HEAD.replace("BASE", base).replace("FAMILY", family) + textwrap.indent(body, 4 * " ")
    return written(folder, text, name)


def written(folder: Path, text: str, name: str = "thing") -> tuple[Path, int]:
    path = folder / f"{name}.py"
    path.write_text(text, encoding="utf-8")
    marked = [number for number, line in enumerate(text.splitlines(), 1) if "#@" in line]
    return path, marked[0] if marked else 0


def run(folder: Path, kind: str, plugin: Path) -> int:
    text = SUITE
    for axis, usual in USUAL.items():
        chosen = "thing" if axis == {"search": "attack"}.get(kind, kind) else usual
        text = text.replace(
            axis.upper(), "{thing: {iterations: 3}}" if chosen == "thing" and kind == "search" else chosen
        )
    (folder / "s.yaml").write_text(text)
    arguments = [str(folder / "s.yaml"), "--store", str(folder / "s.sqlite"), "--plugin", str(plugin)]
    return main(["run", *arguments, "--executor", "local"])


@pytest.mark.parametrize(("kind", "body", "says"), CELLS)
def test_a_cell_fails_with_the_plugin_s_line(
    kind: str, body: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, line = write(tmp_path, kind, body)
    assert run(tmp_path, kind, path) == 1
    (failed,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gradleak: failed: ")]
    assert says in failed and failed.endswith(f"(thing.py:{line})")


@pytest.mark.parametrize(("kind", "body", "says"), INVALID)
def test_an_answer_that_is_none_is_invalid_by_the_plugin_s_line(
    kind: str, body: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, line = write(tmp_path, kind, body)
    assert run(tmp_path, kind, path) == 0
    (said,) = [text for text in capsys.readouterr().err.splitlines() if "is invalid" in text]
    assert says in said and said.endswith(f"(thing.py:{line})")


@pytest.mark.parametrize(("kind", "body", "says"), PLANS)
def test_what_can_be_found_before_anything_runs_is_found_there(
    kind: str, body: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, line = write(tmp_path, kind, body)
    assert run(tmp_path, kind, path) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert says in said and said.endswith(f"(thing.py:{line})") and not (tmp_path / "s.sqlite").exists()


@pytest.mark.parametrize(("text", "says"), FILES)
def test_a_file_that_is_no_plugin_is_refused_in_one_line(text: str, says: str, tmp_path: Path) -> None:
    path, line = written(tmp_path, text)
    with pytest.raises(GradleakError) as refused:
        registry.add_file(path)
    assert says in str(refused.value) and str(refused.value).endswith(f"(thing.py:{line})")
    assert "\n" not in str(refused.value)


def test_an_import_without_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "IMPORT_LIMIT", 0.3)
    path, _ = written(tmp_path, "x = 0\nwhile True: #@\n  x += 0")
    with pytest.raises(GradleakError, match=r"longer than 0\.3 s \(thing\.py:[23]\)$"):
        registry.add_file(path)


@pytest.mark.parametrize("name", ["my attack", "3rd", "UPPER", "ünïcode", "a__b", "dlg"])
def test_a_file_needs_a_name_of_its_own(name: str, tmp_path: Path) -> None:
    path, _ = write(tmp_path, "search", "pass", name)
    with pytest.raises(GradleakError, match="rename the file"):
        registry.add_file(path)


def test_a_name_close_to_a_hook_s_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    body = "iterations: int = 1\ndef distence(self, guess, observed): #@\n  return 0\ndef helper(self): ..."
    path, line = write(tmp_path, "search", body)
    assert run(tmp_path, "search", path) == 0
    says = f"method 'distence' overrides nothing; is it meant to be 'distance'? (thing.py:{line})"
    assert [record.getMessage() for record in caplog.records if "distence" in record.getMessage()] == [
        f"--plugin {path}: {says}"
    ]
    (found,) = [each for each in checks.check("attacks", "thing") if each.state == "warning"]
    assert found.detail == says


def test_no_defense_without_an_adaptive_answer_is_said_to_give_one(tmp_path: Path) -> None:
    body = "def encode(self, images, targets, generator):\n  return images.flip(-1), targets"
    found = checks.check_file(write(tmp_path, "defense", body)[0])
    (answer,) = [each for each in found if each.check.startswith("gives an adaptive")]
    assert answer.ok is None and "no adaptive answer" in answer.detail


@pytest.mark.filterwarnings("always")
def test_what_a_plugin_changes_prints_and_looks_at_is_found_and_put_back(tmp_path: Path) -> None:
    body = """
def reconstruct(self, observation, generator):
  torch.set_grad_enabled(False); torch.set_default_dtype(torch.float64); torch.manual_seed(1)
  print("hello")
  import sys, warnings
  warnings.warn("beware")
  sys._getframe(1).f_locals.get("images")
  open
  return Reconstruction(images=generator.uniform(1, *observation.shape))
"""
    path, _ = write(tmp_path, "attack", body)
    found = {each.check.partition(",")[0]: each.detail for each in checks.check_file(path) if each.ok is False}
    (line,) = [number for number, text in enumerate(path.read_text().splitlines(), 1) if "hello" in text]
    assert found["prints nothing and warns of nothing"] == (
        f"printed 'hello' (thing.py:{line}); warned 'beware' (thing.py:{line + 2})"
    )
    changed = found["leaves the settings of torch and of the process as they are"]
    assert f"the gradient mode (thing.py:{line - 1}), the default dtype (thing.py:{line - 1})" in changed
    assert f"uses _getframe (thing.py:{line + 3})" in found["looks at no frames"]
    assert torch.is_grad_enabled() and torch.get_default_dtype() is torch.float32


BLAMED = {
    "a field of that name": ("def f(self): return self.seed, self.random.shuffle(self.choice)", ""),
    "a generator of its own": ("import random\nSTREAM = random.Random(0).random()", ""),
    "another module's": ("import numpy.random as random\nrandom.seed(0)", ""),
    "the module": ("import random\nrandom.gauss(0, 1)", "own.py:2"),
    "by another name": ("from random import betavariate as noise\nnoise(1, 1)", "own.py:2"),
    "a module beside it": ("import beside", "beside.py:3"),
}


@pytest.mark.parametrize("case", BLAMED)
def test_only_code_that_names_a_global_generator_is_blamed_for_it(case: str, tmp_path: Path) -> None:
    source, place = BLAMED[case]
    path = tmp_path / "own.py"
    path.write_text(source)
    (tmp_path / "beside.py").write_text("import random\n\nrandom.random()")
    watch, before = behaviour.Watch(path), random.getstate()
    with watch():
        random.random()  # as libraries do when they are imported
    assert random.getstate() == before
    assert watch.changed == ({"Python's global generator": place} if place else {})


def test_checks_go_by_options_dataset_model_and_shape(tmp_path: Path) -> None:
    ask = Ask(options={"iterations": 2}, model="lenet", shape=(3, 16, 16))
    assert [each for each in checks.check("attacks", "dlg", ask) if not each.ok] == []
    wrong = checks.check("attacks", "dlg", Ask(options={"lr": "high"}))
    assert [each.check for each in wrong if not each.ok] == ["can be built with these options"]


ENDINGS = [
    ("import os; os._exit(3) #@", "the process ended with exit code 3"),
    ("import ctypes; ctypes.string_at(0) #@", "the process was ended by SIGSEGV"),
    ("while True: __import__('time').sleep(1) #@", "took longer than 9 s"),
]


@pytest.mark.parametrize(("line", "says"), ENDINGS)
def test_a_check_survives_the_plugin(line: str, says: str, tmp_path: Path) -> None:
    path, number = write(tmp_path, "attack", f"def reconstruct(self, o, g):\n  {line}")
    found = list(process.findings(process.Job(str(path)), 9 if "longer" in says else 60))
    (broken,) = [each for each in found if each.ok is False and "looks at" not in each.check]
    assert broken.check.startswith("answers every victim") and broken.detail == f"{says} (thing.py:{number})"
    assert found[-1] == findings.Finding("keeps its other promises", None, "not reached")


def test_the_command_takes_names_and_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "random-image", "--json", "--options", "{}", "--model", "mlp"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["broken"] == 0 and {each["state"] for each in found["findings"]} == {"ok"}
    for wrong, says in (
        (["check", "random-imag"], "did you mean 'random-image'"),
        (["check", "dlg", "--shape", "3"], "3,32"),
    ):
        assert main(wrong) == 2
        assert says in capsys.readouterr().err


def install(folder: Path, package: str, entries: str) -> None:
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(textwrap.dedent(entries))


def test_one_bad_package_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base, family = KINDS["defense"]
    good = HEAD.replace("BASE", base).replace("FAMILY", family)
    for module, text in {"good_one": good, "raises": "x = 1 / 0"}.items():
        written(tmp_path, text, module)
    install(
        tmp_path,
        "others",
        """
        [gradleak.defenses]
        good = good_one:Thing
        top-k = good_one:Thing
        No Name = good_one:Thing
        absent = nowhere
        raises = raises
        [gradleak.attacks]
        misplaced = good_one:Thing
        """,
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(plugins, "_packages", set())
    registry._installed.cache_clear()
    registry._warn.cache_clear()
    listed = {name: registry.describe("defenses", name)["error"] for name in registry.names("defenses")}
    broken = {name: error for name, error in listed.items() if error}
    assert set(broken) == {"top-k (others)", "No Name (others)", "absent", "raises"} and not listed["good"]
    assert listed["top-k"] == "" and registry.build("defenses", "top-k").family == "compression"
    assert re.fullmatch(r"package others, .*ZeroDivisionError: division by zero \(raises\.py:1\)", broken["raises"])
    assert all("package others" in error and "\n" not in error for error in broken.values())
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "'top-k' is the name of a built-in" in said[0] and "'No Name' is not a name" in said[1]
    with pytest.raises(GradleakError, match=r"belongs in the group gradleak\.defenses.*\(good_one\.py:9\)$"):
        registry.load("attacks", "misplaced")
    registry._installed.cache_clear()


def test_an_installed_package_works_by_name(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "outsider").mkdir(parents=True)
    (source / "outsider" / "__init__.py").touch()
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools>=77"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "outsider"\nversion = "0.1"\n[tool.setuptools]\npackages = ["outsider"]\n'
        '[project.entry-points."gradleak.defenses"]\nhalf = "outsider.half"\n'
    )
    body = "def protect(self, update, public, generator):\n  return {n: t / 2 for n, t in update.items()}\n"
    body += "def simulate(self, update, public):\n  return {n: t / 2 for n, t in update.items()}\n"
    write(source / "outsider", "defense", body, "half")
    target = tmp_path / "target"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(target)]
    installed = subprocess.run([*pip, str(source)], capture_output=True, text=True, check=False)
    if installed.returncode:
        pytest.skip(f"pip cannot install here: {installed.stderr.strip().splitlines()[-1:]}")
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r})\n"
        "from gradleak.cli.main import main\nsys.exit(main(['check', 'half', '--group', 'defenses']))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0 and "ok           sends finite messages" in found.stdout, found.stdout + found.stderr
