"""Suites: what is refused and how, what a grid spans, and what a key depends on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradleak import suite
from gradleak.errors import GradleakError

SUITE: dict[str, Any] = {
    "name": "tiny",
    "victims": 2,
    "controls": "listed",
    "datasets": ["digits"],
    "models": [{"mlp": {"widths": [16]}}, "lenet"],
    "settings": [{"name": "fedsgd", "grants": {"labels": "known"}}],
    "attacks": [{"name": "linear-leakage", "only": {"models": ["mlp(widths=[16])"]}}, "dlg", "mean-image"],
    "defenses": ["none", {"top-k": {"ratio": 0.1}}],
}


def _digest(name: str, options: Mapping[str, Any]) -> tuple[str, str]:
    return "1", f"digest of {name}"


def _write(folder: Path, content: Any) -> Path:
    path = folder / "suite.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def _expand(folder: Path, content: Any) -> list[suite.Cell]:
    return suite.expand(suite.read(_write(folder, content)), _digest)


def _with(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(SUITE), **changes}


def test_a_grid_has_every_pair_once_and_only_levels_that_differ(tmp_path: Path) -> None:
    cells = _expand(tmp_path, SUITE)
    found = sorted((c.model.name, c.attack.name, c.defense.name) for c in suite.attacking(cells))
    ignored = [(model, "mean-image", guard) for model in ("mlp", "lenet") for guard in ("none", "top-k")]
    plain = [(model, "dlg", "none") for model in ("mlp", "lenet")]
    adaptive = [(model, "dlg", "top-k") for model in ("mlp", "lenet") for _ in ("oblivious", "public")]
    analytic = [("mlp", "linear-leakage", guard) for guard in ("none", "top-k")]
    assert found == sorted(ignored + plain + adaptive + analytic)
    assert len({cell.key for cell in cells}) == len(cells)
    assert [cell.key for cell in cells] == [cell.key for cell in _expand(tmp_path, SUITE)]


def test_long_and_short_forms_name_the_same_cells(tmp_path: Path) -> None:
    long = _with(
        models=[{"name": "mlp", "options": {"widths": [16]}}, {"name": "lenet"}],
        defenses=[{"name": "none"}, {"name": "top-k", "options": {"ratio": 0.1}}],
    )
    assert {c.key for c in _expand(tmp_path, long)} == {c.key for c in _expand(tmp_path, SUITE)}


def test_names_do_not_change_a_key_and_results_do(tmp_path: Path) -> None:
    keys = {cell.key for cell in _expand(tmp_path, SUITE)}
    named = _with(
        name="another",
        description="x",
        settings=[{"name": "renamed", "grants": {"labels": "known"}}],
        defenses=["none", {"name": "top-k", "options": {"ratio": 0.1}, "label": "sparse"}],
    )
    assert {cell.key for cell in _expand(tmp_path, named)} == keys
    for change in (
        {"victims": 3},
        {"seeds": [1]},
        {"candidates": 50},
        {"tuning": True},
        {"engine": {"width": 16}},
        {"defenses": ["none", {"top-k": {"ratio": 0.2}}]},
        {"settings": [{"name": "fedsgd", "batch_size": 2, "grants": {"labels": "known"}}]},
    ):
        assert {cell.key for cell in _expand(tmp_path, _with(**change))} != keys, change


def test_a_default_that_is_spelled_out_is_the_same_cell(tmp_path: Path) -> None:
    implicit = _with(defenses=["top-k"], attacks=["dlg"])
    explicit = _with(defenses=[{"top-k": {"ratio": 0.1}}], attacks=[{"dlg": {"iterations": 1200}}])
    assert {c.key for c in _expand(tmp_path, implicit)} == {c.key for c in _expand(tmp_path, explicit)}


_OPTIONS = st.dictionaries(st.text(min_size=1, max_size=5), st.integers() | st.text(max_size=5), max_size=4)


def _config(options: Mapping[str, Any], label: str = "") -> dict[str, Any]:
    part = {"name": "x", "label": label, "options": dict(options)}
    return {
        **{axis: copy.deepcopy(part) for axis in ("attack", "defense", "model", "dataset")},
        "setting": {"name": label, "batch_size": 1},
        "suite": {"name": label},
        "seed": 0,
    }


def _reversed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _reversed(value[key]) for key in reversed(list(value))}
    return value


@given(_OPTIONS, st.text(max_size=5))
def test_key_ignores_order_and_labels(options: dict[str, Any], label: str) -> None:
    assert suite.key_of(_reversed(_config(options, label))) == suite.key_of(_config(options))


@given(_OPTIONS, _OPTIONS)
@settings(suppress_health_check=[HealthCheck.filter_too_much])
def test_key_differs_when_an_option_differs(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert (suite.key_of(_config(first)) == suite.key_of(_config(second))) == (first == second)


REFUSED: list[tuple[str, Callable[[dict[str, Any]], object], list[str]]] = [
    ("unknown key", lambda s: s.update(victms=3), ["unknown key 'victms'", "did you mean 'victims'"]),
    ("key of the engine", lambda s: s.update(engine={"widht": 3}), ["engine: unknown key 'widht'", "'width'"]),
    ("key of an entry", lambda s: s.update(attacks=[{"name": "dlg", "onyl": {}}]), ["attacks[0]", "'onyl'", "'only'"]),
    ("key of a setting", lambda s: s.update(settings=[{"batchsize": 2}]), ["settings[0]", "'batchsize'", "batch_size"]),
    (
        "key of the grants",
        lambda s: s.update(settings=[{"grants": {"lables": "known"}}]),
        ["settings[0]", "'lables'", "'labels'"],
    ),
    ("missing key", lambda s: s.pop("attacks"), ["attacks", "field required"]),
    ("empty axis", lambda s: s.update(attacks=[]), ["attacks", "at least 1"]),
    ("attack", lambda s: s.update(attacks=["idgl"]), ["attacks[0]", "unknown attack 'idgl'", "did you mean 'idlg'"]),
    ("defense", lambda s: s.update(defenses=["topk"]), ["defenses[0]", "unknown defense 'topk'", "'top-k'"]),
    ("model", lambda s: s.update(models=["lenett"]), ["models[0]", "unknown model 'lenett'", "'lenet'"]),
    ("dataset", lambda s: s.update(datasets=["digit"]), ["datasets[0]", "unknown dataset 'digit'", "'digits'"]),
    (
        "option",
        lambda s: s.update(defenses=[{"top-k": {"rati": 0.1}}]),
        ["defenses[0]", "unknown option of defense 'top-k' 'rati'", "'ratio'"],
    ),
    (
        "value of an option",
        lambda s: s.update(defenses=[{"top-k": {"ratio": 2}}]),
        ["defenses[0]", "ratio = 2", "less than or equal to 1"],
    ),
    ("value of a key", lambda s: s.update(victims=0), ["victims", "greater than or equal to 1", "found 0"]),
    ("type of a key", lambda s: s.update(victims="many"), ["victims", "integer", "found many"]),
    ("value of a setting", lambda s: s.update(settings=[{"mode": "trian"}]), ["settings[0]", "mode", "'eval' or"]),
    ("level", lambda s: s.update(knowledge=["publik"]), ["knowledge[0]", "'publik'", "'public'"]),
    (
        "axis of only",
        lambda s: s.update(attacks=[{"name": "dlg", "only": {"model": []}}]),
        ["attacks[0].only", "models"],
    ),
    (
        "label of only",
        lambda s: s.update(attacks=[{"name": "dlg", "only": {"models": ["lenett"]}}]),
        ["attacks[0].only.models", "'lenet'"],
    ),
    ("twice", lambda s: s.update(attacks=["dlg", "dlg"]), ["attacks[1]", "listed twice"]),
    (
        "local steps without a rate",
        lambda s: s.update(settings=[{"local_steps": 2}]),
        ["settings[0]", "local_steps", "need local_lr"],
    ),
]


REFUSED += [
    ("grant of the defense", lambda s: s.update(settings=[{"grants": {"defense": "oracle"}}]), ["knowledge", "oracle"]),
    ("seed below zero", lambda s: s.update(seeds=[-1]), ["seeds[0]", "greater than or equal to 0"]),
    ("seed beyond 63 bits", lambda s: s.update(seeds=[2**63]), ["seeds[0]", "64 bits"]),
    ("true for a number", lambda s: s.update(victims=True), ["victims", "integer, not true or false"]),
    ("text for a number", lambda s: s.update(attacks=[{"dlg": {"lr": "0.1"}}]), ["lr = '0.1'", "not text"]),
    ("infinite rate", lambda s: s.update(attacks=[{"dlg": {"lr": float("inf")}}]), ["lr = inf", "finite"]),
    ("rate of a subclass", lambda s: s.update(attacks=[{"inverting-gradients": {"lr": -0.1}}]), ["greater than 0"]),
    ("huge iterations", lambda s: s.update(attacks=[{"dlg": {"iterations": 10**20}}]), ["iterations", "64 bits"]),
    ("rate of local steps", lambda s: s.update(settings=[{"local_lr": "1"}]), ["settings[0]", "local_lr", "not text"]),
    ("path out of the root", lambda s: s.update(datasets=[{"folder": {"path": "../x"}}]), ["datasets[0]", "below"]),
    (
        "local batches that do not fit",
        lambda s: s.update(settings=[{"batch_size": 4, "local_batch_size": 3, "local_lr": 0.1}]),
        ["settings[0]", "does not divide"],
    ),
    ("backend", lambda s: s.update(engine={"backend": "vmapp"}), ["engine", "'vmapp'", "'vmap'"]),
    ("empty name", lambda s: s.update(name=""), ["name", "at least 1"]),
    ("path for a name", lambda s: s.update(name="../x"), ["name", "without /"]),
    ("long name", lambda s: s.update(name="x" * 500), ["name", "at most 120"]),
    ("two lines in a label", lambda s: s.update(defenses=[{"name": "none", "label": "a\nb"}]), ["control characters"]),
    ("escape in a setting", lambda s: s.update(settings=[{"name": "\x1b[2J"}]), ["settings[0]", "name"]),
    ("options that are none", lambda s: s.update(attacks=[{"dlg": False}]), ["attacks[0]", "dictionary"]),
]


@pytest.mark.parametrize(("change", "says"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_a_wrong_suite_is_refused_in_one_line(tmp_path: Path, change: Any, says: list[str]) -> None:
    content = copy.deepcopy(SUITE)
    change(content)
    path = _write(tmp_path, content)
    with pytest.raises(GradleakError) as caught:
        suite.read(path)
    line = str(caught.value)
    assert "\n" not in line and line.startswith(f"suite {path}: ")
    for part in says:
        assert part in line, line


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1,", "", "\x00"])
def test_a_file_that_is_no_suite_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(GradleakError, match="suite"):
        suite.read(_write(tmp_path, text))


PLAIN = yaml.safe_dump(SUITE)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (PLAIN + "victims: 3\n", "key 'victims' is given twice, first on line"),
        ("name: &x\n  y: *x\n", "line 1: a value holds itself"),
        ("a: &a\n  <<: *a\n", "line 1: a value holds itself"),
        ("a: &a [x, *a]\n", "line 1: a value holds itself"),
        (
            "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
            + "".join(
                f"{new}: &{new} [{', '.join(['*' + old] * 10)}]\n" for old, new in zip("abcdef", "bcdefg", strict=True)
            ),
            "more than 100000 values",
        ),
        ("victims: 010\n", "line 1: 010 is a different number"),
        ("victims: 1:30\n", "1:30 is a different number"),
        ("victims: 1_000\n", "1_000 is a different number"),
        ("victims: 0x10\n", "0x10 is a different number"),
        ("lr: 1_0.5\n", "1_0.5 is a different number"),
        ("? [a]\n: b\n", "a key must be a word, found a list"),
        ("name: !!python/object/apply:os.system ['true']\n", "not YAML"),
        ("name: " + "[" * 3000 + "]" * 3000 + "\n", "nested too deep"),
        ("name: " + "9" * 5000 + "\n", "a number of 5000 digits"),
        ("name: 2024-13-45\n", "a value cannot be read"),
    ],
)
def test_what_readers_of_yaml_trip_over_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(GradleakError, match=r"^suite ") as caught:
        suite.read(_write(tmp_path, text))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_spellings_that_mean_the_same_are_the_same_suite(tmp_path: Path) -> None:
    path = _write(tmp_path, PLAIN)
    plain = suite.read(path)
    for content in (b"\xef\xbb\xbf" + PLAIN.encode(), PLAIN.replace("\n", "\r\n").encode()):
        path.write_bytes(content)
        assert suite.read(path) == plain
    path.write_text(PLAIN + "attacks: &a [{dlg: {lr: 1e-3}}]\n".replace("attacks", "reported"))
    assert suite.read(path).reported == [{"dlg": {"lr": 0.001}}]
    merged = PLAIN.replace("- lenet", "- {<<: &m {name: lenet}, label: net}")
    path.write_text(merged)
    assert [entry.title for entry in suite.read(path).models][-1] == "net"


def test_keys_leave_out_the_suite(tmp_path: Path) -> None:
    first, second = (_expand(tmp_path, _with(name=name, version=number)) for name, number in (("a", 1), ("b", 2)))
    assert [cell.key for cell in first] == [cell.key for cell in second]
    assert first[0].suite != second[0].suite


def test_an_attack_that_no_level_is_enough_for_is_refused(tmp_path: Path) -> None:
    content = _with(attacks=["dropout-inversion"], defenses=["dropout"], knowledge=["oblivious"])
    with pytest.raises(GradleakError, match=r"attacks\[0\]: .* needs defense knowledge 'parameters'"):
        suite.read(_write(tmp_path, content))


def test_controls_run_in_every_context_once_where_they_read_no_message(tmp_path: Path) -> None:
    attacks = ["dlg", {"name": "random-image", "only": {"models": ["lenet"]}}]
    content = _with(attacks=attacks, defenses=[*SUITE["defenses"], "secure-aggregation"])
    del content["controls"]
    found = [
        (cell.model.name, cell.attack.name, cell.defense.name)
        for cell in suite.attacking(_expand(tmp_path, content))
        if cell.attack.name != "dlg"
    ]
    # A sum of several clients has more images to guess.
    guesses, guards = ("class-mean", "mean-image", "random-image"), ("none", "secure-aggregation")
    assert sorted(found) == sorted(
        (model, guess, guard) for model in ("mlp", "lenet") for guess in guesses for guard in guards
    )
    unknown = _expand(tmp_path, {**content, "settings": [{"name": "fedsgd"}]})
    read = {cell.defense.name for cell in suite.attacking(unknown) if cell.attack.name == "class-mean"}
    assert read == {"none", "top-k", "secure-aggregation"}, "labels are read off each message"
    granted = _expand(tmp_path, {**content, "settings": [{"name": "fedsgd", "grants": {"generator": True}}]})
    assert "generator-sample" in {cell.attack.name for cell in suite.attacking(granted)}
    listed = {cell.attack.name for cell in suite.attacking(_expand(tmp_path, {**content, "controls": "listed"}))}
    assert listed == {"dlg", "random-image"}


def test_an_ensemble_names_variants_of_one_attack(tmp_path: Path) -> None:
    listed = {"name": "gauss-newton", "options": {"restarts": 2}, "label": "gauss-newton + prior", "optional": True}
    cells = _expand(tmp_path, _with(attacks=[listed, "auto-v2"], knowledge=["oblivious"], defenses=["none"]))
    found = {cell.attack.label: cell.attack.options for cell in suite.attacking(cells)}
    assert found["gauss-newton"]["initialisation"] == "normal" and found["gauss-newton"]["restarts"] == 12
    assert found["gauss-newton + prior"]["initialisation"] == "public"
    assert found["gauss-newton + prior"]["restarts"] == 2, "what the suite lists stays as it is listed"
    assert {"class-mean", "mean-image", "random-image"} <= found.keys()


def test_calibrated_statistics_are_a_choice_of_the_setting(tmp_path: Path) -> None:
    keys = {cell.key for cell in _expand(tmp_path, SUITE)}
    changed = [{"name": "fedsgd", "statistics": "calibrated", "grants": {"labels": "known"}}]
    assert not keys & {cell.key for cell in _expand(tmp_path, _with(settings=changed))}
    with pytest.raises(GradleakError, match=r"settings\[0\]: statistics: calibrated is of an untrained model"):
        _expand(tmp_path, _with(settings=[{**changed[0], "epochs": 2}]))
