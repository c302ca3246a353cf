"""Several defenses as one: `sketch + gaussian-noise` in a suite."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from .defense import Defense, Exposure, GaussianMechanism, Guarantee, Loss, Memory, Message, Public
from .errors import GradleakError
from .threat import Setting
from .update import Update


@dataclass(frozen=True)
class Chain(Defense):
    """Runs defenses in order: each one's message is the next one's update.

    Where one acts on each example's gradient (clipping), so do all before it, so that what it bounds is what is
    sent; those must be linear: the order `sketch + gaussian-noise` clips sketches, `gaussian-noise + sketch` sketches
    a noisy mean. A guarantee holds for the chain, as all that follows the noise is post-processing.

    Raises:
        GradleakError: a defense that is not linear comes before one that acts on each example's gradient; secure
            aggregation is not the last, or follows one whose messages do not add up.
    """

    simulates = True

    defenses: tuple[Defense, ...]

    def __post_init__(self) -> None:
        if not self.defenses:
            raise GradleakError("chain: at least one defense is needed")
        for defense in self._each:
            first, then = type(defense).__name__, type(self.defenses[self._start]).__name__
            if not defense.linear:
                raise GradleakError(f"chain: {first} is not linear, so it cannot come before {then}, which clips")
            if _overrides(defense, "release", "release_next"):
                raise GradleakError(
                    f"chain: {first} needs the client's loss or memory, so it cannot come before {then}"
                )
        *before, last = [defense for defense in self.defenses if _acts(defense)] or self.defenses
        for defense in before:
            first, then = type(defense).__name__, type(last).__name__
            if defense.cohort > 1:
                raise GradleakError(f"chain: {first} must come last, as {then} would be the server's own")
            if last.cohort > 1 and not defense.additive:
                raise GradleakError(f"chain: messages of {first} do not add up, so it cannot come before {then}")

    @property
    def family(self) -> str:  # type: ignore[override]
        """The families, in order."""
        return " + ".join(defense.family for defense in self.defenses)

    @property
    def reference(self) -> str:  # type: ignore[override]
        """The references, in order."""
        return " + ".join(defense.reference for defense in self.defenses)

    @property
    def version(self) -> str:  # type: ignore[override]
        """The versions, in order."""
        return " + ".join(defense.version for defense in self.defenses)

    @property
    def counter_attacks(self) -> tuple[str, ...]:  # type: ignore[override]
        """Every member's."""
        return tuple(name for defense in self.defenses for name in defense.counter_attacks)

    @property
    def single_round(self) -> bool:  # type: ignore[override]
        """Whether any member's messages mean something in the attacked round only."""
        return any(defense.single_round for defense in self.defenses)

    @property
    def mixes(self) -> bool:  # type: ignore[override]
        """Whether any member's encoding does."""
        return any(defense.mixes for defense in self.defenses)

    @property
    def publishes(self) -> bool:  # type: ignore[override]
        """Whether any member does."""
        return any(defense.publishes for defense in self.defenses)

    @property
    def per_example_gradients(self) -> bool:
        """Whether any member acts on each example's gradient."""
        return any(defense.per_example_gradients for defense in self.defenses)

    @property
    def linear(self) -> bool:  # type: ignore[override]
        """Whether all members are."""
        return all(defense.linear for defense in self.defenses)

    @property
    def additive(self) -> bool:
        """Whether all members are."""
        return all(defense.additive for defense in self.defenses)

    @property
    def cohort(self) -> int:
        """That of the member that aggregates, if one does."""
        return max(defense.cohort for defense in self.defenses)

    @property
    def has_likelihood(self) -> bool:  # type: ignore[override]
        """Whether the last member that changes messages brings one."""
        return self.defenses[self._last].has_likelihood

    @property
    def is_adaptive_target(self) -> bool:
        """Whether knowing any member changes what a matching attack does."""
        return any(defense.is_adaptive_target for defense in self.defenses)

    @property
    def inspectors(self) -> tuple[Defense, ...]:
        """Members that look at the model; each has a threshold of its own."""
        return tuple(each for defense in self.defenses for each in defense.inspectors)

    def prepare_model(self, module: nn.Module) -> nn.Module:
        """Return the model that all members have changed, in order."""
        for defense in self.defenses:
            module = defense.prepare_model(module)
        return module

    def encode(self, images: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return what all members have encoded, in order."""
        for defense in self.defenses:
            images, targets = defense.encode(images, targets, generator)
        return images, targets

    def soft_targets(self, targets: Tensor) -> Tensor:
        """Return what all members make of guessed labels, in order."""
        for defense in self.defenses:
            targets = defense.soft_targets(targets)
        return targets

    @property
    def softens(self) -> bool:
        """Whether any member does."""
        return any(defense.softens for defense in self.defenses)

    def encode_test(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return what all members have encoded, in order."""
        for defense in self.defenses:
            images = defense.encode_test(images, generator)
        return images

    def private_buffers(self, module: nn.Module, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw every member's private randomness."""
        drawn: dict[str, Tensor] = {}
        for defense in self.defenses:
            drawn |= defense.private_buffers(module, images, generator)
        return drawn

    def public(self, template: Update, batch_size: int, generator: torch.Generator) -> Public:
        """Draw every member's public randomness, for updates shaped like the message of the one before it."""
        public: Public = {}
        # A throwaway stream, as only the shapes of these messages matter.
        private = torch.Generator().manual_seed(0)
        for index, defense in enumerate(self.defenses):
            own = defense.public(template, batch_size, generator)
            template = defense.protect(template, own, private)
            public |= {f"{index} {name}": tensor for name, tensor in own.items()}
        return public

    def per_example(self, gradient: Update, public: Public) -> Update:
        """Change one example's gradient by all members up to the last that does so."""
        for index, defense in enumerate(self._each):
            gradient = defense.simulate(gradient, _own(public, index))
        if self.per_example_gradients:
            gradient = self.defenses[self._start].per_example(gradient, _own(public, self._start))
        return gradient

    def protect(self, update: Update, public: Public, generator: torch.Generator) -> Message:
        """Protect an update whose examples have been through `per_example`, without the client's loss."""
        for index, defense in self._whole:
            update = defense.protect(update, _own(public, index), generator)
        return update

    def release(self, update: Update, public: Public, generator: torch.Generator, loss: Loss) -> Message:
        """As a client's first `release_next`."""
        return self.release_next(update, public, generator, loss, None)[0]

    def release_next(
        self, update: Update, public: Public, generator: torch.Generator, loss: Loss, memory: Memory
    ) -> tuple[Message, Memory]:
        """Release by every member, each with a memory of its own, and the loss of what the server decodes."""
        kept = list(memory or [None] * len(self.defenses))
        for index, defense in self._whole:
            seen = partial(self._loss_of, index, public, loss)
            update, kept[index] = defense.release_next(update, _own(public, index), generator, seen, kept[index])
        return update, None if all(each is None for each in kept) else tuple(kept)

    def _loss_of(self, index: int, public: Public, loss: Loss, step: Update) -> Tensor:
        """Loss after a step that is shaped like the messages before a member."""
        return loss(self._decode(step, public, index))

    def simulate(self, update: Update, public: Public) -> Message:
        """Simulate an update whose examples have been through `per_example`."""
        for index, defense in self._whole:
            update = defense.simulate(update, _own(public, index))
        return update

    def at_round(self, index: int, epoch: int) -> Chain:
        """Return the chain of what every member is in that round."""
        return Chain(tuple(defense.at_round(index, epoch) for defense in self.defenses))

    def decode(self, message: Message, public: Public) -> Update:
        """Decode by every member, last to first."""
        return self._decode(message, public, len(self.defenses))

    def _decode(self, message: Message, public: Public, members: int) -> Update:
        """Decode by the first members, last to first."""
        for index in reversed(range(members)):
            message = self.defenses[index].decode(message, _own(public, index))
        return message

    def nll(self, message: Message, simulated: Message, public: Public) -> Tensor:
        """As the last member that changes messages: it made this one."""
        return self.defenses[self._last].nll(message, simulated, _own(public, self._last))

    def residual(self, message: Message, simulated: Message, public: Public) -> Tensor:
        """As the last member that changes messages."""
        return self.defenses[self._last].residual(message, simulated, _own(public, self._last))

    def noise_floor(self, message: Message, public: Public) -> Tensor:
        """As the last member that changes messages; what members before it added is not known here."""
        return self.defenses[self._last].noise_floor(message, _own(public, self._last))

    def summary(self, message: Message, public: Public | None) -> Message:
        """As the last member that changes messages."""
        return self.defenses[self._last].summary(message, None if public is None else _own(public, self._last))

    def pack(self, message: Message, public: Public) -> bytes:
        """As the last member that changes messages, or as the shares of a sum."""
        aggregating = [index for index, defense in enumerate(self.defenses) if defense.cohort > 1]
        index = max(aggregating, default=self._last)
        return self.defenses[index].pack(message, _own(public, index))

    def bounded_noise(self, setting: Setting) -> GaussianMechanism | None:
        """Return the member's of most noise, where a sum is seen with the noise of all its clients.

        Members after it process what it sent, members before it act on each example before it clips. A sum's noise is
        that of clients who do as they are told; its fixed point is far finer than the noise.
        """
        if self.mixes:
            return None
        found = [each for each in (defense.bounded_noise(setting) for defense in self.defenses) if each is not None]
        if not found:
            return None
        return max(found, key=lambda mechanism: mechanism.multiplier).summed(self.cohort)

    def calibrated(self, setting: Setting, run: Exposure | None = None) -> Chain:
        """Return the chain of members with the noise that they ask for, of a sum with all its clients' together."""

        def seen(defense: Defense) -> Exposure:
            return replace(run or defense.own_run, clients=self.cohort)

        return Chain(tuple(defense.calibrated(setting, seen(defense)) for defense in self.defenses))

    def guarantee(self, setting: Setting) -> Guarantee | None:
        """Return the strongest: the chain's, or that of a member with an accountant of its own."""
        own = [defense.guarantee(setting) for defense in self.defenses if _overrides(defense, "guarantee")]
        return _strongest([super().guarantee(setting), *own])

    def run_guarantee(
        self, setting: Setting, sampling_rate: float | None = None, steps: int | None = None
    ) -> Guarantee | None:
        """Return the strongest: the chain's, or that of a member with an accountant of its own."""
        own = [
            defense.run_guarantee(setting, sampling_rate, steps)
            for defense in self.defenses
            if _overrides(defense, "run_guarantee")
        ]
        return _strongest([super().run_guarantee(setting, sampling_rate, steps), *own])

    @property
    def own_run(self) -> Exposure:
        """That of the member whose noise is accounted for."""
        noisy = [defense.own_run for defense in self.defenses if defense.bounded_noise(Setting()) is not None]
        return next(iter(noisy), Exposure())

    @property
    def _start(self) -> int:
        """The last member that acts on each example's gradient, or the first member."""
        acting = [index for index, defense in enumerate(self.defenses) if defense.per_example_gradients]
        return max(acting, default=0)

    @property
    def _each(self) -> tuple[Defense, ...]:
        """Members that act on each example before the mean."""
        return self.defenses[: self._start]

    @property
    def _whole(self) -> list[tuple[int, Defense]]:
        """Members that act on the mean."""
        return list(enumerate(self.defenses))[self._start :]

    @property
    def _last(self) -> int:
        """The last member that changes messages: one that leaves them alone does not.

        A sum only rounds them, so that the likelihood is that of what comes before.
        """
        changing = [
            index for index, defense in enumerate(self.defenses) if _changes_messages(defense) and defense.cohort == 1
        ]
        return max(changing, default=len(self.defenses) - 1)


def _overrides(defense: Defense, *names: str) -> bool:
    return any(getattr(type(defense), name) is not getattr(Defense, name) for name in names)


def _changes_messages(defense: Defense) -> bool:
    changed = not defense.linear or defense.simulates or defense.has_likelihood
    return changed or _overrides(defense, "release", "release_next", "decode", "pack")


def _acts(defense: Defense) -> bool:
    """Whether a member does anything to an update or its message."""
    return _changes_messages(defense) or defense.per_example_gradients or defense.cohort > 1


def _strongest(guarantees: Iterable[Guarantee | None]) -> Guarantee | None:
    found = [guarantee for guarantee in guarantees if guarantee is not None]
    return min(found, key=lambda guarantee: guarantee.epsilon, default=None)


def _own(public: Public, index: int) -> Public:
    prefix = f"{index} "
    return {name.removeprefix(prefix): tensor for name, tensor in public.items() if name.startswith(prefix)}
