from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, fields

import pytest
import torch

from gradleak import registry
from gradleak.chain import Chain
from gradleak.defense import Defense, View
from gradleak.defenses.censor import Censor
from gradleak.defenses.dgc import DGC
from gradleak.defenses.gaussian_noise import GaussianNoise
from gradleak.defenses.none import NoDefense
from gradleak.defenses.random_k import RandomK
from gradleak.defenses.sketch import Sketch
from gradleak.defenses.top_k import TopK
from gradleak.errors import GradleakError
from gradleak.federation import client
from gradleak.model import initialise
from gradleak.threat import Setting
from gradleak.update import Update


def update(seed: int = 0) -> Update:
    generator = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(6, 5, generator=generator), "b": torch.randn(10, generator=generator)}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def send(defense: Defense) -> client.Sent:
    setting = Setting(batch_size=3)
    module = initialise(registry.build("models", "mlp", {"widths": (8,)}), (1, 4, 4), 10, 0)
    network = client.client_network(module, defense, setting)
    images = torch.rand(2, 3, 1, 4, 4, generator=seeded())
    labels = torch.tensor([[0, 1, 2], [3, 4, 5]])
    return client.send(network, images, labels, 10, defense, setting, 7, [1, 2])


def test_message_is_the_composition() -> None:
    first, second = RandomK(ratio=0.5), TopK(ratio=0.25)
    chain = Chain((first, second))
    public = chain.public(update(), 1, seeded())
    message = chain.protect(update(), public, seeded())
    assert message["values"].shape == (20,)
    assert int((message["values"] != 0).sum()) == 5
    own = {name.removeprefix("0 "): tensor for name, tensor in public.items()}
    expected = second.protect(first.protect(update(), own, seeded()), {}, seeded())
    torch.testing.assert_close(message, expected)
    torch.testing.assert_close(chain.decode(message, public), first.decode(expected, own))
    torch.testing.assert_close(chain.simulate(update(), public), first.simulate(update(), own))
    # The last one's encoding and likelihood, on the first one's messages.
    assert chain.pack(message, public) == second.pack(message, {})
    assert chain.has_likelihood
    guess = chain.simulate(update(1), public)
    torch.testing.assert_close(chain.nll(message, guess, public), second.nll(message, guess, {}))


def test_sketch_then_noise_is_the_remedy_of_sketch() -> None:
    # Two ways to write one defense must give the same message and the same guarantee.
    chained = send(Chain((Sketch(ratio=0.3), GaussianNoise(sigma=0.5, clip=0.1))))
    remedy = send(Sketch(ratio=0.3, sigma=0.5, clip=0.1))
    torch.testing.assert_close(chained.message, remedy.message, rtol=0, atol=0)
    chain = Chain((Sketch(), GaussianNoise(sigma=0.5, clip=0.1)))
    assert chain.guarantee(Setting()) == Sketch(sigma=0.5, clip=0.1).guarantee(Setting())


def test_clipping_bounds_what_is_sent() -> None:
    # Without noise: the mean of three clipped sketches has norm at most the clip.
    sent = send(Chain((Sketch(ratio=0.3), GaussianNoise(sigma=0.0, clip=0.01))))
    norms = sent.message["sketch"].norm(dim=1)
    assert float(norms.max()) <= 0.01 * (1 + 1e-6)
    assert float(norms.min()) > 0.001


def test_noise_then_sketch_sketches_the_noisy_mean() -> None:
    chain = Chain((GaussianNoise(sigma=0.5, clip=0.1), Sketch(ratio=0.3)))
    sent = send(chain)
    assert sent.message["sketch"].shape == (2, math.ceil(0.3 * (16 * 8 + 8 + 80 + 10)))
    assert not chain.has_likelihood
    assert chain.guarantee(Setting()) is not None


def test_order_that_bounds_nothing_is_refused() -> None:
    with pytest.raises(GradleakError, match="TopK is not linear, so it cannot come before GaussianNoise"):
        Chain((TopK(), GaussianNoise()))
    assert Chain((TopK(), GaussianNoise(clip=None))).has_likelihood
    assert Chain((GaussianNoise(), TopK())).per_example_gradients


def test_defense_of_the_model_does_not_hide_the_likelihood_before_it() -> None:
    class _Model(Defense):
        family = "model"
        reference = "test"

    chain = Chain((TopK(ratio=0.5), _Model()))
    message = chain.protect(update(), {}, seeded())
    assert chain.has_likelihood
    assert chain.pack(message, {}) == TopK(ratio=0.5).pack(message, {})
    # And it may stand before clipping, as it leaves the update alone.
    assert Chain((_Model(), GaussianNoise())).per_example_gradients


