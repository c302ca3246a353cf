"""What a cell is: its key follows everything that decides a result, and nothing stored names a machine."""

from __future__ import annotations

import json
import re
import sys
import tempfile
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from gradleak import registry, suite
from gradleak.attack import Reconstruction
from gradleak.board.bundle import publish
from gradleak.board.results import read
from gradleak.board.store import Store
from gradleak.dataset import Data
from gradleak.errors import GradleakError
from gradleak.evaluation import check, evaluate, runner, score
from gradleak.evaluation.executors import Local
from gradleak.evaluation.verify import verify
from gradleak.evaluation.workshop import Resources, Workshop
from gradleak.federation.client import client_network, send
from gradleak.model import initialise
from gradleak.paths import conceal
from gradleak.process import default_cache
from gradleak.search.generators import Decoder
from gradleak.suite import AttackCell
from gradleak.threat import Setting

ATTACK = """
    from dataclasses import dataclass
    from pathlib import Path

    import torch

    from gradleak.attack import Attack, Reconstruction


    @dataclass(frozen=True, kw_only=True)
    class Grey(Attack):
        '''Answers with one grey.'''

        family = "analytic"
        reference = "test"

        def reconstruct(self, observation, generator):
            shape = (observation.victims, observation.batch_size, *observation.shape)
            return Reconstruction(images=torch.full(shape, 0.5))
"""
DEFENSE = """
    from dataclasses import dataclass

    from gradleak.defense import Defense


    @dataclass(frozen=True, kw_only=True)
    class Halved(Defense):
        '''Sends half of the update.'''

        family = "compression"
        reference = "test"

        def protect(self, update, public, generator):
            return {name: tensor / 2 for name, tensor in update.items()}
"""


@pytest.fixture(autouse=True)
def _own_cache_and_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADLEAK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(registry, "_files", {})


def write_suite(folder: Path, **changes: Any) -> Path:
    content: dict[str, Any] = {
        "name": "tiny",
        "victims": 2,
        "candidates": 10,
        "knowledge": ["oblivious"],
        "engine": {"backend": "sequential"},
        "controls": "listed",
        "datasets": ["digits"],
        "models": [{"mlp": {"widths": [8]}}],
        "settings": [{"name": "fedsgd", "grants": {"labels": "known"}}],
        "attacks": ["mean-image"],
        "defenses": ["none"],
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "suite.yaml").write_text(yaml.safe_dump(content))
    return folder / "suite.yaml"


def plugin(path: Path, code: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(code))
    return path


def cells_of(path: Path, resources: Resources | None = None) -> list[AttackCell]:
    resources = resources or Resources()
    return suite.attacking(suite.expand(suite.read(path), Workshop(resources).digest, resources.data_root))


# Plugin files


def test_a_changed_plugin_file_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, store = write_suite(tmp_path, attacks=["mean-image", "grey"]), tmp_path / "s.sqlite"
    file = plugin(tmp_path / "grey.py", ATTACK)
    assert runner.run(path, store, Local(), Resources(), [file]).ran == 2
    assert runner.run(path, store, Local(), Resources(), [file]).ran == 0
    # Another process, which finds a file of equal length and, to the second, of equal age.
    monkeypatch.setattr(registry, "_files", {})
    changed = plugin(tmp_path / "new" / "grey.py", ATTACK.replace("0.5", "0.7"))
    assert runner.run(path, store, Local(), Resources(), [changed]).ran == 1, "the built-in attack is not run again"
    with Store(store) as opened:
        assert set(read(opened).rows["attack"]) == {"grey", "mean-image"}, "a board shows the newest code"
        found = read(opened, all_code=True)
        keys = found.cells.loc[found.cells["attack_name"] == "grey", "key"]
        greys = sorted(float(opened.reconstruction(key, 0).mean()) for key in keys)
    assert greys == pytest.approx([0.5, 0.7])
    labels = sorted(set(found.rows["attack"]))
    assert labels[-1] == "mean-image" and all(re.fullmatch(r"grey \(code=[0-9a-f]{8}\)", each) for each in labels[:2])


