"""Quantum relaxation: search over encoding angles, each on its own, and unwrap the phase afterwards."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge
from torch import nn

from gradleak.attack import GradientMatching, Reconstruction
from gradleak.defense import Defense
from gradleak.engine import loop
from gradleak.engine.optimisers import Variables
from gradleak.engine.problem import Facts, Guess, Problem, take
from gradleak.engine.restarts import Restarts
from gradleak.mechanisms.quantum import TURN, AngleEncoded
from gradleak.seeds import Generators
from gradleak.threat import Knowledge, Labels, Level, Observation, Setting


@dataclass(frozen=True, kw_only=True)
class QuantumRelaxation(GradientMatching):
    """Matches over free encoding angles, unwraps them to features, and picks the restart by the images' loss.

    References: this benchmark's answer to Kumar et al., arXiv:2309.13002, whose hardness comes from the high
    frequencies that one feature meets; an angle of its own meets frequency one, and higher frequencies then add
    precision. Heredge et al., arXiv:2405.08801, read the features from the registers in the same way. For
    models that are `gradleak.mechanisms.quantum.AngleEncoded`. Features are spread over their areas, so images are as
    coarse as the encoding's pooling.
    """

    reference = "arXiv:2309.13002"
    needs = Knowledge(labels=Labels.INFERRED, defense=Level.PARAMETERS)
    tuning = "lr, iterations, restarts: 7 trials on up to 8 tuning victims of digits, degrees 2 and 4: none better"

    objective: str = "relative-squared"
    schedule: Literal["constant", "step", "cosine"] = "cosine"
    iterations: Annotated[int, Ge(1)] = 300
    restarts: Annotated[int, Ge(1)] = 60
    boxed: bool = False

    def unsuited(self, module: nn.Module, setting: Setting, defense: Defense) -> str | None:
        """Say why the model has no angles to free, or None."""
        if not isinstance(module, AngleEncoded):
            return "the model does not encode images as angles"
        return super().unsuited(module, setting, defense)

    def initial(self, observation: Observation, generator: Generators) -> Variables:
        """Uniform angles in turns, [N, B, m, ...]."""
        like = next(iter(observation.network.parameters.values()))
        images = like.new_zeros(observation.batch_size, *observation.shape)
        return {"turns": generator.uniform(*self._model(observation).angles(images).shape)}

    def relaxed(self, problem: Problem) -> Problem:
        """Return the same matching with angles, in turns in [0, 1), in the place of images."""
        model = problem.network.module
        assert isinstance(model, AngleEncoded)
        return dataclasses.replace(
            problem,
            network=dataclasses.replace(problem.network, module=model.on_angles()),
            decode=self._decode,
            penalty=lambda guess, variables, facts: guess.images.new_zeros(()),
        )

    def reconstruct(self, observation: Observation, generator: Generators) -> Reconstruction:
        """Minimise from every restart and return each victim's restart whose image has the lowest loss."""
        compute, restarts = observation.compute, Restarts(generator, self.restarts)
        problem, facts = self.problem(observation), self.facts(observation)
        relaxed = self.relaxed(problem)
        start, owner = restarts.start(lambda stream: self.begin(observation, stream)), restarts.owner
        outcome = loop.minimise(relaxed, start, facts, owner, self.plan(observation), compute)
        known = take(facts, owner)
        final = loop.finish(relaxed, outcome.variables, known, compute.width)
        angles = TURN * final.images
        images = self._model(observation).images(angles.flatten(0, 1), observation.shape)
        images = images.unflatten(0, angles.shape[:2])
        rows = {"images": images, "targets": final.targets, "buffers": final.buffers}
        exact = loop.evaluate(problem, rows, known, compute.width)
        return self._pick(outcome, dataclasses.replace(final, images=images, matching=exact), restarts)

    def _model(self, observation: Observation) -> AngleEncoded:
        module = observation.network.module
        assert isinstance(module, AngleEncoded)
        return module

    def _decode(self, variables: Variables, facts: Facts) -> Guess:
        turns = variables["turns"]
        return Guess(turns - turns.detach().floor(), facts.targets)
