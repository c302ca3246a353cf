"""Digests of code: what moves a cell, and what does not."""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
import textwrap
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from gradleak import code, registry
from gradleak.board.newest import chosen
from gradleak.board.store import Store
from gradleak.cli.main import main
from gradleak.errors import GradleakError
from gradleak.evaluation import evaluate, renewal, runner
from gradleak.evaluation.executors import Local
from gradleak.evaluation.workshop import Resources, Workshop
from gradleak.suite import Part
from gradleak.suite.parts import code_of
from tests.test_identity import ATTACK, cells_of, plugin, write_suite

PLAIN = """
def f(x: int = 1, *, y=(2,)):
    return f"{x!r:>{y}} {x + y[0]}", lambda z: z ** -1.5
class A:
    a: int = 3
"""


def digest(source: str) -> str:
    return code.of_source(textwrap.dedent(source).encode())


def test_how_code_is_written_moves_nothing() -> None:
    dressed = '''
    """A module."""
    # It says
    def f(x: int = 1, *, y = (2,)):   # the same
        """With a docstring."""
        return (f"{x!r:>{y}} {x + y[0]}",

            lambda z: z ** (-1.5))
    class A:
        """A class."""
        a: int = 3
        """A field."""
    '''
    assert digest(PLAIN) == digest(dressed)
    # Every version of Python has to find the same, or stores of two machines would share no cell.
    assert digest(PLAIN) == PINNED


PINNED = "079aaa1d2b84ccec8e172764a8baa18335b19a1acfb61f49a05ad33860c41c4e"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("= 1", "= 2"),
        ("= 1", "= 1.0"),
        ("-1.5", "1.5"),
        ("a: int", "b: int"),
        ("!r", "!s"),
        ("*, ", ""),
        ("x + y", "y + x"),
    ],
)
def test_what_code_says_moves_it(old: str, new: str) -> None:
    assert old in PLAIN and digest(PLAIN.replace(old, new)) != digest(PLAIN)


def test_what_is_no_python_is_compared_by_its_bytes() -> None:
    assert digest("def (") != digest("def  (")


