"""Secure aggregation: what a sum over clients is, who may come before it, and what is scored."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import vmap

from gradleak import registry, suite
from gradleak.chain import Chain
from gradleak.dataset import Data
from gradleak.defense import Defense
from gradleak.defenses.augmentation import Augmentation
from gradleak.defenses.dp_sgd import DPSGD
from gradleak.defenses.dropout import Dropout
from gradleak.defenses.secure_aggregation import SecureAggregation
from gradleak.defenses.sign import Sign
from gradleak.defenses.sketch import Sketch
from gradleak.defenses.top_k import TopK
from gradleak.errors import GradleakError
from gradleak.evaluation import check, evaluate, metrics, workshop
from gradleak.federation import client
from gradleak.model import initialise
from gradleak.threat import Setting
from gradleak.update import LocalTraining, Update, flatten, local_update, one_hot

CLIENTS, BATCH = 3, 2
SUM = SecureAggregation(clients=CLIENTS, fraction=24)


def digits() -> Data:
    return Data(registry.build("datasets", "digits"), "digits")


def send(defense: Defense) -> tuple[client.Sent, client.Sent, Tensor]:
    """What the server gets of two victims, what all six clients sent, and all labels [2, 6]."""
    images, labels = digits().cohorts(2, BATCH, CLIENTS)
    setting = Setting(batch_size=BATCH, precision="float64")
    module = initialise(registry.build("models", "mlp", {"widths": (12,), "activation": "sigmoid"}), (1, 8, 8), 10, 0)
    network = client.client_network(module, defense, setting)
    each = client.send(network, images.double(), labels, 10, defense, setting, 5, list(range(len(images))))
    return client.aggregated(each, defense.cohort), each, labels.view(2, -1)


def union(defense: Defense, sent: client.Sent, labels: Tensor, victim: int) -> Update:
    """The update of one client with all images of a sum."""
    module = initialise(registry.build("models", "mlp", {"widths": (12,), "activation": "sigmoid"}), (1, 8, 8), 10, 0)
    network = client.client_network(module, defense, Setting(precision="float64"))
    return local_update(
        network,
        sent.images[victim],
        one_hot(labels[victim], 10, torch.float64),
        LocalTraining(),
        per_example=(lambda gradient: defense.per_example(gradient, sent.public))
        if defense.per_example_gradients
        else None,
        buffers={name: tensor[victim] for name, tensor in sent.buffers.items()},
    )


@pytest.mark.parametrize(
    "defense",
    [
        SUM,
        Chain((Dropout(), SUM)),
        Chain((DPSGD(sigma=0, clip=0.05), SUM)),
        Chain((Sketch(ratio=0.2), SUM)),
        Chain((Augmentation(), SUM)),
    ],
    ids=["sum", "dropout", "clipping", "sketch", "augmentation"],
)
def test_a_sum_is_the_message_of_one_client_with_all_images(defense: Defense) -> None:
    sent, each, labels = send(defense)
    assert sent.images.shape[:2] == (2, CLIENTS * BATCH) == labels.shape
    for victim in range(2):
        expected = defense.simulate(union(defense, sent, labels, victim), sent.public)
        found = {name: tensor[victim] for name, tensor in sent.message.items()}
        # Rounding to 2^-24 is at most half of that.
        torch.testing.assert_close(found, expected, rtol=0, atol=2.0**-25 * (1 + 1e-6))
        clients = {name: tensor[CLIENTS * victim :][:CLIENTS].mean(0) for name, tensor in each.message.items()}
        torch.testing.assert_close(found, clients)
    assert sent.bytes == each.bytes[::CLIENTS]


def test_the_victim_is_the_first_client_of_its_sum() -> None:
    sent, each, _ = send(SUM)
    assert torch.equal(sent.images[:, :BATCH], each.images[::CLIENTS])
    assert torch.equal(sent.of_first(BATCH).images, each.images[::CLIENTS])
    assert client.aggregated(each, 1) is each


def test_noise_of_all_clients_is_in_the_sum() -> None:
    loud, silent = (send(Chain((DPSGD(sigma=sigma, clip=0.5), SUM)))[0] for sigma in (2.0, 0.0))
    noise = torch.cat([(loud.message[name] - silent.message[name]).flatten() for name in loud.message])
    expected = 2.0 * 0.5 / BATCH / math.sqrt(CLIENTS)
    assert float(noise.std()) == pytest.approx(expected, rel=5 / math.sqrt(2 * len(noise)))
    assert loud.drew and not silent.drew


def test_shares_are_fixed_point_and_their_sum_cannot_overflow() -> None:
    defense = SecureAggregation(clients=3, fraction=10)
    generator = torch.Generator().manual_seed(0)
    update = {"w": torch.randn(40, 30, generator=generator)}
    share = defense.protect(update, {}, generator)
    assert float((share["w"] - update["w"]).abs().max()) <= 2.0**-11 * (1 + 1e-4)
    whole = np.frombuffer(defense.pack(share, {}), np.int32)
    np.testing.assert_allclose(whole / 2.0**10, flatten(share).numpy(), rtol=1e-6)
    huge = defense.protect({"w": torch.tensor([1e12, -1e12], dtype=torch.float64)}, {}, generator)["w"]
    assert 3 * float(huge.abs().max()) * 2**10 <= 2**31 - 1


def test_every_client_has_a_seed_and_victims_keep_theirs() -> None:
    alone, summed = (client.seeds_for([0, 1], "x", clients=clients) for clients in (1, CLIENTS))
    assert summed[::CLIENTS] == alone
    assert len(set(summed)) == 2 * CLIENTS


@pytest.mark.parametrize("tuning", [False, True])
def test_no_image_is_met_twice(tuning: bool) -> None:
    data = digits()
    victims = data.victims(4, BATCH, tuning)[0]
    images, labels = data.cohorts(4, BATCH, CLIENTS, tuning)
    assert len(images) == len(labels) == 4 * CLIENTS
    assert torch.equal(images[::CLIENTS], victims)
    assert torch.equal(data.cohorts(2, BATCH, CLIENTS, tuning)[0], images[: 2 * CLIENTS])
    assert len({row.numpy().tobytes() for row in images.flatten(0, 1)}) == 4 * CLIENTS * BATCH
    # All victims that there are leave nobody to be summed with.
    most = len(data.split.test) // 2 // BATCH
    assert torch.equal(data.cohorts(most, BATCH, 1, tuning)[0], data.victims(most, BATCH, tuning)[0])
    with pytest.raises(GradleakError, match="victims of 2 images need"):
        data.cohorts(most, BATCH, 2, tuning)


@pytest.mark.parametrize(
    "members, complaint",
    [
        ((SUM, Sketch()), "SecureAggregation must come last, as Sketch would be the server's own"),
        ((TopK(), SUM), "messages of TopK do not add up, so it cannot come before SecureAggregation"),
        ((Sketch(), Sign(), SUM), "messages of Sign do not add up"),
    ],
)
def test_what_cannot_be_summed_is_refused(members: tuple[Defense, ...], complaint: str) -> None:
    with pytest.raises(GradleakError, match=complaint):
        Chain(members)


def test_noise_keeps_its_likelihood_and_shares_their_encoding() -> None:
    chain = Chain((DPSGD(), SUM))
    assert chain.has_likelihood and chain.cohort == CLIENTS and chain.is_adaptive_target
    message = {"w": torch.ones(5)}
    assert chain.pack(message, {}) == SUM.pack(message, {})
    assert chain.version == f"{DPSGD.version} + {SUM.version}"


SUITE = """
name: sums
victims: 2
knowledge: [oblivious, public]
controls: listed
datasets: [digits]
models: [{name: mlp, options: {widths: [128]}}]
settings: [{name: one, batch_size: 1, grants: {labels: known}}]
attacks:
  - {name: inverting-gradients, options: {iterations: 150}}
  - linear-leakage
  - mean-image
