"""Malicious servers: their laws, their read-outs, what clients see of them, and that honest ones change nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gradleak import registry, testing
from gradleak.board import malicious, results
from gradleak.board.leaderboard import attack_board, landing_board
from gradleak.board.schema import REFUSED
from gradleak.board.store import CellResult, Store
from gradleak.channel import Channel
from gradleak.dataset import Data
from gradleak.errors import GradleakError
from gradleak.evaluation.evaluate import evaluate
from gradleak.evaluation.isolation import residue
from gradleak.evaluation.workshop import Workshop
from gradleak.federation.serving import Round, Serving
from gradleak.mechanisms import imprint
from gradleak.server import Server
from gradleak.suite import AttackCell, Cell, Suite, build_setting, expand
from gradleak.threat import Knowledge, Level, Observation, Power, Setting, Tampering

WORKSHOP = Workshop()
MODELS: dict[str, dict[str, Any]] = {"mlp": {"widths": (64,)}, "lenet": {}, "convnet": {"width": 4}}


def data(name: str = "digits") -> Data:
    return Data(registry.build("datasets", name), name)


def batches(source: Data, count: int, images: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Batches [N, B, ...] of test images, drawn over and over."""
    stream = torch.Generator().manual_seed(seed)
    chosen = torch.stack([torch.randperm(len(source.split.test), generator=stream)[:images] for _ in range(count)])
    return source.split.test.images[chosen].double(), source.split.test.labels[chosen]


def rounds(
    server: str,
    images: Tensor,
    labels: Tensor,
    source: Data,
    model: str = "mlp",
    defense: str = "none",
    setting: Setting | None = None,
    seed: int = 1,
    guard: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Serving, list[Round]]:
    """What clients with these batches are sent and answer."""
    module = testing.model(model, source.shape, source.classes, **MODELS.get(model, {}))
    serving = Serving(
        server=registry.build("servers", server, options),
        defense=registry.build("defenses", defense, guard or {}),
        setting=setting or Setting(batch_size=images.shape[1], precision="float64"),
        module=module,
        auxiliary=source.split.train,
        classes=source.classes,
        identity=("test",),
        private=("test", "private"),
        seed=("server", seed),
    )
    return serving, serving.rounds(images, labels)


def seen(serving: Serving, each: Round, labels: Tensor, source: Data, batch_size: int | None = None) -> Observation:
    from gradleak.federation.observation import observe

    granted = Knowledge(server=serving.server.surface, auxiliary=True)
    return observe(
        each.sent,
        each.network,
        serving.defense,
        serving.setting,
        source.shape,
        labels,
        source.classes,
        granted,
        batch_size=batch_size,
        auxiliary=source.split.train,
    )


def exact(guesses: Tensor, images: Tensor) -> Tensor:
    """Images [N] that some guess matches with a mean squared error below 1e-6."""
    away = (guesses.flatten(2)[:, :, None] - images.flatten(2)[:, None]).square().mean(-1)
    return (away < 1e-6).any(1).sum(1).double()


