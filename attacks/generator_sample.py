"""Control: a random image of the granted generator, of the right class where labels are granted."""

from __future__ import annotations

from dataclasses import dataclass

from gradleak.attack import Attack, Reconstruction
from gradleak.seeds import Generators
from gradleak.threat import Knowledge, Observation, Setting
from gradleak.update import one_hot

from ._latent import granted


@dataclass(frozen=True, kw_only=True)
class GeneratorSample(Attack):
    """Answers a random code's image of the granted class, else of one drawn at random: what a generator is worth.

    A floor: it reads nothing of the message.
    """

    family = "control"
    reference = "gradleak"
    ensembles = ("auto-v2",)
    version = "2"
    needs = Knowledge(generator=True)

    def blind(self, setting: Setting) -> bool:
        """Say that no message is read."""
        return True

    def reconstruct(self, observation: Observation, generator: Generators) -> Reconstruction:
        """Return one random image a victim image, [N, B, C, H, W]."""
        model, batch_size = granted(observation), observation.batch_size
        labels = observation.labels
        if labels is None:
            labels = generator.child("labels").integers(observation.classes, batch_size)
        targets = model.condition(one_hot(labels, observation.classes, observation.dtype)).flatten(0, 1)
        code = {name: t.flatten(0, 1) for name, t in model.code(lambda n: generator.normal(batch_size, n)).items()}
        return Reconstruction(images=model(code, targets).unflatten(0, (-1, batch_size)), labels=labels)