@pytest.fixture
def author(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plugin file with a helper beside it, a package of the author's elsewhere, and a file that it names."""
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    for path, text in {
        "grey.py": ATTACK.replace(
            "import torch\n", "import torch\n    import helper\n    from tools.deep import x\n", 1
        )
        .replace("@dataclass", "WEIGHTS = 'grey.bin'\n\n    @dataclass", 1)
        .replace("family", "where: str = ''\n        family", 1),
        "lib/helper.py": "import json\nimport numpy\nfrom other import y\n",
        "lib/other.py": "y = 1\n",
        "lib/unused.py": "z = 1\n",
        "lib/tools/__init__.py": "",
        "lib/tools/deep.py": "from . import beside\nx = 1\n",
        "lib/tools/beside.py": "b = 1\n",
        "grey.bin": "weights",
    }.items():
        plugin(tmp_path / path, text)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "option.bin").write_text("weights")
    for name in ("helper", "other", "tools", "tools.deep", "tools.beside"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    registry.add_file(tmp_path / "grey.py")
    return tmp_path


@pytest.mark.parametrize(
    ("file", "text", "moves"),
    [
        ("lib/helper.py", "import json\nimport numpy\nfrom other import y\nw = 2\n", True),
        ("lib/helper.py", "# a comment\nimport json\nimport numpy\nfrom other import y\n", False),
        ("lib/other.py", "y = 2\n", True),
        ("lib/tools/__init__.py", "v = 1\n", True),
        ("lib/tools/beside.py", "b = 2\n", True),
        ("lib/unused.py", "z = 2\n", False),
        ("grey.bin", "other weights", True),
        ("option.bin", "other weights", True),
        ("unnamed.bin", "weights", False),
    ],
)
def test_a_plugin_is_what_belongs_to_it(author: Path, file: str, text: str, moves: bool) -> None:
    options = {"where": "option.bin"}
    before = code_of("attacks", "grey", options)
    (author / file).write_text(text)
    assert (code_of("attacks", "grey", options) != before) == moves
    part = Part("grey", options=options, code=before)
    if moves:
        with pytest.raises(GradleakError, match="attack 'grey': its code is not that of this cell"):
            part.check_code("attacks")
    else:
        part.check_code("attacks")


def test_a_package_unpacked_in_a_folder_of_the_path_is_not_the_author_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "unpacked"  # as by `pip install --target`
    monkeypatch.syspath_prepend(str(folder))
    for path, text in {
        "unpacked/theirs.py": "a = 1\n",
        "unpacked/theirs-1.0.dist-info/RECORD": "theirs.py,sha256=x,6\ntheirs-1.0.dist-info/RECORD,,\n",
        "unpacked/mine.py": "b = 1\n",
        "unpacked/mine-1.0.dist-info/RECORD": "__editable__.mine-1.0.pth,,\nmine-1.0.dist-info/RECORD,,\n",
        "thing.py": "import mine\nimport theirs\n",
    }.items():
        plugin(tmp_path / path, text)
    assert [path.name for path in code.local_files(tmp_path / "thing.py")] == ["thing.py", "mine.py"]


def test_files_that_options_name_are_looked_for_below_the_data_root(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    found = []
    for text in ("a", "b"):
        (tmp_path / "w" / "x.bin").write_text(text)
        found.append(code_of("defenses", "none", {"deep": [{"path": "w/x.bin"}]}, tmp_path))
    assert len(set(found)) == 2
    # A folder may be one that the plugin writes to.
    assert code_of("defenses", "none", {"folder": "./w"}, tmp_path) == code_of("defenses", "none", {})
    assert code_of("datasets", "folder", {"path": "w/x.bin"}, tmp_path) == code_of("datasets", "folder", {})


def test_built_ins_follow_their_own_file_and_what_they_share(tmp_path: Path) -> None:
    folder = Path(next(iter(sys.modules["gradleak.attacks"].__path__)))
    found: dict[str, str] = {}
    code._follow("gifd", folder / "gifd.py", "gradleak.attacks", folder, found)
    assert set(found) == {"gifd", "gradleak.attacks._latent"}, "the core is no part of it"
    names = registry.names("attacks")
    assert len({registry.fingerprint("attacks", name) for name in names}) == len(names)
    edited = tmp_path / "dlg.py"
    edited.write_text((folder / "dlg.py").read_text() + "\nX = 1\n")
    assert code.of_file(edited, package="gradleak.attacks") != registry.fingerprint("attacks", "dlg")


def test_an_installed_plugin_is_its_version_and_all_files_of_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    info, package = tmp_path / "leaky-1.0.dist-info", tmp_path / "leaky_plugins"
    for path, text in {
        info / "METADATA": "Metadata-Version: 2.1\nName: leaky\nVersion: 1.0\n",
        info / "entry_points.txt": "[gradleak.attacks]\ndrip = leaky_plugins.drip:Drip\n",
        package / "__init__.py": "raise SystemExit('nothing is imported')\n",
        package / "drip.py": "class Drip: pass\n",
        package / "data" / "w.bin": "weights",
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def now() -> str:
        (entry,) = entry_points(group="gradleak.attacks", name="drip")
        return code.of_entry(entry)

    found = [now()]
    (package / "drip.py").write_text("# a comment\nclass Drip: pass\n")
    assert now() == found[0]
    for path, text in (
        (package / "drip.py", "class Drip: x = 1\n"),
        (package / "data" / "w.bin", "other weights"),
        (package / "helper.py", ""),
        (info / "METADATA", "Metadata-Version: 2.1\nName: leaky\nVersion: 1.1\n"),
    ):
        path.write_text(text)
        found.append(now())
    assert len(set(found)) == 5


def test_digests_take_no_torch() -> None:
    script = "import sys; from gradleak.suite.parts import code_of; assert code_of('attacks', 'dlg', {})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", f"{script}; assert 'torch' not in sys.modules"], check=True, env=environment)


def test_boards_show_the_newest_code_and_old_code_can_be_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, store = write_suite(tmp_path, attacks=["mean-image", "grey"]), tmp_path / "s.sqlite"
    larger = write_suite(tmp_path / "larger", attacks=["mean-image", "grey"], defenses=["none", "top-k"])
    for place, grey in enumerate(("0.5", "0.7")):
        monkeypatch.setattr(registry, "_files", {})
        file = plugin(tmp_path / str(place) / "grey.py", ATTACK.replace("0.5", grey))
        assert runner.run(larger, store, Local(), Resources(), [file]).ran == (4, 2)[place]

    def shown(*options: str) -> list[dict[str, str]]:
        assert main(["leaderboard", str(store), "--format", "csv", "--board", "attacks", *options]) == 0
        return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))

    assert [each["attack"] for each in shown()] == ["grey", "mean-image"]
    assert len(shown("--all-code")) == 3
    defenses = [shown(*options, "--board", "defenses") for options in ((), ("--suite", str(path)))]
    assert ["top-k" in str(found) for found in defenses] == [True, False]
    assert main(["leaderboard", str(store), "--suite", str(write_suite(tmp_path / "n", victims=3))]) == 2
    assert "no cell of the suite is stored" in capsys.readouterr().err
    assert main(["store", "prune", str(store), "--dry-run"]) == 0
    assert "2 cells would be dropped" in capsys.readouterr().err
    assert main(["store", "prune", str(store), "--suite", str(path)]) == 0
    assert "4 cells were dropped" in capsys.readouterr().err
    assert runner.run(path, store, Local(), Resources(), [file]).ran == 0, "what is left is what the suite asks for"


