"""Control: the mean of the public images, whatever the message says."""

from __future__ import annotations

from dataclasses import dataclass

from gradleak.attack import Attack, Reconstruction
from gradleak.seeds import Generators
from gradleak.threat import Knowledge, Observation, Setting


@dataclass(frozen=True, kw_only=True)
class MeanImage(Attack):
    """Answers the mean public image for every victim: what knowing nothing is worth."""

    family = "control"
    reference = "gradleak"
    ensembles = ("auto-v2",)
    needs = Knowledge(auxiliary=True)

    def blind(self, setting: Setting) -> bool:
        """Say that no message is read."""
        return True

    def reconstruct(self, observation: Observation, generator: Generators) -> Reconstruction:
        """Return the mean image, [N, B, C, H, W]."""
        assert observation.auxiliary is not None
        mean = observation.auxiliary.images.mean(0).to(observation.device, observation.dtype)
        return Reconstruction(images=mean.repeat(observation.victims, observation.batch_size, 1, 1, 1))