def test_local_steps_refuse_clipped_sketches() -> None:
    defense = Sketch(clip=1.0)
    setting = Setting(batch_size=1, local_lr=0.1)
    module = initialise(registry.build("models", "mlp", {"widths": (8,)}), (1, 4, 4), 10, 0)
    network = client.client_network(module, defense, setting)
    with pytest.raises(GradleakError, match="use FedSGD"):
        client.send(network, torch.rand(1, 1, 1, 4, 4), torch.zeros(1, 1).long(), 10, defense, setting, 0, [0])


@dataclass(frozen=True, kw_only=True)
class _Smoothing(Defense):
    """The client trains on (1 - s) y + s / K."""

    family = "data"
    reference = "test"
    s: float = 0.5

    def encode(
        self, images: torch.Tensor, targets: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return images, (1 - self.s) * targets + self.s / targets.shape[-1]


@dataclass(frozen=True, kw_only=True)
class _Darkening(Defense):
    """The client trains on darker images."""

    family = "data"
    reference = "test"

    def encode(
        self, images: torch.Tensor, targets: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return images * images, targets.flip(-1)


def rounds(defense: Defense) -> tuple[client.Sent, client.Sent]:
    """Two messages of four clients of a model that takes every defense; the second of other images."""
    setting = Setting(batch_size=2)
    module = initialise(registry.build("models", "mlp", {"widths": (8,)}), (1, 8, 8), 10, 0)
    network = client.client_network(module, defense, setting)
    images = torch.rand(2, 4, 2, 1, 8, 8, generator=seeded())
    labels = torch.arange(8).view(4, 2)
    first = client.send(network, images[0], labels, 10, defense, setting, 7, [1, 2, 3, 4])
    second = client.send(network, images[1], labels, 10, defense, setting, 8, [5, 6, 7, 8], memories=first.memories)
    return first, second


@pytest.mark.parametrize("name", registry.names("defenses"))
def test_a_chain_of_one_and_none_is_the_defense_itself(name: str) -> None:
    alone: Defense = registry.build("defenses", name)
    chain = Chain((alone, NoDefense()))
    for mine, chained in zip(rounds(alone), rounds(chain), strict=True):
        assert mine.bytes == chained.bytes and mine.drew == chained.drew
        assert mine.message.keys() == chained.message.keys()
        for each in mine.message:
            assert torch.equal(mine.message[each], chained.message[each]), each
        for index in range(2):
            row = {each: tensor[index] for each, tensor in mine.message.items()}
            decoded = alone.decode(row, mine.public)
            again = chain.decode(row, chained.public)
            assert all(torch.equal(decoded[each], again[each]) for each in decoded)
            guess = {each: tensor[1 - index] for each, tensor in mine.update.items()}
            simulated = alone.simulate(guess, mine.public)
            assert all(torch.equal(t, chain.simulate(guess, chained.public)[n]) for n, t in simulated.items())
            if alone.has_likelihood:
                expected = alone.nll(row, simulated, mine.public)
                torch.testing.assert_close(chain.nll(row, simulated, chained.public), expected, rtol=0, atol=0)
    for fact in ("cohort", "single_round", "linear", "additive", "per_example_gradients", "has_likelihood", "softens"):
        assert getattr(chain, fact) == getattr(alone, fact), fact
    assert chain.is_adaptive_target == alone.is_adaptive_target
    assert chain.counter_attacks == alone.counter_attacks
    assert chain.guarantee(Setting(batch_size=2)) == alone.guarantee(Setting(batch_size=2))
    assert chain.run_guarantee(Setting(batch_size=2), 0.1, 5) == alone.run_guarantee(Setting(batch_size=2), 0.1, 5)
    assert chain.at_round(3, 1) == Chain((alone.at_round(3, 1), NoDefense()))


def test_a_chain_answers_every_public_member_of_a_defense() -> None:
    members = {name for name, _ in inspect.getmembers(Defense) if not name.startswith("_")}
    members |= {name for name in Defense.__annotations__ if not name.startswith("_")}
    # Asked of each of the `inspectors` by itself, and what concerns options before there is a defense.
    members -= {"inspect", "false_alarms", "renamed"}
    assert members - {field.name for field in fields(Defense)} <= set(vars(Chain)), members - set(vars(Chain))


def test_a_chain_keeps_loss_and_memory_of_its_members() -> None:
    first, second = rounds(Chain((DGC(ratio=0.1), NoDefense())))
    setting = Setting(batch_size=2)
    module = initialise(registry.build("models", "mlp", {"widths": (8,)}), (1, 8, 8), 10, 0)
    network = client.client_network(module, DGC(), setting)
    images = torch.rand(2, 4, 2, 1, 8, 8, generator=seeded())[1]
    forgetful = client.send(
        network, images, torch.arange(8).view(4, 2), 10, DGC(ratio=0.1), setting, 8, [5, 6, 7, 8], memories=None
    )
    assert first.memories[0] is not None
    assert any(not torch.equal(tensor, forgetful.message[name]) for name, tensor in second.message.items())
    # After a sketch censor asks for the loss of what the server decodes: a candidate that lowers it is sent.
    update_ = update()
    chain = Chain((RandomK(ratio=0.5), Censor(trials=20, lr=1.0)))
    public = chain.public(update_, 1, seeded())
    seen: list[Update] = []

    def loss(step: Update) -> torch.Tensor:
        seen.append(step)
        return torch.stack([tensor.double().sum() for tensor in step.values()]).sum()

    message = chain.release(update_, public, seeded(), loss)
    assert len(seen) == 21 and all(step["a"].shape == (6, 5) for step in seen)
    decoded = chain.decode(message, public)
    assert float(loss({name: -tensor for name, tensor in decoded.items()})) == pytest.approx(
        min(float(torch.stack([t.double().sum() for t in step.values()]).sum()) for step in seen[:21]), rel=1e-5
    )


def test_what_needs_the_loss_cannot_come_before_clipping() -> None:
    @dataclass(frozen=True, kw_only=True)
    class _Choosy(Defense):
        family = "noise"
        reference = "test"

        def release(self, update, public, generator, loss):  # type: ignore[no-untyped-def]
            return update

    with pytest.raises(GradleakError, match="_Choosy needs the client's loss or memory"):
        Chain((_Choosy(), GaussianNoise()))


def test_a_chain_of_three_keeps_its_order() -> None:
    members = (Sketch(ratio=0.5), RandomK(ratio=0.5), TopK(ratio=0.5))
    chain = Chain(members)
    public = chain.public(update(), 1, seeded())
    sent = update()
    for index, member in enumerate(members):
        own = {name.removeprefix(f"{index} "): t for name, t in public.items() if name.startswith(f"{index} ")}
        sent = member.protect(sent, own, seeded())
    torch.testing.assert_close(chain.protect(update(), public, seeded()), sent)
    decoded = chain.decode(sent, public)
    assert {name: tensor.shape for name, tensor in decoded.items()} == {n: t.shape for n, t in update().items()}
    # The middle one decodes into sketches, which the first turns into updates: the other order has other shapes.
    inner = members[1].decode(sent, {name.removeprefix("1 "): t for name, t in public.items() if name[0] == "1"})
    outer = members[0].decode(inner, {name.removeprefix("0 "): t for name, t in public.items() if name[0] == "0"})
    torch.testing.assert_close(decoded, outer)


def test_members_change_the_model_and_encode_in_order() -> None:
    images, targets = torch.rand(2, 1, 4, 4, generator=seeded()), torch.eye(10)[:2]
    for members in ((_Smoothing(), _Darkening()), (_Darkening(), _Smoothing())):
        first, second = members
        expected = second.encode(*first.encode(images, targets, seeded()), seeded())
        for mine, right in zip(Chain(members).encode(images, targets, seeded()), expected, strict=True):
            torch.testing.assert_close(mine, right)
    module = initialise(registry.build("models", "mlp", {"widths": (8, 8)}), (1, 4, 4), 10, 0)
    precode, soteria = registry.build("defenses", "precode"), registry.build("defenses", "soteria")
    both = Chain((precode, soteria)).prepare_model(module)
    apart = soteria.prepare_model(precode.prepare_model(module))
    assert [*both.state_dict()] == [*apart.state_dict()]


def test_targets_that_an_encoding_changes_for_certain_are_known() -> None:
    labels = torch.eye(10)[:3]
    soft = 0.5 * labels + 0.05
    torch.testing.assert_close(_Smoothing().soft_targets(labels), soft)
    assert _Smoothing().softens and _Smoothing().is_adaptive_target
    torch.testing.assert_close(View(_Smoothing(), None).soft_targets(labels), soft)
    torch.testing.assert_close(Chain((_Smoothing(), NoDefense())).soft_targets(labels), soft)
    twice = Chain((_Smoothing(), _Smoothing()))
    torch.testing.assert_close(twice.soft_targets(labels), _Smoothing().soft_targets(soft))
    assert twice.softens and not Chain((NoDefense(), NoDefense())).softens
    # Images that are changed too, or targets that are drawn, are for an attack of their own.
    assert torch.equal(_Darkening().soft_targets(labels), labels)
    for name in ("mixup", "instahide", "augmentation"):
        assert not registry.build("defenses", name).softens
