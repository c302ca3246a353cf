"""Control: a random image of the granted generator, of the right class."""

from __future__ import annotations

from dataclasses import dataclass

from gradleak import labels as label_rules
from gradleak.attack import Attack, Reconstruction
from gradleak.seeds import Generators
from gradleak.threat import Knowledge, Labels, Observation
from gradleak.update import one_hot

from ._latent import granted


@dataclass(frozen=True, kw_only=True)
class GeneratorSample(Attack):
    """Answers a random code's image of the granted or inferred class: what the generator is worth by itself."""

    family = "control"
    reference = "gradleak"
    needs = Knowledge(labels=Labels.INFERRED, generator=True)

    label_rule: str = "auto"
    """Rule in `gradleak.labels` for labels that are not granted."""

    def reconstruct(self, observation: Observation, generator: Generators) -> Reconstruction:
        """Return one random image a victim image, [N, B, C, H, W]."""
        model, batch_size = granted(observation), observation.batch_size
        labels = observation.labels
        if labels is None:
            labels = label_rules.infer(observation.gradient, observation.classes, batch_size, rule=self.label_rule)
        targets = model.condition(one_hot(labels, observation.classes, observation.dtype)).flatten(0, 1)
        code = {name: t.flatten(0, 1) for name, t in model.code(lambda n: generator.normal(batch_size, n)).items()}
        return Reconstruction(images=model(code, targets).unflatten(0, (-1, batch_size)), labels=labels)