def counts(
    server: str, attack: str, images: int, count: int = 60, name: str = "digits", **options: Any
) -> tuple[float, float]:
    """Mean number of images recovered exactly, over batches and readings, and its standard error."""
    source, found = data(name), []
    for seed in range(3):
        batch, labels = batches(source, count // 3, images, seed)
        serving, (each,) = rounds(server, batch, labels, source, seed=seed, **options)
        answer = testing.reconstruct(attack, seen(serving, each, labels, source))
        found.append(exact(answer.images, batch))
    joined = torch.cat(found)
    return float(joined.mean()), float(joined.std()) / math.sqrt(len(joined))


@pytest.mark.parametrize(("images", "bins"), [(8, 64), (64, 64), (64, 128), (64, 256)])
@pytest.mark.parametrize("variant", ["cumulative", "sparse"])
def test_an_imprint_recovers_what_its_formula_says(images: int, bins: int, variant: str) -> None:
    mean, error = counts("imprint", "imprint-readout", images, bins=bins, variant=variant)
    assert abs(mean - imprint.expected(images, bins)) < 3 * error


def test_the_formula_holds_for_colour_images_too() -> None:
    mean, error = counts("imprint", "imprint-readout", 16, 30, "photos", bins=64)
    assert abs(mean - imprint.expected(16, 64)) < 3 * error


def test_one_shot_reads_one_bin_of_all_images() -> None:
    mean, error = counts("imprint", "imprint-readout", 32, 150, bins=32, variant="one-shot")
    assert abs(mean - (1 - 1 / 32) ** 31) < 3 * error


def test_a_mean_ties_and_so_falls_short_however_many_bins() -> None:
    source = data()
    wide, _ = counts("imprint", "imprint-readout", 64, bins=1024, reading="mean")
    images, _ = batches(source, 60, 64)
    # Images of one mean share their bin at any width: those alone in theirs are all that can come back.
    means = (images.flatten(2).mean(2) * 1024).round().long()
    alone = torch.stack([(row[:, None] == row[None]).sum(1).eq(1).sum() for row in means]).double().mean()
    assert wide < imprint.expected(64, 1024) - 10
    assert abs(wide - float(alone)) < 6


def test_the_top_bin_comes_back_and_empty_bins_drop_out() -> None:
    source = data()
    images, labels = batches(source, 1, 4)
    serving, (each,) = rounds("imprint", images, labels, source, bins=16)
    ((name, block),) = [(n, m) for n, m in each.network.module.named_modules() if isinstance(m, imprint.Imprint)]
    readings = imprint.inputs_at(each.network.module, f"{name}.rows", images[0]) @ block.rows.weight[0].detach()
    # Four images of which one is above all edges.
    top = block.rows.bias.detach().neg().max()
    assert not bool((readings > top).all())
    brightest = images[0][readings.argmax()]
    direction = block.rows.weight[0].detach().view(1, 8, 8)
    above = (brightest + 2 * direction / direction.abs().max()).clamp(0, 1)
    reading = imprint.inputs_at(each.network.module, f"{name}.rows", above[None]) @ block.rows.weight[0].detach()
    assert float(reading) > float(top)
    images[0, 0] = above
    serving, (each,) = rounds("imprint", images, labels, source, bins=16)
    answer = testing.reconstruct("imprint-readout", seen(serving, each, labels, source))
    assert float((answer.images[0] - above).square().flatten(1).mean(1).min()) < 1e-9
    assert float(answer.details["bins"]) <= 4


def test_an_imprint_before_a_later_layer_gives_the_images_that_its_inputs_show() -> None:
    source = data()
    images, labels = batches(source, 1, 3)
    serving, (each,) = rounds("imprint", images, labels, source, model="lenet", bins=64, before="2")
    answer = testing.reconstruct("imprint-readout", seen(serving, each, labels, source))
    assert float(testing.psnr(answer.images, images)) > 25


def test_only_the_sparse_variant_survives_local_steps() -> None:
    setting = Setting(batch_size=64, local_batch_size=8, local_steps=8, local_lr=0.1, precision="float64")
    kept, _ = counts("imprint", "imprint-readout", 64, 15, bins=256, variant="sparse", setting=setting)
    lost, _ = counts("imprint", "imprint-readout", 64, 15, bins=256, setting=setting)
    assert kept > 0.75 * 64 and lost < 3


def test_a_sum_dilutes_an_imprint_and_leaves_loki_alone() -> None:
    source, clients, images = data(), 10, 8
    batch, labels = batches(source, 30 * clients, images)
    own = batch.unflatten(0, (30, clients))[:, 0]
    everyones = labels.unflatten(0, (30, clients)).flatten(1)
    found = {}
    for server, more in (("imprint", {"gain": 0.1}), ("loki", {"clients": clients})):
        options: dict[str, Any] = {"bins": 64, **more}
        serving, (each,) = rounds(
            server, batch, labels, source, defense="secure-aggregation", guard={"clients": clients}, **options
        )
        observation = seen(serving, each, everyones, source, images * clients)
        guesses = testing.reconstruct(f"{server}-readout", observation).images
        hits = exact(guesses, own)
        found[server] = float(hits.mean()), float(hits.std()) / math.sqrt(len(hits))
    for server, total in (("imprint", images * clients), ("loki", images)):
        mean, error = found[server]
        assert abs(mean - images * (1 - 1 / 64) ** (total - 1)) < 3 * error, found


def test_trap_weights_beat_the_honest_model() -> None:
    source = data()
    images, labels = batches(source, 6, 64)
    module = testing.model("mlp", widths=(500,)).double()
    gained = {}
    for server, attack in (("trap-weights", "trap-readout"), ("honest", "linear-leakage")):
        made: Server = registry.build("servers", server)
        model = made.tamper(module, source.split.train, torch.Generator().manual_seed(0))
        scene = testing.Scene.of(model, images, labels)
        answer = testing.reconstruct(attack, scene.observe(auxiliary=source.split.train))
        gained[server] = exact(answer.images, images).mean()
    assert gained["trap-weights"] > gained["honest"] + 10


@pytest.mark.parametrize("model", ["mlp", "lenet"])
@pytest.mark.parametrize("direction", ["feature", "random"])
def test_fishing_isolates_one_image_in_few_queries(model: str, direction: str) -> None:
    source = data()
    images, labels = batches(source, 10, 64)
    serving, found = rounds("feature-fishing", images, labels, source, model=model, direction=direction)
    isolated = 0
    for victim, each in enumerate(found):
        shown = serving.server.isolate(seen(serving, each, labels[[victim]], source), each.queries)
        if shown is not None and residue(shown, images[victim])[0] < 1e-3:
            isolated += len(each.queries) <= math.log2(64) + 1
    assert isolated >= 0.9 * len(found)


def test_an_attack_on_the_isolated_image_does_as_well_as_on_that_image_alone() -> None:
    source = data()
    images, labels = batches(source, 2, 64)
    serving, found = rounds("feature-fishing", images, labels, source, model="lenet")
    plain = testing.model("lenet", **MODELS["lenet"])
    for victim, each in enumerate(found):
        shown = serving.server.isolate(seen(serving, each, labels[[victim]], source), each.queries)
        assert shown is not None
        _, nearest = residue(shown, images[victim])
        alone, label = images[victim, nearest][None, None], labels[victim, nearest][None, None]
        options = {"iterations": 150}
        fished = testing.psnr(testing.reconstruct("inverting-gradients", shown, **options).images, alone)
        honest = testing.Scene.of(plain, alone, label).observe()
        single = testing.psnr(testing.reconstruct("inverting-gradients", honest, **options).images, alone)
        assert float(fished) > float(single) - 1


def test_class_fishing_finds_the_rarest_class() -> None:
    source = data()
    images, labels = batches(source, 8, 16)
    serving, found = rounds("class-fishing", images, labels, source)
    for victim, each in enumerate(found):
        there = torch.bincount(labels[victim], minlength=10)
        shown = serving.server.isolate(seen(serving, each, labels[[victim]], source), each.queries)
        assert shown is not None and shown.labels is not None
        label = int(shown.labels[0, 0])
        assert int(there[label]) == int(there[there > 0].min()) == shown.batch_size
        if shown.batch_size == 1:
            share, nearest = residue(shown, images[victim])
            assert share < 1e-9 and int(labels[victim, nearest]) == label


# The axis of the setting


SUITE: dict[str, Any] = {
    "name": "served",
    "victims": 2,
    "candidates": 10,
    "knowledge": ["oblivious"],
    "datasets": [{"name": "digits"}],
    "models": [{"name": "mlp", "options": {"widths": [32]}, "label": "mlp"}],
    "attacks": [
        {"name": "linear-leakage", "optional": True},
        {"name": "imprint-readout", "optional": True},
        {"name": "mean-image"},
    ],
    "settings": [
        {"name": "honest", "batch_size": 8, "precision": "float64", "grants": {"auxiliary": True}},
        {
            "name": "imprint",
            "batch_size": 8,
            "precision": "float64",
            "grants": {"auxiliary": True},
            "server": {"imprint": {"bins": 64}},
        },
    ],
    "defenses": [{"name": "none"}, {"name": "architecture-check"}],
}


def cells(suite: dict[str, Any]) -> list[AttackCell]:
    from gradleak.evaluation.check import check

    found = check(expand(Suite.model_validate(suite), WORKSHOP.digest), WORKSHOP)
    return [cell for cell in found if isinstance(cell, AttackCell)]


@pytest.fixture(scope="module")
def answered() -> list[CellResult]:
    return [evaluate(cell, WORKSHOP) for cell in cells(SUITE)]


@pytest.fixture(scope="module")
def stored(answered: list[CellResult], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "store.sqlite"
    with Store(path, create=True) as store:
        for each in answered:
            store.write(each)
    return path


def test_an_honest_server_leaves_keys_and_seeds_as_they_were() -> None:
    plain: dict[str, Any] = {**SUITE, "settings": [SUITE["settings"][0]]}
    named = {**plain, "settings": [{**SUITE["settings"][0], "server": "honest"}]}
    first, second = cells(plain), cells(named)
    assert [cell.key for cell in first] == [cell.key for cell in second]
    assert [cell.draws for cell in first] == [cell.draws for cell in second]
    assert "server" not in first[0].stored()["setting"] and "server" not in first[0].stored()["setting"]["grants"]


def test_an_honest_round_is_that_of_the_channel() -> None:
    source = data()
    images, labels = batches(source, 2, 3)
    _, (each,) = rounds("honest", images, labels, source)
    scene = testing.Scene.of(testing.model("mlp", widths=(64,)), images, labels)
    for name, tensor in scene.sent.update.items():
        assert torch.equal(tensor, each.sent.update[name])
    assert isinstance(Channel.drawn, object) and each.refused == ()


def test_a_server_is_part_of_key_and_seeds_and_comes_back_from_a_store() -> None:
    served = [cell for cell in cells(SUITE) if cell.setting.server.name == "imprint"]
    other = {**SUITE["settings"][1], "server": {"imprint": {"bins": 32}}}
    others = [cell for cell in cells({**SUITE, "settings": [other]})]
    assert not {cell.key for cell in served} & {cell.key for cell in others}
    assert served[0].draws.server != others[0].draws.server
    again = Cell.of(served[0].stored())
    assert again.key == served[0].key and again.setting.server == served[0].setting.server
    assert again.built_server == registry.build("servers", "imprint", {"bins": 64})


def test_all_attacks_and_defenses_face_one_model() -> None:
    served = [cell for cell in cells(SUITE) if cell.setting.server.name == "imprint"]
    assert len({cell.draws.server for cell in served}) == 1 and len(served) > 2


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ({"server": "imprnt"}, "imprint"),
        ({"server": {"imprint": {"bins": 1}}}, "bins"),
        ({"server": {"imprint": {"bin": 4}}}, "bin"),
        ({"server": 3}, "expected a name"),
        ({"grants": {"server": "architecture"}}, "grants: server"),
    ],
)
def test_a_wrong_server_is_refused(setting: dict[str, Any], line: str) -> None:
    with pytest.raises(GradleakError, match=line):
        build_setting({"name": "x", **setting}, "suite")


