"""For tests of attacks and defenses: a few victims, what is seen of them, and how much of them comes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import registry
from .attack import Attack, Reconstruction
from .contract import check, check_file
from .dataset import Data
from .defense import Defense
from .evaluation import metrics
from .federation import client
from .federation.observation import observe
from .model import initialise
from .reconstruction import complete
from .seeds import Generators
from .threat import Compute, Knowledge, Labels, Level, Observation, Setting
from .update import Network


def digits(victims: int = 2, batch_size: int = 1) -> tuple[Tensor, Tensor]:
    """Images [N, B, 1, 8, 8] in [0, 1] and labels [N, B] of the first tuning victims of digits.

    >>> images, labels = digits(victims=2, batch_size=3)
    >>> tuple(images.shape), tuple(labels.shape)
    ((2, 3, 1, 8, 8), (2, 3))
    """
    return Data(registry.build("datasets", "digits"), "digits").victims(victims, batch_size, tuning=True)


def model(name: str, shape: tuple[int, int, int] = (1, 8, 8), classes: int = 10, **options: Any) -> nn.Module:
    """Return a model with its initial weights of seed 0."""
    return initialise(registry.build("models", name, options), shape, classes, 0)


@dataclass(frozen=True)
class Scene:
    """Victims who have sent their messages."""

    network: Network
    """As the clients run it."""
    defense: Defense
    setting: Setting
    images: Tensor
    """[N, B, C, H, W]; no attack may see them."""
    labels: Tensor
    """[N, B]."""
    classes: int
    sent: client.Sent

    @classmethod
    def of(
        cls,
        module: nn.Module,
        images: Tensor,
        labels: Tensor,
        defense: Defense | None = None,
        setting: Setting | None = None,
        classes: int = 10,
        seed: int = 0,
    ) -> Scene:
        """Let clients send their messages.

        Args:
            module: the model before the defense changes it.
            images: [N, B, C, H, W] in [0, 1].
            labels: [N, B].
            defense: by default none.
            setting: by default one gradient in float64.
            classes: number of classes.
            seed: of the round's public randomness; a client's private randomness follows its number.
        """
        guard: Defense = defense or registry.build("defenses", "none")
        how = setting or Setting(batch_size=images.shape[1], precision="float64")
        network, images = client.client_network(module, guard, how), images.to(how.dtype)
        sent = client.send(network, images, labels, classes, guard, how, seed, list(range(len(images))))
        return cls(network, guard, how, images, labels, classes, sent)

    def observe(
        self,
        level: Level | str = Level.OBLIVIOUS,
        labels: Labels | str = Labels.KNOWN,
        compute: Compute | None = None,
        network: Network | None = None,
        **granted: Any,
    ) -> Observation:
        """Return what an attacker sees.

        Args:
            level: of knowledge of the defense.
            labels: what is known of the labels.
            compute: how the attack may compute.
            network: what the attacker takes for the clients' network; by default that.
            granted: further arguments of `gradleak.federation.observation.observe`, or fields of `Knowledge`.
        """
        known = {name: granted.pop(name) for name in ("batch_norm", "local_training") if name in granted}
        auxiliary = granted.get("auxiliary") is not None
        knowledge = Knowledge(labels=Labels(labels), defense=Level(level), auxiliary=auxiliary, **known)
        channels, height, width = self.images.shape[2:]
        return observe(
            self.sent,
            network or self.network,
            self.defense,
            self.setting,
            (channels, height, width),
            self.labels,
            self.classes,
            knowledge,
            compute=compute,
            **granted,
        )

    def psnr(self, answer: Reconstruction) -> Tensor:
        """Mean PSNR [N] in dB of each victim's images, guesses assigned to them as the evaluator does."""
        return psnr(answer.images, self.images)


def reconstruct(attack: str | Attack, observation: Observation, **options: Any) -> Reconstruction:
    """Let an attack answer, and hold it to the contract.

    Args:
        attack: itself, or its name.
        observation: of N victims.
        options: of a named attack.

    Raises:
        PluginError: the answer is none to this observation.
    """
    plugin: Attack = registry.build("attacks", attack, options) if isinstance(attack, str) else attack
    streams = Generators([("victim", index) for index in range(observation.victims)], dtype=observation.dtype)
    return complete(plugin.reconstruct(observation, streams), plugin, observation)


def psnr(guesses: Tensor, images: Tensor) -> Tensor:
    """Mean PSNR [N] in dB of each victim's images [N, B, C, H, W], guesses assigned to them as the evaluator does.

    >>> images, _ = digits()
    >>> bool((psnr(images, images) > 99).all())
    True
    """
    pairs = zip(guesses, images, strict=True)
    return torch.stack([metrics.psnr(guess[metrics.assign(guess, truth)], truth).mean() for guess, truth in pairs])


def recovers_more_than(decibels: float, answer: Reconstruction, images: Tensor) -> None:
    """Assert that every victim's images [N, B, C, H, W] come back with a mean PSNR of more than so many dB."""
    found = psnr(answer.images, images)
    assert bool((found > decibels).all()), f"PSNR of {[round(value, 2) for value in found.tolist()]} dB"


def tells_more(knowing: Tensor, blind: Tensor, decibels: float) -> None:
    """Assert that what one attack recovers [N] is on average so many dB above another's [N]."""
    gain = float((knowing - blind).mean())
    assert gain > decibels, f"{gain:.2f} dB more"


__all__ = ["Scene", "check", "check_file", "digits", "model", "psnr", "reconstruct", "recovers_more_than", "tells_more"]
