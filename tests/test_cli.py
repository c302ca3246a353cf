"""The command line as a user meets it: the whole way of a tiny suite, kill -9, and mistakes."""

from __future__ import annotations

import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml

from gradleak import __version__, registry
from gradleak.board.store import Store
from gradleak.cli import catalogue, doctor
from gradleak.cli.main import main
from gradleak.evaluation import perceptual

SMOKE = Path(__file__).parents[1] / "benchmarks" / "smoke.yaml"


@pytest.fixture(autouse=True)
def _own_cache_and_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADLEAK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(registry, "_files", {})


def _suite(folder: Path, **changes: Any) -> Path:
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(SMOKE.read_text()), "controls": "listed", **changes}))
    return path


def _run(*arguments: object) -> int:
    return main(["run", *map(str, arguments), "--executor", "local"])


def _table(store: Path, capsys: pytest.CaptureFixture[str]) -> pd.DataFrame:
    """The leaderboard as CSV, without what a clock measured."""
    capsys.readouterr()
    assert main(["leaderboard", str(store), "--format", "csv"]) == 0
    table = pd.read_csv(io.StringIO(capsys.readouterr().out))
    return table.drop(columns=["seconds", "client_seconds"])


def test_a_suite_runs_once_and_its_leaderboard_is_true(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "s.sqlite"
    assert _run(SMOKE, "--store", store) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert "10 cells: 10 run, 0 stored already, 0 failed" in said.err
    assert "100%  cells 10/10, victims 20/20, loss " in said.err
    table = _table(store, capsys)
    assert _run(SMOKE, "--store", store) == 0
    assert "10 cells: 0 run, 10 stored already, 0 failed" in capsys.readouterr().err
    assert table.equals(_table(store, capsys))
    defenses = table[table["board"] == "defenses"].to_dict("records")
    assert [line["defense"] for line in defenses] == ["top-k(ratio=0.1)", "none"]
    sparse, bare = defenses
    assert bare["psnr_attack"] == "linear-leakage" and bare["psnr"] == 54  # where 8 bits end
    assert bare["bytes"] > 5 * sparse["bytes"]


@pytest.mark.parametrize("form", ["table", "markdown", "json", "latex"])
def test_every_format_and_board(tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str) -> None:
    store = tmp_path / "s.sqlite"
    suite = _suite(tmp_path, attacks=["linear-leakage", "mean-image"])
    assert _run(suite, "--store", store) == 0
    capsys.readouterr()
    boards = [part for name in ("defenses", "attacks", "pareto", "compute") for part in ("--board", name)]
    assert main(["leaderboard", str(store), "--format", form, *boards]) == 0
    said = capsys.readouterr()
    assert "linear-leakage" in said.out and "Trade-off" in said.out and not said.err


def test_the_store_is_named_after_the_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    suite = _suite(tmp_path, attacks=["mean-image"], defenses=["none"])
    assert main(["run", str(suite), "--dry-run"]) == 0
    said = capsys.readouterr()
    assert "mean-image · none · mlp(widths=[16]) · digits · fedsgd · oblivious · seed 0" in said.out
    assert "1 cells: 1 to run, 0 stored already, 0 failed" in said.err
    assert not Path("suite.sqlite").exists()
    assert _run(suite) == 0
    assert Path("suite.sqlite").exists()


def _started(suite: Path, store: Path, *arguments: str) -> subprocess.Popen[str]:
    """A run in another process, as soon as it has stored a cell and has more to do."""
    command = [sys.executable, "-m", "gradleak", "run", str(suite), "--store", str(store), *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    for _ in range(6000):
        time.sleep(0.02)
        assert process.poll() is None, process.communicate()[1]
        if store.exists():
            try:
                with Store(store) as found:
                    if found.statuses():
                        return process
            except Exception:  # not a store yet
                continue
    raise AssertionError("no cell was stored")


_LONGER = {
    "attacks": ["linear-leakage", {"inverting-gradients": {"iterations": 200}}, "mean-image"],
    "seeds": [0, 1],
}


def test_a_killed_run_goes_on_to_the_same_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite, store, whole = _suite(tmp_path, **_LONGER), tmp_path / "s.sqlite", tmp_path / "whole.sqlite"
    process = _started(suite, store, "--executor", "local")
    process.kill()
    process.communicate()
    with Store(store) as found:
        before = set(found.statuses())
    assert _run(suite, "--store", store) == 0
    assert _run(suite, "--store", whole, "--secret", store) == 0
    with Store(store) as found, Store(whole) as complete:
        assert before < set(found.statuses()), "the kill came too late to prove anything"
        assert found.statuses() == complete.statuses()
        assert found.rows().drop(columns="seconds").equals(complete.rows().drop(columns="seconds"))
    assert _table(store, capsys).equals(_table(whole, capsys))


def test_ctrl_c_stops_workers_and_says_how_to_go_on(tmp_path: Path) -> None:
    suite, store = _suite(tmp_path, **_LONGER), tmp_path / "s.sqlite"
    process = _started(suite, store, "--workers", "1")
    os.killpg(process.pid, signal.SIGINT)
    # Workers share the run's stderr, so its end is theirs too.
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 130, said
    assert "Traceback" not in said
    with Store(store) as found:
        stored = len(found.statuses())
    assert said.splitlines()[-1] == (
        f"gradleak: interrupted: {stored} of 14 cells are in {store}; the same command goes on"
    )


def _refused(arguments: list[object], capsys: pytest.CaptureFixture[str], *says: str) -> None:
    """One line on stderr, exit code 2, nothing else."""
    capsys.readouterr()
    assert main([str(part) for part in arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("gradleak: ") and said.err.count("\n") == 1, said.err
    for part in says:
        assert part in said.err, said.err


Refused = dict[str, Any]
SUITES: list[tuple[Refused, list[str]]] = [
    ({"victms": 3}, ["unknown key 'victms'", "did you mean 'victims'"]),
    ({"attacks": ["idgl"]}, ["attacks[0]", "'idgl'", "'idlg'"]),
    ({"defenses": [{"top-k": {"rati": 1}}]}, ["defenses[0]", "'rati'", "'ratio'"]),
    ({"defenses": [{"top-k": {"ratio": 7}}]}, ["defenses[0]", "ratio = 7"]),
    ({"attacks": ["linear-leakage"], "models": ["lenet"]}, ["'linear-leakage' cannot run on model 'lenet'", "`only`"]),
    ({"attacks": ["ggl"]}, ["'ggl' needs generator: true", "'fedsgd' does not grant", "grants"]),
    ({"attacks": ["wrong-gradient"], "victims": 1}, ["needs at least 2 victims"]),
    ({"victims": 100000}, ["'digits'", "100000"]),
]


@pytest.mark.parametrize(("changes", "says"), SUITES)
def test_a_wrong_suite(tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: Refused, says: list[str]) -> None:
    suite, store = _suite(tmp_path, **changes), tmp_path / "s.sqlite"
    _refused(["run", suite, "--store", store], capsys, f"suite {suite}: ", *says)
    assert not store.exists()


def test_a_suite_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _refused(["run", tmp_path / "no.yaml"], capsys, "no.yaml", "No such file")


def test_a_file_that_is_no_store_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("dear diary " * 100)
    _refused(["run", SMOKE, "--store", path], capsys, "is not a SQLite file")
    _refused(["leaderboard", path], capsys, "is not a SQLite file")
    assert path.read_text() == "dear diary " * 100
    foreign = tmp_path / "foreign.sqlite"
    with sqlite3.connect(foreign) as database:
        database.execute("CREATE TABLE other (x)")
    database.close()
    _refused(["run", SMOKE, "--store", foreign], capsys, "not a store of gradleak")
    _refused(["leaderboard", tmp_path / "absent.sqlite"], capsys, "no such file")
    assert not (tmp_path / "absent.sqlite").exists()


def test_a_store_of_another_schema(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s.sqlite"
    Store(path, create=True).close()
    _refused(["leaderboard", path], capsys, "holds no cell yet")
    with sqlite3.connect(path) as database:
        database.execute("UPDATE meta SET value = '99' WHERE name = 'schema'")
    database.close()
    _refused(["run", SMOKE, "--store", path], capsys, "schema 99")
    _refused(["leaderboard", path], capsys, "schema 99")


def test_a_folder_without_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "test"):
        (tmp_path / "images" / split / "cat").mkdir(parents=True)
    for name in ("images", "absent"):
        suite = _suite(tmp_path, datasets=[{"folder": {"path": name}}])
        command = ["run", suite, "--store", tmp_path / "s.sqlite", "--data-root", tmp_path]
        _refused(command, capsys, f"suite {suite}: ", str(tmp_path / name))


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("raise ValueError('boom')", "importing it raised ValueError: boom"),
        ("import no_such_library", "No module named 'no_such_library'"),
        ("def (:", "SyntaxError"),
        ("x = 1", "exactly one public class, found none"),
        ("class Thing: pass", "Thing inherits from none of"),
    ],
)
def test_a_broken_plugin(tmp_path: Path, capsys: pytest.CaptureFixture[str], code: str, says: str) -> None:
    plugin = tmp_path / "broken.py"
    plugin.write_text(code)
    _refused(["run", SMOKE, "--plugin", plugin], capsys, str(plugin), says)
    _refused(["list", "attacks", "--plugin", plugin], capsys, str(plugin), says)


def test_a_plugin_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _refused(["run", SMOKE, "--plugin", tmp_path / "no.py"], capsys, "no such file")


@pytest.mark.parametrize("device", ["cuda:99", "quantum"])
def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str], device: str) -> None:
    _refused(["run", SMOKE, "--device", device], capsys, f"device '{device}' is not available")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_cuda(capsys: pytest.CaptureFixture[str]) -> None:
    _refused(["run", SMOKE, "--device", "cuda"], capsys, "device 'cuda' is not available", "use cpu")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", str(SMOKE), "--wrkers", "2"], "--wrkers"),
        (["run", str(SMOKE), "--workers", "0"], "--workers"),
        (["run", str(SMOKE), "--executor", "process"], "did you mean 'processes'"),
        (["run"], "SUITE"),
        (["lst"], "lst"),
        (["list", "attack"], "did you mean 'attacks'"),
        (["leaderboard", "x", "--format", "cvs"], "did you mean 'csv'"),
        (["leaderboard", "x", "--board", "defence"], "did you mean 'defenses'"),
    ],
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], arguments: list[object], says: str) -> None:
    _refused(arguments, capsys, says)


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--debug", "leaderboard", "absent.sqlite"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_list_keeps_broken_plugins_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["list", "attacks", "--json"]) == 0
    facts = {each["name"]: each for each in json.loads(capsys.readouterr().out)}
    assert facts["dlg"]["family"] == "optimisation" and facts["dlg"]["needs"] == {"labels": "optimised"}
    assert facts["dlg"]["defaults"]["iterations"] == 1200 and facts["dlg"]["reference"] == "arXiv:1906.08935"
    assert main(["list", "attacks"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in facts)
    broken = tmp_path / "broken.py"
    broken.write_text("raise ValueError('boom')")
    monkeypatch.setattr(registry, "_files", {("attacks", "broken"): broken})
    assert main(["list", "attacks", "--json"]) == 0
    facts = {each["name"]: each for each in json.loads(capsys.readouterr().out)}
    assert "boom" in facts["broken"]["error"] and not facts["dlg"]["error"]


def test_list_remembers_built_ins_as_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRADLEAK_CACHE", str(tmp_path))
    live = catalogue.describe("defenses")
    assert [each["name"] for each in live] == registry.names("defenses")
    monkeypatch.setattr(registry, "describe", lambda group, name: pytest.fail(f"{name} was imported again"))
    assert catalogue.describe("defenses") == live
    (kept,) = (tmp_path / "catalogue").glob("defenses-*.json")
    kept.rename(kept.with_name("defenses-0000.json"))
    with pytest.raises(pytest.fail.Exception, match="imported again"):
        catalogue.describe("defenses")


def test_list_of_all_groups_and_of_an_ensemble(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {group: registry.names(group) for group in registry.GROUPS}
    assert main(["list"]) == 0
    assert "inverting-gradients" in capsys.readouterr().out
    assert main(["list", "attacks", "--ensemble", "auto-v2", "--json"]) == 0
    names = [each["name"].rpartition(" = ")[2] for each in json.loads(capsys.readouterr().out)]
    assert names == [name for name, _, _ in registry.members("auto-v2")]


def test_a_suite_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    suites = {"typo": "attacks: [gifdd]\n", "syntax": "attacks: [dlg\n", "key": "atacks: [dlg]\n"}
    suites["option"] = "attacks: [{name: dlg, options: {itertions: 3}}]\n"
    suites["inherited"] = "attacks: [{inverting-gradients: {iterations: 3, lrr: 1}}]\n"
    program = (
        "import sys\nfrom gradleak.cli.main import main\n"
        "codes = [main(['run', path]) for path in sys.argv[1:]]\n"
        "assert 'torch' not in sys.modules and codes == [2] * len(codes), codes\n"
    )
    paths = [tmp_path / f"{name}.yaml" for name in suites]
    for path, text in zip(paths, suites.values(), strict=True):
        path.write_text("name: x\ncontrols: listed\nmodels: [mlp]\ndatasets: [digits]\ndefenses: [none]\n" + text)
    done = subprocess.run(
        [sys.executable, "-c", program, "nosuch.yaml", *map(str, paths)], capture_output=True, text=True, check=True
    )
    said = done.stderr.splitlines()
    assert "attacks[0]: unknown option of attack 'dlg' 'itertions'; did you mean 'iterations'" in said[4]
    assert "'lrr'; did you mean 'lr'" in said[5]
    assert len(said) == 6 and "did you mean 'gifd'" in said[1] and "did you mean 'attacks'" in said[3]


def test_version_and_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"gradleak {__version__}\n"
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert f"torch {torch.__version__.partition('+')[0]}" in said and "lpips alex" in said


def test_doctor_says_what_to_do_about_each_absence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "EXTRAS", {"tune": ("no_such_package", "`gradleak tune`")})
    monkeypatch.setattr(perceptual, "state", lambda trunk: f"{trunk}.pth is missing; it can be had from there")
    assert main(["doctor", "--json"]) == 0, "all of these are optional"
    found = {fact["name"]: fact for fact in json.loads(capsys.readouterr().out)["facts"]}
    assert found["[tune]"]["do"] == "for `gradleak tune`: pip install 'gradleak[tune]'"
    assert found["lpips vgg"]["do"].startswith("it can be had from there") and not found["cpu"]["do"]
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no_such_package"))
    assert main(["doctor"]) == 1
    assert "-> pip install no_such_package" in capsys.readouterr().out


def test_bare_gradleak_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    said = capsys.readouterr().out
    assert "Usage: gradleak" in said and "leaderboard" in said


def test_shells_complete_commands_and_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_GRADLEAK_COMPLETE", "complete_bash")
    for words, found in (("gradleak leader", "leaderboard"), ("gradleak run --sum", "--summary")):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
        with pytest.raises(SystemExit):
            main([])
        assert found in capsys.readouterr().out.split()


def test_a_run_leaves_a_summary_for_scripts(tmp_path: Path) -> None:
    suite, out = tmp_path / "s.yaml", tmp_path / "summary.json"
    suite.write_text(
        "name: s\nvictims: 2\ndatasets: [digits]\nmodels: [linear]\nattacks: [mean-image]\ndefenses: [none]\n"
    )
    command = ["run", str(suite), "--store", str(tmp_path / "s.sqlite"), "--executor", "local", "--summary"]
    assert main([*command, str(out)]) == 0
    said = json.loads(out.read_text())
    assert (said["ran"], said["stored"], said["failed"], said["pending"]) == (said["cells"], said["cells"], {}, {})
    assert main([*command, str(tmp_path / "absent" / "x.json")]) == 2
