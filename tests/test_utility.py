"""Training under a defense: the attacked client's own path, equal conditions for all, and a true guarantee."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
import yaml
from opacus.accountants import RDPAccountant
from torch import nn

from gradleak import registry, suite
from gradleak.board.leaderboard import defense_board
from gradleak.board.results import read
from gradleak.board.statistics import over_seeds
from gradleak.board.store import Store
from gradleak.dataset import Data
from gradleak.defense import Defense
from gradleak.errors import GradleakError
from gradleak.evaluation import runner
from gradleak.evaluation.executors import Local
from gradleak.evaluation.pace import cost
from gradleak.evaluation.workshop import Resources
from gradleak.federation import client, utility
from gradleak.model import initialise
from gradleak.suite import TrainingCell, Utility, build_defense, build_setting
from gradleak.update import squared_norm

DEFENSES = [
    "none",
    "top-k",
    "qsgd",
    "dropout",
    "dp-sgd",
    "mixup",
    "dgc",
    "sketch",
    "sketch + gaussian-noise",  # the last, as clipped sketches take no local steps
]
FEDAVG = {"local_lr": 0.1, "local_steps": 3, "local_batch_size": 2}
SUITE: dict[str, Any] = {
    "name": "tiny",
    "victims": 2,
    "seeds": [0, 1],
    "candidates": 10,
    "engine": {"backend": "sequential"},
    "utility": {"clients": 20, "rounds": 6, "lr": [0.3, 1.0]},
    "controls": "listed",
    "datasets": ["digits"],
    "models": [{"mlp": {"widths": [16]}}],
    "attacks": ["linear-leakage", "mean-image"],
    "defenses": ["none", {"dp-sgd": {"sigma": 2.0}}, "diff2"],
}


@functools.cache
def _data() -> Data:
    return Data(registry.build("datasets", "digits"), "digits")


def _model(widths: tuple[int, ...] = (16,), name: str = "mlp") -> nn.Module:
    options = {"widths": list(widths)} if name == "mlp" else {}
    return initialise(registry.build("models", name, options), _data().shape, _data().classes, 0)


def _train(defense: Defense | None = None, recipe: Mapping[str, Any] | None = None, **rest: Any) -> utility.Trained:
    defense = defense or build_defense("none", {})
    module = defense.prepare_model(rest.pop("module", None) or _model())
    return utility.train(
        module, _data(), defense, Utility(**{"batch_size": 16, **(recipe or {})}), rest.pop("seed", 0), **rest
    )


def _digest(name: str, options: Mapping[str, Any]) -> tuple[str, str]:
    return "1", f"digest of {name}"


def _read(folder: Path, **changes: Any) -> suite.Suite:
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump({**SUITE, **changes}))
    return suite.read(path)


@pytest.mark.parametrize(
    ("name", "local"), [(name, {}) for name in DEFENSES] + [(name, FEDAVG) for name in DEFENSES[:-1]]
)
def test_clients_in_one_stack_send_what_each_sends_alone(name: str, local: dict[str, Any]) -> None:
    defense = build_defense(name, {})
    setting = build_setting({"batch_size": 4, "precision": "float64", **local})
    network = client.client_network(_model(name="lenet"), defense, setting)
    images = _data().split.train.images[:12].double().reshape(3, 4, *_data().shape)
    labels = _data().split.train.labels[:12].reshape(3, 4)
    alone, stacked = (
        client.send(network, images, labels, 10, defense, setting, 1, [2, 3, 4], together=together)
        for together in (False, True)
    )
    for part in ("update", "message"):
        first, second = getattr(alone, part), getattr(stacked, part)
        assert first.keys() == second.keys()
        for key in first:
            torch.testing.assert_close(second[key], first[key], rtol=1e-9, atol=1e-12)
    assert alone.bytes == stacked.bytes


def test_without_a_defense_it_is_plain_descent_on_all_clients_images() -> None:
    recipe = Utility(clients=5, rounds=8, batch_size=8, lr=[0.5])
    found = utility.train(_model(), _data(), build_defense("none", {}), recipe, 3)
    module = _model().requires_grad_()
    optimiser = torch.optim.SGD(module.parameters(), lr=0.5)
    train, test = _data().split.train, _data().split.test
    for batch in utility._divide(_data(), recipe, 3)[1]:
        optimiser.zero_grad()
        F.cross_entropy(module(train.images[batch.flatten()]), train.labels[batch.flatten()]).backward()
        optimiser.step()
    for name, weight in module.named_parameters():
        torch.testing.assert_close(found.parameters[name], weight.detach(), rtol=1e-4, atol=1e-6)
    correct = (module(test.images).argmax(1) == test.labels).double().mean()
    assert found.accuracy == pytest.approx(float(correct), abs=2 / len(test))
    assert found.bytes == found.dense_bytes == 4 * sum(weight.numel() for weight in module.parameters())


def test_one_local_step_is_a_gradient_step() -> None:
    gradient = _train(recipe={"clients": 3, "rounds": 4, "lr": 0.2})
    difference = _train(recipe={"clients": 3, "rounds": 4, "lr": 1.0, "local_lr": 0.2})
    for name, weight in gradient.parameters.items():
        torch.testing.assert_close(difference.parameters[name], weight, rtol=1e-4, atol=1e-6)


def test_parts_are_disjoint_and_an_example_takes_part_once_an_epoch() -> None:
    recipe = Utility(clients=7, rounds=40, batch_size=10)
    held_out, batches = utility._divide(_data(), recipe, 0)
    assert batches.shape == (40, 7, 10)
    owners = [set(batches[:, number].flatten().tolist()) for number in range(7)]
    assert sum(map(len, owners)) == len(set().union(*owners))
    taken = _data().split.train.images[sorted(set().union(*owners))].flatten(1)
    assert torch.cdist(held_out.images.flatten(1), taken).min() > 0
    most = int(batches.flatten().bincount().max())
    trained = _train(recipe=recipe.model_dump() | {"lr": 0.1})
    assert most == trained.participations == -(-40 // utility._batches_an_epoch(_data(), recipe))
    assert not torch.equal(batches, utility._divide(_data(), recipe, 1)[1])


@pytest.mark.parametrize("name", ["dp-sgd", "gaussian-noise", "sketch + gaussian-noise"])
def test_the_guarantee_composes_every_message_of_an_example(name: str) -> None:
    options = {"sigma": 1.5}
    defense = build_defense(name, {name.split(" + ")[-1]: options} if "+" in name else options)
    trained = _train(defense, {"clients": 10, "rounds": 20, "batch_size": 16, "lr": 0.3})
    assert trained.participations == 4, "107 images a client are 6 batches, and 20 rounds begin 4 epochs"
    accountant = RDPAccountant()
    accountant.history = [(1.5, 1.0, 4)]
    single = defense.guarantee(build_setting({}))
    assert trained.guarantee is not None and single is not None
    assert trained.guarantee.epsilon == pytest.approx(accountant.get_epsilon(delta=1e-5))
    assert trained.guarantee.epsilon > single.epsilon
    assert _train(recipe={"rounds": 2, "lr": 0.3}).guarantee is None


def test_sketched_training_converges_on_digits() -> None:
    recipe = {"rounds": 60, "lr": [0.3, 1.0]}
    bare = _train(recipe=recipe, module=_model((64,)))
    sketched = _train(build_defense("sketch", {"ratio": 0.1}), recipe, module=_model((64,)))
    assert bare.accuracy > 0.9
    assert sketched.accuracy > bare.accuracy - 0.05
    assert sketched.bytes == pytest.approx(0.1 * bare.bytes, rel=0.01)


def test_the_rate_is_chosen_on_images_held_out() -> None:
    trained = _train(recipe={"rounds": 20, "lr": [1e-6, 0.5, 1e6]})
    assert list(trained.validation) == [1e-6, 0.5, 1e6]
    assert trained.lr == 0.5 == max(trained.validation, key=lambda lr: trained.validation[lr])
    assert trained.accuracy > 0.5
    again = _train(recipe={"rounds": 20, "lr": 0.5})
    assert again.accuracy == trained.accuracy


def test_dgc_sends_later_what_it_kept_back() -> None:
    defense = build_defense("dgc", {"ratio": 0.05, "momentum": 0.0})
    setting = build_setting({"batch_size": 4, "precision": "float64"})
    network = client.client_network(_model(), defense, setting)
    images = _data().split.train.images[:32].double().reshape(4, 2, 4, *_data().shape)
    labels = _data().split.train.labels[:32].reshape(4, 2, 4)
    memories: list[Any] = [None, None]
    totals: dict[str, torch.Tensor] = {}
    for index in range(4):
        sent = client.send(network, images[index], labels[index], 10, defense, setting, index, [0, 1], memories)
        memories = sent.memories
        for name, update in sent.update.items():
            totals[name] = totals.get(name, 0) + update - sent.message[name]
    for number, (_, waiting) in enumerate(memories):
        assert squared_norm(waiting) > 0
        for name, rest in waiting.items():
            torch.testing.assert_close(rest, totals[name][number])
    assert _train(defense, {"rounds": 40, "lr": [0.3, 1.0]}).accuracy > 0.6


def test_schedules_follow_the_rounds() -> None:
    noise: Any = build_defense("gradient-noise", {})
    assert noise.at_round(9, 1).deviation == pytest.approx(0.1 * 10 ** (-0.55 / 2))
    chain: Any = build_defense("dgc + gradient-noise", {"dgc": {"ratio": 0.01, "warm_up": 3}})
    first, later = chain.at_round(0, 0), chain.at_round(50, 8)
    assert (first.defenses[0].share, later.defenses[0].share) == pytest.approx((0.01**0.25, 0.01))
    assert later.defenses[1].round == 50
    assert build_defense("outpost", {}).at_round(3, 0).round == 3  # type: ignore[attr-defined]


def test_a_fixed_policy_is_part_of_the_model() -> None:
    defense = build_defense("augmentation", {})
    assert _train(defense, {"rounds": 60, "lr": 0.5}).accuracy > 0.6, "untouched test images would give chance"


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(GradleakError, match="10 clients of dataset 'digits' have 107 images each, fewer than a batch"):
        _train(recipe={"batch_size": 108})
    with pytest.raises(GradleakError, match="Diff2 stands for a single round"):
        _train(build_defense("diff2", {}))


def test_progress_runs_to_the_end() -> None:
    seen: list[tuple[float, float]] = []
    _train(recipe={"rounds": 10, "lr": [0.1, 0.3]}, progress=lambda share, loss: seen.append((share, loss)))
    shares = [share for share, _ in seen]
    assert shares == sorted(shares) and shares[-1] == 1
    assert seen[9][1] < seen[0][1], "the loss falls"


def test_a_suite_asks_for_it_once_a_defense_model_dataset_and_seed(tmp_path: Path) -> None:
    cells = suite.expand(_read(tmp_path), _digest)
    asked = [cell for cell in cells if isinstance(cell, TrainingCell)]
    assert [(c.defense.name, c.seed) for c in asked] == [
        ("none", 0),
        ("dp-sgd", 0),
        ("none", 1),
        ("dp-sgd", 1),
    ], "diff2 stands for one round only"
    assert asked[0].title == "utility · none · mlp(widths=[16]) · digits · seed 0"
    assert all(cost(cell) > 0 for cell in asked)
    without = suite.expand(_read(tmp_path, utility=None), _digest)
    assert [cell.key for cell in without] == [cell.key for cell in cells if not isinstance(cell, TrainingCell)]
    other = suite.expand(_read(tmp_path, attacks=["mean-image"], victims=5, utility={**SUITE["utility"]}), _digest)
    assert [cell.key for cell in other if isinstance(cell, TrainingCell)] == [cell.key for cell in asked]
    seeded = suite.expand(_read(tmp_path, utility={"rounds": 6, "seeds": [5, 6, 7]}), _digest)
    assert {cell.seed for cell in seeded if isinstance(cell, TrainingCell)} == {5, 6, 7}
    only = [{"name": "none", "only": {"models": ["other"]}}, "top-k"]
    two = suite.expand(
        _read(tmp_path, defenses=only, models=[SUITE["models"][0], {"name": "mlp", "label": "other"}]), _digest
    )
    assert [c.model.label for c in two if isinstance(c, TrainingCell) and c.defense.name == "none"] == [
        "other",
        "other",
    ]


def test_the_client_that_trains_is_the_one_that_is_attacked(tmp_path: Path) -> None:
    fedavg = {"name": "fedavg", "batch_size": 4, "local_lr": 0.1, "local_steps": 2}
    settings = [{"name": "one"}, {"name": "four", "batch_size": 4}, {"name": "one trained", "epochs": 1}, fedavg]
    only = [{"name": "none", "only": {"settings": ["four"]}}, "top-k"]
    asked = [
        (cell.defense.name, cell.setting.batch_size, cell.setting.local_lr)
        for cell in suite.expand(_read(tmp_path, settings=settings, defenses=only, seeds=[0]), _digest)
        if isinstance(cell, TrainingCell)
    ]
    assert asked == [("top-k", 1, None), ("none", 4, None), ("top-k", 4, None), ("top-k", 4, 0.1)]
    fixed = {**SUITE["utility"], "batch_size": 16}
    same = suite.expand(_read(tmp_path, settings=settings, defenses=only, seeds=[0], utility=fixed), _digest)
    assert [c.setting.batch_size for c in same if isinstance(c, TrainingCell)] == [16, 16]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rounds": 0}, "utility.rounds: input should be greater than or equal to 1, found 0"),
        ({"lr": []}, "utility.lr"),
        ({"lr": [0.1, -1]}, "utility.lr[1]: input should be greater than 0, found -1"),
        ({"epochs": 3}, "utility: unknown key 'epochs'"),
        ({"batch_size": 16, "local_steps": 2}, "utility: local_steps and local_batch_size need local_lr"),
        (
            {"local_steps": 2},
            "utility: local_steps: comes from the setting, as batch_size does; to state it, give batch_size a number",
        ),
        ({"batch_size": "all"}, "utility.batch_size: input should be a number of images (1 or more), or setting"),
    ],
)
def test_mistakes_are_said_in_one_line(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(GradleakError) as error:
        _read(tmp_path, utility=changed)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_it_is_run_once_kept_and_joined_to_the_board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADLEAK_CACHE", str(tmp_path / "cache"))
    _read(tmp_path)
    path, target = tmp_path / "suite.yaml", tmp_path / "store.sqlite"
    summary = runner.run(path, target, Local(), Resources())
    assert (summary.ran, summary.failed) == (16, {})
    assert runner.run(path, target, Local(), Resources()).ran == 0
    with Store(target) as store:
        results = read(store)
    assert (len(results.cells), len(results.utility)) == (12, 4)
    assert "utility" not in set(results.panel.entries["attack"]) | set(results.cells["attack"])
    board = defense_board(results)
    lines = {line["defense"]: line for line in board.table.to_dict("records")}
    bare, private = lines["none"], lines["dp-sgd(sigma=2.0)"]
    accuracies = {
        (line["defense"], line["seed"]): line["provenance"]["test_accuracy"]
        for line in results.utility.to_dict("records")
    }
    own = [accuracies[private["defense"], seed] for seed in (0, 1)]
    lost = [accuracies["none", seed] - accuracy for seed, accuracy in enumerate(own)]
    assert private["test_accuracy"] == pytest.approx(np.mean(own))
    assert private["accuracy_lost"] == pytest.approx(np.mean(lost))
    assert private["accuracy_lost_low"] < np.mean(lost) < private["accuracy_lost_high"]
    assert bare["accuracy_lost"] == 0
    assert np.isnan(lines["diff2"]["test_accuracy"])
    assert private["training_epsilon"] == private["epsilon"], "six rounds of one image take each image once"
    assert np.isnan(bare["training_epsilon"])
    assert any("accuracy: 20 clients, 6 rounds of 1 images" in note for note in board.notes)
    for cell in results.utility["config"]:
        cell["setting"] = {**cell["setting"], "batch_size": 16}
    others = defense_board(results)
    assert others.table["test_accuracy"].isna().all(), "another client's accuracy is no cost of this one's defense"
    assert any("4 trainings are left out" in note for note in others.notes)
    assert len(results.where(defense="none").utility) == 2


def test_intervals_over_seeds_are_students() -> None:
    values = np.array([0.91, 0.95, 0.88, 0.97])
    low, high = scipy.stats.t.interval(0.95, 3, values.mean(), scipy.stats.sem(values))
    found = over_seeds(values)
    assert (found.estimate, found.low, found.high) == pytest.approx((values.mean(), low, high))
    assert np.isnan(over_seeds(values[:1]).low) and over_seeds(values[:1]).estimate == 0.91
    assert np.isnan(over_seeds(np.array([np.nan])).estimate)
