"""The Defense contract: a channel from update to message, and its public view.

A defense writes its maths for ONE victim; client and engine stack it. Everything that `simulate` and `nll`
read must be torch operations that vmap and double backward understand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .engine.closed_forms import ClosedForm
from .engine.residuals import relative_difference
from .knowledge import BatchNorm, Setting
from .options import Options
from .privacy import Exposure, GaussianMechanism, Guarantee
from .update import Update

__all__ = ["Defense", "Exposure", "GaussianMechanism", "Guarantee", "Loss", "Memory", "Message", "Public", "View"]

Message = dict[str, Tensor]
"""What travels: one tensor or several, as many and of whatever shape the defense likes."""

Public = dict[str, Tensor]
"""The public randomness of a round: the same for every client of it, known to the server."""

Loss = Callable[[Update], Tensor]
"""A client's loss after a step from its parameters, a scalar."""

Memory = Any
"""What a client keeps from one of its messages to the next; None before its first."""


@dataclass(frozen=True, kw_only=True)
class Defense(Options):
    """A defense; a plugin implements `protect`, and `simulate` or `nll` so that it can be attacked adaptively.

    What others go by (`linear`, `simulates`, `has_likelihood`, `prepares`, `publishes`, `additive`,
    `per_example_gradients`) a class declares beside the methods that it brings, as an attribute or, where it depends on
    options, as a property; `gradleak check` holds it to that.
    """

    family: ClassVar[str]
    """noise, compression, sketch, representation, data, model, aggregation, detection, none."""
    reference: ClassVar[str]
    version: ClassVar[str] = "1"
    """Raised whenever results change, so that old cells are not taken for new ones."""
    counter_attacks: ClassVar[tuple[str, ...]] = ()
    """Names of attacks made to defeat this defense."""
    single_round: ClassVar[bool] = False
    """Whether messages mean something in the attacked round only, so that no model can be trained from them."""
    linear: ClassVar[bool] = True
    """Whether `protect` is `simulate` and linear, so that it may act on each example before averaging."""
    simulates: ClassVar[bool] = False
    """Whether `simulate` may change an update."""
    has_likelihood: ClassVar[bool] = False
    """Whether `nll` is there, the defense's own matching objective."""
    prepares: ClassVar[bool] = False
    """Whether `prepare_model` may return another model, which is then trained and attacked under its own weights."""
    publishes: ClassVar[bool] = False
    """Whether `public` may return anything: an attacker who knows only its parameters cannot simulate it then."""
    mixes: ClassVar[bool] = False
    """Whether `encode` makes an image out of several, so that clipping gradients bounds no single example's share."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Where a class brings a method and does not say what it is, assume the least: not linear, or changing."""
        super().__init_subclass__(**kwargs)
        for method, (fact, assumed) in _ASSUMED.items():
            if _rank(cls, method) < _rank(cls, fact):
                setattr(cls, fact, assumed)
        if any(_rank(cls, method) < _rank(cls, "closed_form") for method in ("per_example", "simulate", "nll")):
            cls.closed_form = Defense.closed_form  # type: ignore[method-assign]

    def inspect(self, module: nn.Module, template: nn.Module, images: Tensor, targets: Tensor) -> float:
        """Return how suspicious the model looks that a client was sent; above a threshold the client sends nothing.

        The threshold is what honest models reach (`false_alarms`).

        Args:
            module: as it was sent, in eval mode.
            template: the agreed architecture, with initial weights of its own.
            images: of the client, [B, C, H, W].
            targets: class probabilities of the client, [B, classes].
        """
        return 0.0

    @property
    def false_alarms(self) -> float:
        """Share of honest models that the threshold of `inspect` may refuse, in [0, 1)."""
        return 0.0

    @property
    def inspectors(self) -> tuple[Defense, ...]:
        """Itself, or members, that look at the model."""
        return (self,) if type(self).inspect is not Defense.inspect else ()

    @property
    def per_example_gradients(self) -> bool:
        """Whether `per_example` must see each example's own gradient."""
        return False

    def prepare_model(self, module: nn.Module) -> nn.Module:
        """Return the model that clients train: `module` itself, or a changed copy (dropout sites, bottleneck)."""
        return module

    def encode(self, images: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the images [B, C, H, W] and class probabilities [B, classes] that the client trains on."""
        return images, targets

    def soft_targets(self, targets: Tensor) -> Tensor:
        """Return the class probabilities that a client trains on whose labels are `targets` [B, classes].

        A matching attack that knows the defense asks it. By default what `encode` makes of them if it draws nothing
        and leaves images alone (label smoothing), else `targets`; override it where `encode` cannot be tried on
        images [B, 1, 8, 8].
        """
        if type(self).encode is Defense.encode:
            return targets
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(len(targets), 1, 8, 8, generator=generator).to(targets)
        before = generator.get_state()
        try:
            encoded, soft = self.encode(images.clone(), targets.clone(), generator)
        except Exception:  # Encodings that need other images, or several, are not of targets alone.
            return targets
        alone = encoded.shape == images.shape and torch.equal(encoded, images)
        return soft if alone and torch.equal(generator.get_state(), before) else targets

    def encode_test(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the images [K, C, H, W] as the trained model must be given them. Default: as they are."""
        return images

    def private_buffers(self, module: nn.Module, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw the model's private randomness for one update, as buffers [B, ...] to run it with (dropout masks)."""
        return {}

    @property
    def additive(self) -> bool:
        """Whether the mean of several clients' messages is the message of their mean update, up to noise."""
        return self.linear

    @property
    def cohort(self) -> int:
        """Number of clients whose messages reach the server as one mean."""
        return 1

    def per_example(self, gradient: Update, public: Public) -> Update:
        """Change one example's gradient before averaging; differentiable. Used if `per_example_gradients`."""
        return gradient

    def public(self, template: Update, batch_size: int, generator: torch.Generator) -> Public:
        """Draw the public randomness of a round for updates shaped like `template`, and what follows from B."""
        return {}

    def protect(self, update: Update, public: Public, generator: torch.Generator) -> Message:
        """Return the message that one client sends; `generator` is its private randomness.

        The default sends the update as it is, for defenses that change the model or the data.
        """
        return update

    def release(self, update: Update, public: Public, generator: torch.Generator, loss: Loss) -> Message:
        """Return the message, with the client's loss at hand; what `client` calls. Default: `protect`."""
        return self.protect(update, public, generator)

    def release_next(
        self, update: Update, public: Public, generator: torch.Generator, loss: Loss, memory: Memory
    ) -> tuple[Message, Memory]:
        """Return the next message of a client that trains over many rounds, and its memory. Default: `release`."""
        return self.release(update, public, generator, loss), memory

    def at_round(self, index: int, epoch: int) -> Defense:
        """Return the defense as it is in a round of training and its epoch, from 0, for what follows a schedule."""
        return self

    def decode(self, message: Message, public: Public) -> Update:
        """Return the update that the server applies, shaped like the model's parameters."""
        return message

    def simulate(self, update: Update, public: Public) -> Message:
        """Return a guessed update in message space, differentiably: `protect` without its private randomness."""
        return update

    def nll(self, message: Message, simulated: Message, public: Public) -> Tensor:
        """Return minus the log-likelihood of the message, a scalar up to scale and constant.

        Leave it out where the attack's own distance in message space is the right objective.
        """
        raise NotImplementedError

    def closed_form(self, public: Public) -> ClosedForm | None:
        """Return what `per_example`, `simulate` and `nll` are together, if that is a form which the engine knows.

        It is computed much faster then. These methods stay what a form is compared with; a class that overrides one of
        them and not this has none.
        """
        return None

    def residual(self, message: Message, simulated: Message, public: Public) -> Tensor:
        """Return by how much a guess misses the message, [K]; second-order attacks minimise its squared norm.

        Where the noise has a known law: differences over their standard deviation, so of unit variance at the truth,
        and `noise_floor`. The default, for messages without noise: differences relative to the message's norm.
        """
        return relative_difference(simulated, message)

    def noise_floor(self, message: Message, public: Public) -> Tensor:
        """Return the expected squared norm of `residual` at the truth, a scalar; 0 without noise, but for rounding."""
        return next(iter(message.values())).new_zeros(())

    def summary(self, message: Message, public: Public | None) -> Message:
        """Return what an attack that learns should read of messages [M, ...]. Default: all of them."""
        return message

    def pack(self, message: Message, public: Public) -> bytes:
        """Encode a message as it travels; its length is the price in bytes. Default: dense float32."""
        return b"".join(tensor.detach().float().cpu().numpy().tobytes() for tensor in message.values())

    def bounded_noise(self, setting: Setting) -> GaussianMechanism | None:
        """Return the Gaussian mechanism that a message is, from which guarantees are computed; None for none."""
        return None

    def calibrated(self, setting: Setting, run: Exposure | None = None) -> Defense:
        """Return the defense with the noise that a wanted guarantee over a training run takes. Default: itself."""
        return self

    @property
    def own_run(self) -> Exposure:
        """How often a training run exposes an example, if nobody says otherwise."""
        return Exposure()

    def guarantee(self, setting: Setting) -> Guarantee | None:
        """Return what holds for all that an attacker of this setting sees of one example; None for no guarantee.

        That is the message, or all of the setting's `rounds`; where the batch's own statistics are granted, which have
        no noise, nothing holds.
        """
        mechanism = self.bounded_noise(setting)
        if mechanism is None or setting.grants.batch_norm is BatchNorm.BATCH:
            return None
        return mechanism.guarantee(Exposure(setting.rounds))

    def run_guarantee(
        self, setting: Setting, sampling_rate: float | None = None, steps: int | None = None
    ) -> Guarantee | None:
        """Return what holds for a whole training run; None for no guarantee.

        Args:
            setting: how the clients train.
            sampling_rate: probability that an example takes part in a step; unset, the defense's own.
            steps: how many messages an example may take part in; unset, the defense's own.
        """
        mechanism, own = self.bounded_noise(setting), self.own_run
        if mechanism is None:
            return None
        return mechanism.guarantee(Exposure(steps or own.messages, sampling_rate or own.sampling_rate))

    @property
    def is_adaptive_target(self) -> bool:
        """Whether knowing the defense changes what a matching attack does."""
        return self.simulates or self.per_example_gradients or self.has_likelihood or self.softens

    @property
    def softens(self) -> bool:
        """Whether the client trains on other class probabilities than its labels, in a way that is known."""
        labels = torch.eye(4)
        return not torch.equal(self.soft_targets(labels), labels)


_ASSUMED = {
    "protect": ("linear", False),
    "simulate": ("simulates", True),
    "nll": ("has_likelihood", True),
    "prepare_model": ("prepares", True),
    "public": ("publishes", True),
}
"""What is assumed of a class that brings a method and declares nothing about it."""


def _rank(cls: type, name: str) -> int:
    """How far up a class's ancestors a name is defined."""
    return next(index for index, parent in enumerate(cls.__mro__) if name in vars(parent))


@dataclass(frozen=True)
class View:
    """What an attacker knows of a defense: its parameters, and from level `public` on the round's randomness."""

    defense: Defense
    public: Public | None

    @property
    def complete(self) -> bool:
        """Whether the message can be simulated."""
        return self.public is not None

    def soft_targets(self, targets: Tensor) -> Tensor:
        """Return the class probabilities [B, classes] that a client with guessed labels trains on."""
        return self.defense.soft_targets(targets)

    def per_example(self, gradient: Update) -> Update:
        """Return one example's guessed gradient as the client changes it before averaging."""
        return self.defense.per_example(gradient, self._public())

    def simulate(self, update: Update) -> Message:
        """Return a guessed update in message space."""
        return self.defense.simulate(update, self._public())

    def nll(self, message: Message, simulated: Message) -> Tensor:
        """Minus the log-likelihood of a message."""
        return self.defense.nll(message, simulated, self._public())

    def closed_form(self) -> ClosedForm | None:
        """The form of a message's loss, if it has one that the engine knows."""
        return self.defense.closed_form(self._public())

    def residual(self, message: Message, simulated: Message) -> Tensor:
        """By how much a guess misses a message, [K]."""
        return self.defense.residual(message, simulated, self._public())

    def noise_floor(self, message: Message) -> Tensor:
        """Expected squared norm of the residual at the truth, a scalar."""
        return self.defense.noise_floor(message, self._public())

    def summary(self, message: Message) -> Message:
        """What an attack that learns should read of messages [M, ...]."""
        return self.defense.summary(message, self.public)

    def _public(self) -> Public:
        if self.public is None:
            raise ValueError("the public randomness is not known at this level; check `complete` first")
        return self.public