def test_a_plugin_file_runs_as_it_is_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Edited within a second to the same length: a cache of compiled code would give the old one.
    file = tmp_path / "grey.py"
    found = []
    for code in (ATTACK, ATTACK.replace("0.5", "0.6")):
        monkeypatch.setattr(registry, "_files", {})
        for name in [name for name in sys.modules if name.startswith("_gradleak_plugin_grey")]:
            monkeypatch.delitem(sys.modules, name)
        registry.add_file(plugin(file, code))
        found.append(
            (
                registry.fingerprint("attacks", "grey"),
                registry.load("attacks", "grey").reconstruct.__code__.co_consts,
            )
        )
    assert len({digest for digest, _ in found}) == 2 and [0.5 in seen for _, seen in found] == [True, False]


def test_only_cells_of_a_file_follow_it_and_draws_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_suite(tmp_path, defenses=["none", "halved", {"name": "top-k + halved"}])
    found = []
    for place, code in enumerate((DEFENSE, DEFENSE.replace("tensor / 2", "0.5 * tensor"))):
        monkeypatch.setattr(registry, "_files", {})
        registry.add_file(plugin(tmp_path / str(place) / "halved.py", code))
        found.append({cell.defense.name: cell for cell in cells_of(path)})
    for name in ("none", "halved", "top-k + halved"):
        before, after = (cells[name] for cells in found)
        assert before.defense.code and (before.defense.code == after.defense.code) == (name == "none")
        assert (before.key == after.key) == (name == "none")
    here, elsewhere = found[1]["halved"], found[0]["halved"]
    rows = evaluate.evaluate(here, Workshop()).rows
    assert evaluate.evaluate(elsewhere, Workshop()).error == "defense 'halved': its code is not that of this cell"
    monkeypatch.setattr(type(elsewhere), "check_code", lambda cell, root: None)
    again = evaluate.evaluate(elsewhere, Workshop()).rows
    assert [row.message_norm for row in again] == [row.message_norm for row in rows]


def test_a_bundle_of_another_plugin_file_is_not_called_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = plugin(tmp_path / "grey.py", ATTACK)
    path = write_suite(tmp_path, attacks=["grey"])
    runner.run(path, tmp_path / "s.sqlite", Local(), Resources(), [file])
    publish(tmp_path / "s.sqlite", tmp_path / "b.zip")
    assert verify(tmp_path / "b.zip", Resources(), suites=[path]).ok
    monkeypatch.setattr(registry, "_files", {})
    registry.add_file(plugin(tmp_path / "new" / "grey.py", ATTACK.replace("0.5", "0.6")))
    found = {each.check: each for each in verify(tmp_path / "b.zip", Resources(), suites=[path]).findings}
    assert found["cells"].ok is False and "attack.code" in found["cells"].detail


# Paths


@pytest.mark.parametrize("path", ["/data/images", "~/images", "C:\\images"])
@pytest.mark.parametrize(
    "changes",
    [
        {"datasets": [{"folder": {"path": "PATH"}}]},
        {"datasets": [{"victims": {"path": "PATH"}}]},
        {"datasets": [{"victims": {"path": "v.npz", "train": "PATH"}}]},
        {"prior": {"source": "a:b", "weights": "PATH"}},
    ],
)
def test_a_path_of_one_machine_is_refused(tmp_path: Path, changes: dict[str, Any], path: str) -> None:
    content = json.loads(json.dumps(changes).replace("PATH", path.replace("\\", "\\\\")))
    with pytest.raises(GradleakError, match="absolute paths name a machine; give it relative to --data-root") as caught:
        suite.read(write_suite(tmp_path, **content))
    assert "\n" not in str(caught.value)


def _decoder(shape: tuple[int, int, int]) -> Decoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Decoder(shape, classes=10, latent=4, width=2)


def test_weights_lie_under_the_data_root_and_their_content_makes_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "users_prior", SimpleNamespace(build=_decoder))
    prior = {"source": "users_prior:build", "weights": "priors/w.safetensors"}
    grants = [{"grants": {"generator": True, "labels": "known"}}]
    path = write_suite(tmp_path, prior=prior, settings=grants, attacks=["generator-sample"])
    keys = []
    for root in (tmp_path / "here", tmp_path / "there"):
        (root / "priors").mkdir(parents=True)
        save_file(_decoder((1, 8, 8)).state_dict(), root / "priors" / "w.safetensors")
        resources = Resources(data_root=root)
        (cell,) = check.check(cells_of(path, resources), Workshop(resources))
        keys.append(cell.key)
        assert str(tmp_path) not in json.dumps(cell.stored())
    assert keys[0] == keys[1]
    assert evaluate.evaluate(cell, Workshop(resources)).status == "ok"
    other = {name: tensor + 1 for name, tensor in _decoder((1, 8, 8)).state_dict().items()}
    save_file(other, root / "priors" / "w.safetensors")
    assert cells_of(path, resources)[0].key != keys[0]
    # All that is wrong with a prior is said before anything runs.
    (root / "priors" / "w.safetensors").write_text("no weights")
    with pytest.raises(GradleakError, match=r"weights .* do not fit"):
        runner.plan(path, tmp_path / "s.sqlite", resources)
    (root / "priors" / "w.safetensors").unlink()
    with pytest.raises(GradleakError, match=r"suite .*: prior: weights: no file .*see --data-root"):
        runner.plan(path, tmp_path / "s.sqlite", resources)