def test_what_an_attack_asks_of_the_server_is_checked() -> None:
    suite = {**SUITE, "attacks": [{"name": "imprint-readout"}], "settings": [SUITE["settings"][0]]}
    with pytest.raises(GradleakError, match="server: architecture"):
        cells(suite)
    bare = {**SUITE["settings"][1], "grants": {}}
    with pytest.raises(GradleakError, match="server 'imprint' needs auxiliary"):
        cells({**SUITE, "attacks": [{"name": "imprint-readout"}], "settings": [bare]})


def test_the_threat_model_follows_from_the_needs() -> None:
    assert registry.build("attacks", "imprint-readout").threat_model == "malicious server (architecture)"
    assert registry.build("attacks", "dlg").threat_model == "honest server"
    assert registry.describe("attacks", "dlg")["threat_model"] == "honest server"
    assert Knowledge(server=Power.PARAMETERS).missing(Knowledge(server=Power.ARCHITECTURE)) == []
    assert Knowledge(server=Power.ARCHITECTURE).missing(Knowledge(server=Power.PARAMETERS)) == ["server: architecture"]
    assert Setting().server == Tampering() and Level.ORACLE


def test_no_maximum_is_taken_over_both_kinds_of_servers(stored: Path) -> None:
    with Store(stored) as store:
        found = results.read(store)
    for board in (landing_board(found.honest), attack_board(found.honest)):
        assert "imprint-readout" not in str(board.table.to_dict())
    board = malicious.malicious_board(found)
    assert set(board.table["setting"]) == {"imprint"}
    line = board.table[board.table["defense"] == "none"].iloc[0]
    assert line["attack"] == "imprint-readout" and line["threat_class"] == "G" and line["surface"] == "architecture"
    assert line["expected"] == pytest.approx(imprint.expected(8, 64))
    assert line["recovered"] > line["honest"] and line["added_parameters"] > 0
    assert malicious.one_kind(found).cells["server"].eq("honest").all()