defenses:
  - none
  - {name: secure-aggregation, options: {clients: 3}}
  - name: dp-sgd + secure-aggregation
    options: {dp-sgd: {sigma: 0.0}, secure-aggregation: {clients: 3}}
    label: clipped
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], Any]:
    torch.set_num_threads(1)
    path: Path = tmp_path_factory.mktemp("sums") / "sums.yaml"
    path.write_text(SUITE)
    shop = workshop.Workshop()
    cells = check.check(suite.expand(suite.read(path), shop.digest), shop)
    found = [evaluate.evaluate(cell, shop) for cell in cells]
    assert [result.error for result in found if result.error] == []
    return {
        (cell.attack.name, cell.defense.label, cell.knowledge.value): result
        for cell, result in zip(suite.attacking(cells), found, strict=True)
    }


def test_only_the_victims_images_are_scored_and_kept(results: dict[tuple[str, str, str], Any]) -> None:
    images, labels = digits().victims(2, 1)
    for result in results.values():
        assert [(row.victim, row.image) for row in result.rows] == [(0, 0), (1, 0)]
        kept = torch.stack([torch.as_tensor(result.reconstructions[victim]) for victim in range(2)])
        again = metrics.score(kept, None, images, labels, digits().candidates(10))
        assert [row.psnr for row in result.rows] == pytest.approx([row["psnr"] for row in again], abs=1e-4)
        assert [row.matched for row in result.rows] == [0, 0]