@pytest.mark.parametrize(
    ("prior", "says"),
    [
        ({"dataset": "photos"}, r"prior: dataset 'photos' has images \(3, 32, 32\); those of 'digits' are \(1, 8, 8\)"),
        ({"source": "users_prior:build"}, r"makes images \(3, 4, 4\); the victims' are \(1, 8, 8\)"),
        ({"source": "no_such_module:build"}, "cannot be imported"),
    ],
)
def test_a_prior_that_does_not_fit_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prior: dict[str, Any], says: str
) -> None:
    fixed = SimpleNamespace(build=lambda shape: _decoder((3, 4, 4)))
    monkeypatch.setitem(sys.modules, "users_prior", fixed)
    grants = [{"grants": {"generator": True, "labels": "known"}}]
    path = write_suite(tmp_path, prior=prior, settings=grants, attacks=["generator-sample"])
    with pytest.raises(GradleakError, match=says) as caught:
        runner.plan(path, tmp_path / "s.sqlite", Resources())
    assert "\n" not in str(caught.value)


def test_concealed_paths_leave_the_text_around_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "data"
    monkeypatch.chdir(tmp_path)
    text = f"no {root}/a.npz, ({root}) nor {root}set/b; {tmp_path}/c; {Path.home()}/d.py"
    said = conceal(text, {"<data root>": root, "<cache>": None})
    assert said == "no <data root>/a.npz, (<data root>) nor <here>/dataset/b; <here>/c; ~/d.py"
    assert conceal(f"{tempfile.gettempdir()}/x", {}) == "<temporary>/x"
    assert conceal("/ and /usr/lib/x", {"<data root>": Path("/")}) == "/ and /usr/lib/x"


def test_stored_errors_name_no_folder_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    code = ATTACK.replace("shape = (", f"open({str(root / 'secret.txt')!r})\n            shape = (", 1)
    file = plugin(tmp_path / "grey.py", code)
    path = write_suite(tmp_path, attacks=["grey"])
    runner.run(path, tmp_path / "s.sqlite", Local(), Resources(data_root=root), [file])
    with Store(tmp_path / "s.sqlite") as store:
        (error,) = store.cells()["error"]
    assert error.startswith(
        "FileNotFoundError: [Errno 2] No such file or directory: '<data root>/secret.txt' (grey.py:"
    )
    (cell,) = cells_of(path)
    monkeypatch.setattr(evaluate, "_attack", lambda *_: (_ for _ in ()).throw(GradleakError(f"{default_cache()}/x")))
    assert evaluate.evaluate(cell, Workshop()).error == "<cache>/x"


# Diagnostics


def test_a_diagnostic_that_fails_costs_no_result(tmp_path: Path) -> None:
    broken = (
        ATTACK
        + f"""
        def loss(self, observation, images, targets, buffers):
            raise ValueError("no loss in {tmp_path}")
    """
    )
    file = plugin(tmp_path / "grey.py", broken)
    path = write_suite(tmp_path, attacks=["grey"])
    assert runner.run(path, tmp_path / "s.sqlite", Local(), Resources(data_root=tmp_path), [file]).failed == {}
    with Store(tmp_path / "s.sqlite") as store:
        rows = store.rows()
    assert rows["loss_at_truth"].isna().all() and rows["psnr"].notna().all() and set(rows["status"]) == {"ok"}
    notes = {json.loads(extras)["note"] for extras in rows["extras"]}
    (note,) = notes
    assert re.fullmatch(r"no loss at the truth: ValueError: no loss in <data root> \(grey\.py:\d+\)", note)