def test_rows_carry_the_class_of_their_threat_model(stored: Path) -> None:
    with Store(stored) as store:
        rows = store.rows()
    assert set(rows["threat_class"]) == {"D", "G"}
    assert set(rows.loc[rows["threat_class"] == "G", "server"]) == {"imprint"}


def test_a_refused_round_scores_the_floor_and_alarms_are_counted(stored: Path) -> None:
    with Store(stored) as store:
        found = results.read(store)
    rows = found.malicious.rows
    refused = rows[(rows["defense"] == "architecture-check") & (rows["attack"] == "imprint-readout")]
    # It reads nothing of the message, and so serves all defenses of a context.
    floor = rows[(rows["attack"] == "mean-image") & (rows["defense"] == "none")]
    assert (refused["status"] == REFUSED).all() and not refused["failed"].any()
    assert np.allclose(refused["psnr"].to_numpy(), floor["psnr"].to_numpy())
    table = malicious.detection_board(found).table.set_index("server")
    assert table.loc["imprint", "refused"] == 1 and table.loc["honest", "refused"] == 0
    assert (table["false_alarms"] == 0).all() and (table["honest_rounds"] >= 200).all()


SEEN = {
    "imprint": {"architecture-check", "row-similarity"},
    "loki": {"architecture-check", "row-similarity"},
    "trap-weights": {"weight-balance"},
    "class-fishing": {"head-check"},
    "feature-fishing": {"head-check"},
}


