"""Control: a random public image, of the right class where labels are granted."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradleak.attack import Attack, Reconstruction
from gradleak.seeds import Generators
from gradleak.threat import Knowledge, Observation, Setting


@dataclass(frozen=True, kw_only=True)
class RandomImage(Attack):
    """Answers a random public image, of the victim's class if labels are granted: what the class is worth."""

    family = "control"
    reference = "gradleak"
    ensembles = ("auto-v2",)
    needs = Knowledge(auxiliary=True)

    def blind(self, setting: Setting) -> bool:
        """Say that no message is read."""
        return True

    def reconstruct(self, observation: Observation, generator: Generators) -> Reconstruction:
        """Return one random image a victim image, [N, B, C, H, W]."""
        assert observation.auxiliary is not None
        pool = observation.auxiliary
        scores = generator.uniform(observation.batch_size, len(pool))
        if observation.labels is not None:
            same = pool.labels.to(scores.device) == observation.labels[..., None]
            # A class without public images falls back to any image.
            same |= ~same.any(-1, keepdim=True)
            scores = torch.where(same, scores, torch.full_like(scores, -1.0))
        picked = scores.argmax(-1)
        images = pool.images.to(observation.device, observation.dtype)[picked]
        return Reconstruction(images=images, labels=observation.labels)