def test_the_loss_at_the_truth_is_the_attackers_own(tmp_path: Path) -> None:
    guessing = {"name": "dropout-inversion", "options": {"iterations": 1, "masks": "joint"}}
    told = {"name": "dropout-inversion", "label": "told", "options": {"iterations": 1, "masks": "informed"}}
    blind = {"name": "idlg", "options": {"iterations": 1}}
    path = write_suite(
        tmp_path,
        attacks=[blind, guessing, told],
        defenses=["dropout"],
        models=[{"name": "mlp", "options": {"widths": [64]}}],
        knowledge=["oblivious", "parameters", "public", "oracle"],
    )
    assert runner.run(path, tmp_path / "s.sqlite", Local(), Resources()).failed == {}
    with Store(tmp_path / "s.sqlite") as store:
        rows = store.rows()
    rows["attack"] = rows["attack"].str.partition("(")[0]
    by_attack = rows.groupby("attack")["loss_at_truth"]
    least, most = by_attack.min().to_dict(), by_attack.max().to_dict()
    # Who runs the model without dropout finds no image that explains the message, the true one neither.
    assert least["idlg"] > 1e-3
    assert most["dropout-inversion"] < 1e-9 and most["told"] < 1e-9
    assert (rows["loss_at_mean"] > rows["loss_at_truth"]).all()


def test_contrast_is_the_cosine_distance_to_the_mean_image(tmp_path: Path) -> None:
    path = write_suite(tmp_path, attacks=["mean-image"], models=[{"name": "linear"}])
    assert runner.run(path, tmp_path / "s.sqlite", Local(), Resources()).failed == {}
    with Store(tmp_path / "s.sqlite") as store:
        rows = store.rows()
        (config,) = store.cells()["config"]
    data = Data(registry.build("datasets", "digits"), "digits")
    model, _ = Workshop(Resources()).network(AttackCell.of(config))
    for row, image, label in zip(rows.to_dict("records"), *data.victims(len(rows), 1), strict=True):
        gradients = []
        for batch in (image, data.split.train.images.mean(0, keepdim=True)):
            model.zero_grad()
            torch.nn.functional.cross_entropy(model(batch), label).backward()
            slopes = [parameter.grad for parameter in model.parameters()]
            gradients.append(torch.cat([slope.flatten() for slope in slopes if slope is not None]).double())
        expected = 1 - torch.cosine_similarity(gradients[0], gradients[1], dim=0)
        assert row["contrast"] == pytest.approx(float(expected), abs=1e-6)


def test_masks_are_counted_where_they_matter() -> None:
    setting = Setting(batch_size=2, precision="float64")
    defense = registry.build("defenses", "dropout", {"rate": 0.5})
    module = initialise(registry.build("models", "mlp", {"widths": [24]}), (1, 8, 8), 10, 0)
    network = client_network(module, defense, setting)
    data = Data(registry.build("datasets", "digits"), "digits")
    images, labels = data.victims(2, 2, tuning=True)
    sent = send(network, images.double(), labels, 10, defense, setting, 0, [0, 1])
    (name,) = sent.buffers
    # By hand: the one hidden layer is a ReLU, and a unit that it silences is dead whatever its mask.
    weight, bias = (network.parameters[key] for key in list(network.parameters)[:2])
    normalised = next(network.module.children())(images.double().flatten(0, 1)).flatten(1)
    live = (normalised @ weight.T + bias > 0).view(2, 2, 24)
    assert 0 < live.sum() < live.numel()
    guess = torch.where(live, sent.buffers[name], 1 - sent.buffers[name])
    guess[1, 0, live[1, 0].nonzero()[0]] += 1 - 2 * guess[1, 0, live[1, 0].nonzero()[0]]
    answer = Reconstruction(images=images.double(), guessed={name: guess.flip(1)})
    found = score._guessed(answer, sent, network, torch.tensor([[1, 0], [1, 0]]))["mask_accuracy"]
    assert found.tolist() == pytest.approx([1.0, 1 - 1 / float(live[1].sum())])


def test_rivals_of_tuning_victims_are_no_tuning_victims() -> None:
    data = Data(registry.build("datasets", "digits"), "digits")
    half = len(data.split.test) // 2
    for tuning in (False, True):
        victims = {image.numpy().tobytes() for image in data.victims(half, 1, tuning)[0][:, 0]}
        rivals = {image.numpy().tobytes() for image in data.candidates(half + 50, tuning)}
        assert len(rivals) == half + 49 and not victims & rivals