def test_edited_code_is_computed_anew_and_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, store = (
        write_suite(tmp_path, attacks=["mean-image", "grey"], defenses=["none", "top-k"]),
        tmp_path / "s.sqlite",
    )
    file = plugin(tmp_path / "grey.py", ATTACK)
    run: Any = lambda chosen: runner.run(path, store, Local(), Resources(), [chosen])  # noqa: E731
    assert run(file).ran == 4 and run(file).ran == 0
    monkeypatch.setattr(registry, "_files", {})
    edited = plugin(tmp_path / "new" / "grey.py", ATTACK.replace("0.5", "0.7"))
    caplog.clear()
    assert run(edited).ran == 2
    with Store(store) as found:
        since = sorted(found.cells().query("attack == 'grey'")["started"])[1]  # the later of the two before the edit
        cells = cells_of(path)
        assert renewal.reasons(found, []) == [] and len(found.cells()) == 6
    assert [line for line in caplog.messages if "anew" in line] == [
        f"2 cells are computed anew: the code of attack 'grey' changed since {since}"
    ]
    # A cell that was planned by other code than is here now is refused, not computed as if it were.
    monkeypatch.setattr(registry, "_files", {})
    registry.add_file(plugin(tmp_path / "third" / "grey.py", ATTACK.replace("0.5", "0.8")))
    (grey, *_) = [cell for cell in cells if cell.attack.name == "grey"]
    assert evaluate.evaluate(grey, Workshop()).error == "attack 'grey': its code is not that of this cell"


SERVER = """
    from dataclasses import dataclass

    import torch

    from gradleak.knowledge import Power
    from gradleak.server import Server
    from gradleak.update import copied


    @dataclass(frozen=True, kw_only=True)
    class Louder(Server):
        '''Scales the weights that it sends.'''

        surface = Power.PARAMETERS
        reference = "test"

        def tamper(self, module, auxiliary, generator, client=0):
            changed = copied(module)
            with torch.no_grad():
                changed[-1].weight.mul_(2.0)
            return changed
"""
CLIENT = """
    from dataclasses import dataclass

    from gradleak.client import Client


    @dataclass(frozen=True, kw_only=True)
    class Louder(Client):
        '''Takes longer steps.'''

        reference = "test"

        @property
        def optimises(self):
            return True

        def step(self, parameters, gradient, state, lr):
            return {name: tensor - 2.0 * lr * gradient[name] for name, tensor in parameters.items()}, state
"""


@pytest.mark.parametrize(("part", "text"), [("server", SERVER), ("client", CLIENT)])
def test_boards_show_the_newest_code_of_servers_and_clients(
    part: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    common = {"grants": {"labels": "known", "local_training": True}, "local_lr": 0.1}
    settings = [{"name": "plain", **common}, {"name": "louder", part: "louder", **common}]
    store, ran = tmp_path / "s.sqlite", []
    for factor in ("2.0", "3.0"):
        monkeypatch.setattr(registry, "_files", {})
        file = plugin(tmp_path / factor / "louder.py", text.replace("2.0", factor))
        path = write_suite(tmp_path, attacks=["linear-leakage"], settings=settings)
        ran.append(runner.run(path, store, Local(), Resources(), [file]).ran)
    assert ran == [2, 1], "only the edited one is another cell"
    with Store(store) as opened:
        cells = opened.cells()
    newest = chosen(cells)
    assert sorted(newest["setting"]) == ["louder", "plain"] and "1 cells of older code" in caplog.text
    assert f"1 cell is computed anew: the code of {part} 'louder' changed" in caplog.text
    assert newest["id"].max() == cells["id"].max(), "what was run last is shown"
    assert len(chosen(cells, all_code=True)) == 3