@pytest.mark.parametrize("server", SEEN)
def test_each_server_is_seen_by_the_check_made_for_it(server: str) -> None:
    source = data()
    module = testing.model("mlp", widths=(64,)).double()
    made: Server = registry.build("servers", server)
    sent = made.tamper(module, source.split.train, torch.Generator().manual_seed(0))
    images, labels = batches(source, 1, 16)
    targets = torch.nn.functional.one_hot(labels[0], 10).double()
    for name in ("architecture-check", "row-similarity", "weight-balance", "head-check"):
        guard = registry.build("defenses", name)
        honest, tampered = (guard.inspect(model, module, images[0], targets) for model in (module, sent))
        assert honest <= guard.inspect(module, module, images[0], targets)
        if name in SEEN[server]:
            assert tampered > 1.4 * max(honest, 0.5), name


def test_d_snr_misses_trap_weights_and_sees_one_image_fished() -> None:
    source = data()
    images, labels = batches(source, 1, 16)
    targets = torch.nn.functional.one_hot(labels[0], 10).double()
    module, guard = testing.model("mlp", widths=(64,)).double(), registry.build("defenses", "d-snr")
    trapped = registry.build("servers", "trap-weights").tamper(
        module, source.split.train, torch.Generator().manual_seed(0)
    )
    _, (fished,) = rounds("feature-fishing", images, labels, source)
    honest, trap, fish = (
        guard.inspect(model, module, images[0], targets) for model in (module, trapped, fished.queries[-1].module)
    )
    assert trap < 4 * honest and fish > 10 * honest


@pytest.mark.parametrize("defense", ["gaussian-noise", "dp-sgd", "top-k", "sketch", "secure-aggregation"])
@pytest.mark.parametrize("server", ["imprint", "trap-weights", "class-fishing", "feature-fishing", "loki"])
def test_defenses_run_unchanged_against_every_server(server: str, defense: str) -> None:
    source = data()
    clients = 2 if defense == "secure-aggregation" else 1
    images, labels = batches(source, clients, 4)
    options: dict[str, Any] = {"batch": 4} if server == "trap-weights" else {}
    serving, found = rounds(server, images, labels, source, defense=defense, **options)
    for each in found:
        assert all(bool(tensor.isfinite().all()) for tensor in each.sent.message.values())
        observation = seen(serving, each, labels.flatten()[None], source, 4 * clients)
        shown = serving.server.isolate(observation, each.queries) if serving.server.isolates else observation
        if shown is not None:
            attack = {"imprint": "imprint-readout", "loki": "loki-readout", "trap-weights": "trap-readout"}
            answer = testing.reconstruct(attack.get(server, "linear-leakage"), shown)
            assert answer.images.isfinite().all()


def test_the_wording_of_a_server_moves_no_draw_and_no_question() -> None:
    from dataclasses import replace

    from gradleak.suite.cells import question_of

    cell = next(cell for cell in cells(SUITE) if cell.setting.server.name == "imprint")
    setting = replace(cell.setting, server=replace(cell.setting.server, code="other"))
    other = replace(cell, setting=setting)
    assert other.key != cell.key and other.draws == cell.draws
    assert question_of(other.stored()) == question_of(cell.stored())
    with pytest.raises(GradleakError, match="server 'imprint'"):
        other.check_code()