def test_who_knows_of_the_sum_recovers_more_of_it(results: dict[tuple[str, str, str], Any]) -> None:
    def quality(attack: str, defense: str, level: str) -> float:
        return float(np.mean([row.psnr for row in results[attack, defense, level].rows]))

    summed = next(label for _, label, _ in results if label.startswith("secure"))
    attack = "inverting-gradients"
    # The truth explains a sum only to who knows of all its images.
    for defense in (summed, "clipped"):
        told, blind = results[attack, defense, "public"], results[attack, defense, "oblivious"]
        assert told.provenance["adaptive"] and not blind.provenance["adaptive"]
        assert max(row.loss_at_truth for row in told.rows) < 1e-6 < 0.01 < min(row.loss_at_truth for row in blind.rows)
        assert not told.provenance["stochastic"]
    assert quality(attack, summed, "public") > quality(attack, summed, "oblivious") + 5
    # The closed form is told of the batch at any level; three images part in 128 neurons.
    assert quality("linear-leakage", summed, "oblivious") > quality("mean-image", summed, "oblivious") + 5


def test_local_batches_cannot_be_summed(tmp_path: Path) -> None:
    text = SUITE.replace("batch_size: 1,", "batch_size: 2, local_lr: 0.1, local_steps: 2, local_batch_size: 1,")
    (tmp_path / "sums.yaml").write_text(text)
    cells = suite.expand(suite.read(tmp_path / "sums.yaml"), workshop.Workshop().digest)
    with pytest.raises(GradleakError, match="a sum of clients with local batches is no update of one batch"):
        check.check([cell for cell in suite.attacking(cells) if cell.attack.name == "mean-image"], workshop.Workshop())


def test_decoding_a_mean_is_the_mean_of_decodings() -> None:
    """So that training under secure aggregation is training on the mean of all clients' shares."""
    defense = Chain((Sketch(ratio=0.2), SUM))
    sent, each, _ = send(defense)
    whole, parts = (vmap(lambda row: defense.decode(row, sent.public))(m.message) for m in (sent, each))
    torch.testing.assert_close(
        {name: tensor.mean(0) for name, tensor in whole.items()},
        {name: tensor.mean(0) for name, tensor in parts.items()},
    )
