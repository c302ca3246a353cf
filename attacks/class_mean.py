"""Control: the mean of the public images of the victim's class, whatever else the message says."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from gradleak import structure
from gradleak.attack import Attack, Reconstruction
from gradleak.defense import Defense
from gradleak.search import labels as label_rules
from gradleak.seeds import Generators
from gradleak.threat import Knowledge, Labels, Observation, Setting, rank
from gradleak.update import one_hot


@dataclass(frozen=True, kw_only=True)
class ClassMean(Attack):
    """Answers each class's mean public image, for granted labels or inferred ones: what knowing the class is worth.

    Inferred labels are all that it reads of a message. A class without public images gets the mean of them all.
    """

    family = "control"
    reference = "gradleak"
    ensembles = ("auto-v2",)
    needs = Knowledge(labels=Labels.INFERRED, auxiliary=True)

    def blind(self, setting: Setting) -> bool:
        """Whether labels are granted: else they are read off the message."""
        return rank(setting.grants.labels) >= rank(Labels.COUNTS)

    def unsuited(self, module: nn.Module, setting: Setting, defense: Defense) -> str | None:
        """Say why labels that are not granted cannot be inferred."""
        return None if self.blind(setting) else label_rules.lacking(structure.of(module).head, "auto")

    def reconstruct(self, observation: Observation, generator: Generators) -> Reconstruction:
        """Return the mean image of each label, [N, B, C, H, W]."""
        assert observation.auxiliary is not None
        images = observation.auxiliary.images.to(observation.device, observation.dtype)
        members = one_hot(observation.auxiliary.labels.to(observation.device), observation.classes, observation.dtype)
        counts = members.sum(0)[:, None, None, None]
        means = torch.einsum("mk,mchw->kchw", members, images) / counts.clamp(min=1)
        means = torch.where(counts > 0, means, images.mean(0))
        labels = observation.labels
        if labels is None:
            head = structure.of(observation.network.module).head
            labels = label_rules.infer(observation.gradient, head, observation.batch_size)
        return Reconstruction(images=means[labels], labels=labels)
