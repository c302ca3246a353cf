"""SPEAR, and what is behind the encoded images that it finds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from gradleak import structure
from gradleak.attack import Reconstruction
from gradleak.attacks.spear import Spear
from gradleak.defense import Defense
from gradleak.errors import GradleakError
from gradleak.mechanisms.encoding import Encoding
from gradleak.search import labels as label_rules
from gradleak.seeds import Generators
from gradleak.threat import Knowledge, Labels, Level, Observation, Setting

from ._imitation import class_prior

_AMISS = 5e-3
"""How far below 1 rounding may bring the self-check of encoded images that are the right ones."""


@dataclass(frozen=True, kw_only=True)
class DecodedSpear(Spear):
    """Finds the encoded images by SPEAR, their mixed labels from the last layer, and solves for the images behind.

    References: Dimitrov, Baader, Müller, Vechev, NeurIPS 2024, arXiv:2403.03945, for the encoded images; the rest is
    gradleak's own. The gradient of the last layer is linear in p - y, so that known inputs give every soft label, and
    with known labels the weight of every image in a mean. InstaHide's signs follow from the range of pixels, and, where
    public images are granted, from their mean and variance for each class and from their grey levels.
    Images that share a label are told apart by no soft label: of these the sum is found. The loss is SPEAR's, of the
    encoded images; where these fail its self-check, public images, if granted, give the answer: their class's mean.
    """

    reference = "arXiv:2403.03945; decoding: gradleak"
    version = "1"
    ensembles = ("auto-v2",)
    needs = Knowledge(labels=Labels.KNOWN, defense=Level.PARAMETERS)
    adaptive = True
    tuning = "constants of unmixing: 6 trials on 8 tuning victims of digits (mlp) under mixup and instahide"

    def unsuited(self, module: nn.Module, setting: Setting, defense: Defense) -> str | None:
        """It needs what SPEAR needs, a head with a bias, and an encoding that can be undone."""
        if not isinstance(defense, Encoding) or type(defense).recover is Encoding.recover:
            return "needs a defense that mixes images (mixup, instahide)"
        head = structure.of(module).head
        if head.weight is None or head.bias is None or head.layer is None:
            return "needs a last linear layer with a bias, both trained, to read mixed labels from"
        return super().unsuited(module, setting, defense)

    def reconstruct(self, observation: Observation, generator: Generators) -> Reconstruction:
        """Return the images behind SPEAR's, in the order of the labels."""
        assert observation.view is not None and observation.labels is not None
        answer = super().reconstruct(observation, generator)
        head = structure.of(observation.network.module).head
        features = torch.stack([_features(observation, images, head.layer) for images in answer.images])
        gradient = {name: tensor.double() for name, tensor in observation.gradient.items()}
        soft = label_rules.soft(gradient, head, observation.network, features.double())
        encoding = cast(Encoding, observation.view.defense)
        found = []
        for images, mixed, labels in zip(answer.images, soft, observation.labels, strict=True):
            behind = encoding.recover(images, mixed, labels, observation.auxiliary)
            found.append(images if behind is None else behind)
        images = torch.stack(found).nan_to_num(0.5).clamp(0, 1).to(answer.images)
        if observation.auxiliary is not None:
            missed = answer.details["self_check"] < 1 - _AMISS
            images[missed] = class_prior(observation, observation.labels)[missed]
        return replace(answer, images=images, labels=observation.labels)

    def loss(
        self, observation: Observation, images: Tensor, targets: Tensor, buffers: dict[str, Tensor]
    ) -> Tensor | None:
        """None: SPEAR's self-check is of encoded images, which these are not."""
        return None


def _features(observation: Observation, images: Tensor, layer: str | None) -> Tensor:
    """Input of the last layer [B, F] for images [B, C, H, W]."""
    if layer is None:
        raise GradleakError("decoded-spear: the last layer is no module of its own")
    seen: list[Tensor] = []
    network = observation.network
    hook = network.module.get_submodule(layer).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        with torch.no_grad():
            network.logits(images)
    finally:
        hook.remove()
    return seen[0]
