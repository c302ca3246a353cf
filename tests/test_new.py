"""`gradleak new`: what it writes passes `gradleak check` and its own test, and nothing is overwritten."""

from __future__ import annotations

import importlib.util
import tomllib
from pathlib import Path

import pytest
import yaml

from gradleak import registry, suite
from gradleak.cli import new
from gradleak.cli.main import main
from gradleak.contract import check_file
from gradleak.errors import GradleakError
from gradleak.evaluation.beside import boards, suite_of
from gradleak.evaluation.runner import plan
from gradleak.evaluation.workshop import Resources

KINDS = sorted(registry.GROUPS.values())


def passes(test: Path) -> None:
    """Run the tests of a file."""
    spec = importlib.util.spec_from_file_location(f"written_{test.stem}", test)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    run = [function() for name, function in vars(module).items() if name.startswith("test_")]
    assert len(run) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_passes_check_and_its_test(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kind in new.kinds(), "every group has a template"
    assert main(["new", kind, f"my-{kind}", "--out", str(tmp_path)]) == 0
    plugin, test = tmp_path / f"my_{kind}.py", tmp_path / f"test_my_{kind}.py"
    said = capsys.readouterr()
    assert said.out.split() == [str(plugin), str(test)] and f"gradleak check {plugin}" in said.err
    before = plugin.read_text()
    plugin.write_text(before + "# mine\n")
    assert main(["new", kind, f"my-{kind}", "--out", str(tmp_path)]) == 2
    assert "already exists" in capsys.readouterr().err and plugin.read_text().endswith("# mine\n")
    found = check_file(plugin)
    assert all(each.ok for each in found), [each for each in found if not each.ok]
    passes(test)


@pytest.mark.parametrize("kind", KINDS)
def test_a_package_is_found_by_its_entry_point(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["new", kind, f"own-{kind}", "--package", "--out", str(tmp_path)]) == 0
    root, group = tmp_path / f"own-{kind}", new.kinds()[kind]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    # As an installer writes them.
    info = root / "src" / f"gradleak_own_{kind}-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    ((name, value),) = project["entry-points"][f"gradleak.{group}"].items()
    (info / "entry_points.txt").write_text(f"[gradleak.{group}]\n{name} = {value}\n")
    monkeypatch.syspath_prepend(str(root / "src"))
    assert name == f"own-{kind}" and name in registry.names(group)
    passes(root / "tests" / f"test_own_{kind}.py")


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_of_one_word_will_do(kind: str, tmp_path: Path) -> None:
    assert main(["new", kind, "mine", "--out", str(tmp_path)]) == 0
    assert "class Mine(" in (tmp_path / "mine.py").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_may_be_spelt_as_its_file(kind: str, tmp_path: Path) -> None:
    assert main(["new", kind, f"spelt_{kind}", "--out", str(tmp_path)]) == 0
    assert f'"spelt-{kind}"' in (tmp_path / f"test_spelt_{kind}.py").read_text()
    assert f"spelt_{kind}" not in (tmp_path / f"spelt_{kind}.py").read_text()


REFUSED = {
    "no kind": (["attak", "mine"], "did you mean 'attack'"),
    "no name": (["attack", "My Attack"], "small letters"),
    "a path": (["attack", "../mine"], "small letters"),
    "taken": (["attack", "dlg"], "already"),
    "taken, spelt otherwise": (["attack", "inverting_gradients"], "already"),
    "hides torch": (["model", "torch"], "hide the module 'torch'"),
    "hides the library": (["defense", "random"], "hide the module 'random'"),
    "a reserved word of Python": (["attack", "lambda"], "a reserved word of Python"),
    "a name of the file": (["defense", "update"], "the file needs"),
    "its own base": (["attack", "gradient-matching"], "the file needs"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_names_that_would_not_do_are_refused(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, said = REFUSED[case]
    assert main(["new", *arguments, "--out", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_small_board(kind: str, tmp_path: Path) -> None:
    assert main(["new", kind, f"my-{kind}", "--out", str(tmp_path)]) == 0
    registry.add_file(tmp_path / f"my_{kind}.py")
    path = tmp_path / "beside.yaml"
    path.write_text(yaml.safe_dump(suite_of(new.kinds()[kind], f"my-{kind}", {})))
    assert suite.read(path).tuning, "a small board is no place for evaluation victims"
    titles = [cell.title for cell in plan(path, tmp_path / "s.sqlite", Resources()).cells]
    own = [title for title in titles if f"my-{kind}" in title]
    assert own and len(own) < len(titles), "it stands beside others"


def test_check_shows_a_small_board(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", "defense", "my-defense", "--out", str(tmp_path)]) == 0
    assert main(["check", str(tmp_path / "my_defense.py"), "--board"]) == 0
    lines = capsys.readouterr().out
    assert "my-defense" in lines and "gaussian-noise 0.3" in lines and "linear-leakage" in lines
    with pytest.raises(GradleakError, match=r"no small board: .*transformer"):
        boards("attacks", "april", {}, Resources())
    with pytest.raises(GradleakError, match=r"no small board: .*needs generator"):
        boards("attacks", "ggl", {}, Resources())
