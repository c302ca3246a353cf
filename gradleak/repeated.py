"""Several messages of one client as one: what an attacker has who keeps what it saw."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .defense import Defense, Exposure, GaussianMechanism, Guarantee, Loss, Memory, Message, Public
from .threat import Setting
from .update import Update


@dataclass(frozen=True)
class Repeated(Defense):
    """Sends `rounds` messages of one update: the same images at the same parameters, with new randomness each time.

    That is what an honest server approaches whose steps are small, and the worst case for noise: what is new in a
    round is the noise alone. (Temporal gradient inversion, where the model moves, adds equations beside.) Public and
    private randomness are drawn anew each round, and what a client remembers goes from one message to the next.

    The likelihood of independent messages is the product of theirs, so `nll` is the sum over rounds and `residual`
    has the rows of all. Who knows no defense, or inverts the decoded update in closed form, has the mean of what the
    server decodes, the sufficient statistic of Gaussian noise. A message is a dict with the round before each name;
    `refusal` says which defenses it cannot stand for.
    """

    defense: Defense
    rounds: int

    @property
    def family(self) -> str:  # type: ignore[override]
        """The defense's."""
        return self.defense.family

    @property
    def reference(self) -> str:  # type: ignore[override]
        """The defense's."""
        return self.defense.reference

    @property
    def version(self) -> str:  # type: ignore[override]
        """The defense's."""
        return self.defense.version

    @property
    def counter_attacks(self) -> tuple[str, ...]:  # type: ignore[override]
        """The defense's."""
        return self.defense.counter_attacks

    @property
    def single_round(self) -> bool:  # type: ignore[override]
        """The defense's."""
        return self.defense.single_round

    @property
    def mixes(self) -> bool:  # type: ignore[override]
        """The defense's."""
        return self.defense.mixes

    @property
    def per_example_gradients(self) -> bool:
        """As the defense."""
        return self.defense.per_example_gradients

    @property
    def linear(self) -> bool:  # type: ignore[override]
        """As the defense."""
        return self.defense.linear

    @property
    def prepares(self) -> bool:  # type: ignore[override]
        """As the defense."""
        return self.defense.prepares

    @property
    def publishes(self) -> bool:  # type: ignore[override]
        """As the defense."""
        return self.defense.publishes

    @property
    def simulates(self) -> bool:  # type: ignore[override]
        """Whether a message is not the update itself: of several, always."""
        return True

    @property
    def inspectors(self) -> tuple[Defense, ...]:
        """Those of the defense; each has a threshold of its own."""
        return self.defense.inspectors

    @property
    def additive(self) -> bool:
        """As the defense."""
        return self.defense.additive

    @property
    def cohort(self) -> int:
        """As the defense."""
        return self.defense.cohort

    @property
    def has_likelihood(self) -> bool:  # type: ignore[override]
        """As the defense."""
        return self.defense.has_likelihood

    @property
    def is_adaptive_target(self) -> bool:
        """As the defense."""
        return self.defense.is_adaptive_target

    @property
    def softens(self) -> bool:
        """As the defense."""
        return self.defense.softens

    @property
    def own_run(self) -> Exposure:
        """The defense's."""
        return self.defense.own_run

    def prepare_model(self, module: nn.Module) -> nn.Module:
        """As the defense."""
        return self.defense.prepare_model(module)

    def encode(self, images: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """As the defense, once for all rounds."""
        return self.defense.encode(images, targets, generator)

    def soft_targets(self, targets: Tensor) -> Tensor:
        """As the defense."""
        return self.defense.soft_targets(targets)

    def encode_test(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """As the defense."""
        return self.defense.encode_test(images, generator)

    def private_buffers(self, module: nn.Module, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """As the defense, once for all rounds."""
        return self.defense.private_buffers(module, images, generator)

    def per_example(self, gradient: Update, public: Public) -> Update:
        """As the defense, once for all rounds."""
        return self.defense.per_example(gradient, _of(public, 0))

    def public(self, template: Update, batch_size: int, generator: torch.Generator) -> Public:
        """Draw each round's public randomness."""
        return _joined(self.defense.public(template, batch_size, generator) for _ in range(self.rounds))

    def protect(self, update: Update, public: Public, generator: torch.Generator) -> Message:
        """Protect the update once a round."""
        return _joined(self.defense.protect(update, _of(public, each), generator) for each in range(self.rounds))

    def release(self, update: Update, public: Public, generator: torch.Generator, loss: Loss) -> Message:
        """As a client's first `release_next`."""
        return self.release_next(update, public, generator, loss, None)[0]

    def release_next(
        self, update: Update, public: Public, generator: torch.Generator, loss: Loss, memory: Memory
    ) -> tuple[Message, Memory]:
        """Release once a round, each with what the client kept from the one before."""
        messages = []
        for each in range(self.rounds):
            message, memory = self.defense.release_next(update, _of(public, each), generator, loss, memory)
            messages.append(message)
        return _joined(messages), memory

    def at_round(self, index: int, epoch: int) -> Repeated:
        """Return the repeated defense of that round: all messages are of the same point of a schedule."""
        return Repeated(self.defense.at_round(index, epoch), self.rounds)

    def decode(self, message: Message, public: Public) -> Update:
        """Return the mean of what the server decodes."""
        decoded = [self.defense.decode(_of(message, each), _of(public, each)) for each in range(self.rounds)]
        return {name: torch.stack([update[name] for update in decoded]).mean(0) for name in decoded[0]}

    def simulate(self, update: Update, public: Public) -> Message:
        """Simulate every round's message."""
        return _joined(self.defense.simulate(update, _of(public, each)) for each in range(self.rounds))

    def nll(self, message: Message, simulated: Message, public: Public) -> Tensor:
        """Sum over rounds, which are independent given the update."""
        parts = [
            self.defense.nll(_of(message, each), _of(simulated, each), _of(public, each)) for each in range(self.rounds)
        ]
        return torch.stack(parts).sum()

    def residual(self, message: Message, simulated: Message, public: Public) -> Tensor:
        """The residuals of all rounds, one after another."""
        return torch.cat(
            [
                self.defense.residual(_of(message, each), _of(simulated, each), _of(public, each))
                for each in range(self.rounds)
            ]
        )

    def noise_floor(self, message: Message, public: Public) -> Tensor:
        """Sum over rounds."""
        parts = [self.defense.noise_floor(_of(message, each), _of(public, each)) for each in range(self.rounds)]
        return torch.stack(parts).sum()

    def summary(self, message: Message, public: Public | None) -> Message:
        """Return the mean over rounds where these have equal public randomness; else all of them."""
        known = None if public is None else [_of(public, each) for each in range(self.rounds)]
        if known is None or not all(_equal(known[0], other) for other in known):
            return message
        sent = [_of(message, each) for each in range(self.rounds)]
        return {name: torch.stack([each[name] for each in sent]).mean(0) for name in sent[0]}

    def pack(self, message: Message, public: Public) -> bytes:
        """Encode the first message: bytes are those of one."""
        return self.defense.pack(_of(message, 0), _of(public, 0))

    def bounded_noise(self, setting: Setting) -> GaussianMechanism | None:
        """That of one message."""
        return self.defense.bounded_noise(setting)

    def calibrated(self, setting: Setting, run: Exposure | None = None) -> Repeated:
        """Repeat the defense with the noise that it asks for."""
        return Repeated(self.defense.calibrated(setting, run), self.rounds)

    def guarantee(self, setting: Setting) -> Guarantee | None:
        """Return what holds for all messages together; a defense with an accountant of its own is asked for a run."""
        if self.bounded_noise(setting) is not None:
            return self.defense.guarantee(setting)
        return self.defense.run_guarantee(setting, 1.0, self.rounds)

    def run_guarantee(
        self, setting: Setting, sampling_rate: float | None = None, steps: int | None = None
    ) -> Guarantee | None:
        """As the defense."""
        return self.defense.run_guarantee(setting, sampling_rate, steps)


def repeated(defense: Defense, rounds: int) -> Defense:
    """Return a defense that sends so many messages; itself for one."""
    return defense if rounds == 1 else Repeated(defense, rounds)


def refusal(defense: Defense, module: nn.Module, template: Update, images: Tensor, targets: Tensor) -> str | None:
    """Say why several messages of a client are not modelled under a defense, or None.

    Args:
        defense: that of one message.
        module: the client's model.
        template: shaped like an update.
        images: some batch [B, C, H, W].
        targets: its class probabilities [B, classes].
    """
    stream = torch.Generator().manual_seed(0)

    def drew() -> bool:
        return not torch.equal(stream.get_state(), torch.Generator().manual_seed(0).get_state())

    encoded, _ = defense.encode(images, targets, stream)
    defense.private_buffers(module, encoded, stream)
    if drew():
        return "rounds: the defense draws anew what each round's update is of, but a guess has one update"
    publics = [defense.public(template, len(images), stream) for _ in range(2)]
    if defense.per_example_gradients and not _equal(*(defense.per_example(template, public) for public in publics)):
        return "rounds: the defense clips under each round's own public randomness, but a guess has one update"
    if defense.is_adaptive_target:
        _, memory = defense.release_next(template, publics[0], stream, _no_loss, None)
        if memory is not None:
            return "rounds: what the client remembers changes later messages, but the defense models its first"
    return None


def _no_loss(step: Update) -> Tensor:
    return torch.zeros(())


def _equal(one: Update, other: Update) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def _joined(parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{index} {name}": tensor for index, part in enumerate(parts) for name, tensor in part.items()}


def _of(joined: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    prefix = f"{index} "
    return {name.removeprefix(prefix): tensor for name, tensor in joined.items() if name.startswith(prefix)}
