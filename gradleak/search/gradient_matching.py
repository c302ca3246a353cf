"""GradientMatching, the template that optimisation attacks fill in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from .. import structure
from ..defense import Defense, View
from ..engine import answers, loop
from ..engine.gauss_newton import LevenbergMarquardt
from ..engine.loop import Plan
from ..engine.objectives import OBJECTIVES, weigh
from ..engine.optimisers import LBFGS, SCHEDULES, Adam, Optimiser, Variables
from ..engine.problem import Described, Direct, Facts, Guess, PlainDecode, PlainPenalty, Problem, take
from ..engine.restarts import Restarts, first_to_reach, least
from ..errors import GradleakError, unknown
from ..reconstruction import Attack, Reconstruction
from ..seeds import Generators
from ..threat import Knowledge, Labels, Observation, Setting, rank
from ..update import LocalTraining, Network, Update, one_hot
from . import labels as label_rules
from . import parametrisations, penalties, refinements, scale, second_order
from .presets import PRESETS


@dataclass(frozen=True, kw_only=True)
class GradientMatching(Attack):
    """Searches for images whose simulated update matches the observed one.

    A plugin sets defaults and overrides what differs, all of it for ONE victim: `distance`, `penalty` (the one prior on
    images), `decode`, and `terms` for what it guesses beside images. The engine stacks victims and restarts, and picks
    each victim's restart by `distance` alone, evaluated on the clamped images that are returned.
    """

    family = "optimisation"
    needs = Knowledge(labels=Labels.INFERRED)
    adaptive = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS
    """Named option sets; a suite writes `{preset: NAME}`, and cells keep what it stands for."""

    objective: str = "cosine"
    """Name in `gradleak.engine.objectives`."""
    layer_weights: Literal["equal", "linear", "exp"] = "equal"
    """How much the tensors of an update count, the first most: equally, falling linearly, or by e with each."""
    optimiser: Literal["adam", "lbfgs", "levenberg-marquardt"] = "adam"
    """With levenberg-marquardt the objective is the squared norm of the defense's `residual`, in float64."""
    lr: Annotated[float, Gt(0)] = 0.1
    schedule: Literal["constant", "step", "cosine"] = "step"
    """How the rate falls: not at all, by tenths at 3/8, 5/8 and 7/8 of the iterations, or along a cosine."""
    warm_up: Annotated[int, Ge(0)] = 0
    """Iterations over which the rate rises linearly to what the schedule says."""
    iterations: Annotated[int, Ge(1)] = 1000
    """Steps of the optimiser for each restart."""
    restarts: Annotated[int, Ge(1)] = 1
    """Searches from different starts; the one of least loss is the answer."""
    halving: tuple[Annotated[float, Gt(0), Lt(1)], ...] = field(default=(), metadata={"later": True})
    """Shares of the iterations after which the worse half of a victim's restarts, by matching loss, is given up."""
    signed: bool | Literal["soft"] = False
    """Replace the image gradient by its sign; soft: by tanh(s g) / s with s falling from 1 to 0."""
    boxed: bool = True
    """Clamp images to [0, 1] after every step."""
    space: Literal["normalised", "raw"] = "normalised"
    """Whether pixels are searched in the model's normalised space or in [0, 1]."""
    parametrisation: Literal["pixels", "low-resolution", "deep-prior"] = "pixels"
    """What is searched: pixels, pixels to be enlarged (bicubic), or the weights of an untrained decoder."""
    reduction: Annotated[int, Ge(2)] = 2
    """How many times smaller the side of a low-resolution image is."""
    initialisation: Literal["normal", "uniform", "zeros", "patterned", "class-mean", "public"] = "normal"
    """Start in the space searched: N(0, 1), U(0, 1), zeros, or a tile of 4x4 from N(0, 1), repeated. Where public
    images are granted also their class means, or these and in further restarts the public images of least loss."""
    tv: Annotated[float, Ge(0)] = 0.0
    """Weight of the total variation."""
    tv_form: Literal["anisotropic", "isotropic", "opponents"] = "anisotropic"
    """|dx| + |dy|, their Euclidean norm, or that with the planes R - G, R - B, G - B besides the colours."""
    tv_unit: Literal["loss", "range"] = field(default="loss", metadata={"later": True})
    """range: the weight of the prior on images is in units of what separates, in the matching loss, the mean image from
    the truth, so that one number serves models and defenses of any scale (`gradleak.search.scale`)."""
    features: Annotated[float, Ge(0)] = 0.0
    """Weight of the squared distance between the last layer's inputs and those that its gradient tells of a label."""
    task: Annotated[float, Ge(0)] = 0.0
    """Weight of the model's own loss on the guess."""
    label_rule: str = "auto"
    """Rule in `gradleak.search.labels` for labels that are neither granted nor optimised."""
    tolerance: Annotated[float, Ge(0)] = 0.0
    """A restart whose loss falls below this is finished."""
    patience: Annotated[int, Ge(1)] | None = None
    """A restart that has not improved for so many iterations is finished."""
    class_prior: tuple[Annotated[float, Ge(0)], ...] = field(default=(), metadata={"later": True})
    """Where public images are granted: weights of a Gaussian of the label's public images, one run after another, each
    from where the last ended. Second-order attacks on noise of a known law take 1 instead, the posterior mode."""
    alphabet: bool = field(default=False, metadata={"later": True})
    """Where public images are granted and have at most 256 pixel values: answer with those nearest, if the loss
    does not speak against it."""
    fallback: bool = field(default=False, metadata={"later": True})
    """Where public images are granted: answer with the class means if these explain the message nearly as well: if the
    loss is above half of theirs or, where the noise's law is known, lower by less than so many free pixels give."""
    budget: Literal["fixed", "ceiling"] = field(default="fixed", metadata={"later": True})
    """ceiling: further restarts are made only where none has reached the loss that the truth is expected to have;
    first-order restarts end there. Rows say who has `converged`."""

    def __post_init__(self) -> None:
        """Refuse to give up restarts where they are searched in another way than the template's, and the like."""
        own = type(self).reconstruct is not GradientMatching.reconstruct
        if self.halving and own:
            raise GradleakError(f"halving: {type(self).__name__} needs all of its restarts; leave the option out")
        refinements.refuse(self, own)

    # What a plugin overrides, all for one victim.

    def distance(self, guess: Update, observed: Update) -> Tensor:
        """How far a simulated update is from the observed one, a scalar."""
        if self.objective not in OBJECTIVES:
            raise unknown("objective", self.objective, OBJECTIVES)
        return OBJECTIVES[self.objective](weigh(guess, self.layer_weights), weigh(observed, self.layer_weights))

    def penalty(self, images: Tensor) -> Tensor:
        """Prior on images [B, C, H, W] in [0, 1], a scalar."""
        if not self.tv:
            return images.new_zeros(())
        if self.tv_form == "anisotropic":
            return self.tv * penalties.total_variation(images)
        return self.tv * penalties.smooth_total_variation(images, opponents=self.tv_form == "opponents")

    def terms(self, guess: Guess, variables: Variables, facts: Facts) -> Iterator[Tensor]:
        """Further terms of the loss, scalars, such as a prior on what is guessed beside images. Default: none."""
        yield from ()

    def decode(self, variables: Variables, facts: Facts) -> Guess:
        """Turn one trial's variables into a guess; `facts` has `targets`, if known, and its own `mean` and `std`."""
        if self.parametrisation == "deep-prior":
            images = parametrisations.decoded(variables, _shape(facts))
        else:
            images = variables["pixels"] * facts.own["std"] + facts.own["mean"]
        if self.parametrisation == "low-resolution":
            images = parametrisations.enlarge(images, _shape(facts))
        if "labels" in variables:
            return Guess(images, variables["labels"].softmax(dim=-1))
        return Guess(images, facts.targets)

    def initial(self, observation: Observation, generator: Generators) -> Variables:
        """Initial variables of one restart, stacked over victims [N, ...]."""
        size, (channels, height, width) = observation.batch_size, observation.shape
        if self.parametrisation == "deep-prior":
            variables = parametrisations.decoder(generator, size, observation.shape)
        else:
            small = self.reduction if self.parametrisation == "low-resolution" else 1
            variables = {"pixels": self._start(generator, size, channels, -(-height // small), -(-width // small))}
        if self.needs.labels is Labels.OPTIMISED:
            variables["labels"] = generator.normal(observation.batch_size, observation.classes)
        return variables

    def _start(self, generator: Generators, *shape: int) -> Tensor:
        if self.initialisation == "patterned":
            *front, height, width = shape
            tile = generator.normal(*front, 4, 4)
            return tile.repeat(*(1 for _ in range(tile.ndim - 2)), -(-height // 4), -(-width // 4))[
                ..., :height, :width
            ]
        draw = {"uniform": generator.uniform, "zeros": _zeros(generator)}
        start: Tensor = draw.get(self.initialisation, generator.normal)(*shape)
        return start

    def project(self, variables: Variables, mean: Tensor, std: Tensor) -> None:
        """Bring stacked variables back into their set, in place."""
        if self.boxed and "pixels" in variables:
            torch.clamp(variables["pixels"], min=-mean / std, max=(1 - mean) / std, out=variables["pixels"])

    def new_optimiser(self) -> Optimiser:
        """Optimiser for stacked trials."""
        if self.optimiser == "lbfgs":
            return LBFGS(history=min(LBFGS.history, self.iterations))
        if self.optimiser == "levenberg-marquardt":
            return LevenbergMarquardt()
        return Adam(signs=frozenset({"pixels"}) if self.signed else frozenset(), soft=self.signed == "soft")

    def perturbation(
        self, observation: Observation, generator: Generators
    ) -> Callable[[Variables, Tensor, Tensor], None] | None:
        """What changes stacked variables in place before an iteration (see `Plan.perturb`); one stream a trial."""
        return None

    # What the template does with it.

    def unsuited(self, module: nn.Module, setting: Setting, defense: Defense) -> str | None:
        """Say why labels cannot be inferred where they must be, or what the model lacks for an option."""
        infers = self.needs.labels is Labels.INFERRED and rank(setting.grants.labels) < rank(Labels.COUNTS)
        if infers and not setting.trains.shows_labels:
            return f"label inference reads the gradient of a cross-entropy; {label_rules.GRANT_LABELS}"
        if not (infers or self.features):
            return None
        head = structure.of(module).head
        if self.features and (head.weight is None or head.layer is None):
            return f"features: {structure.NO_HEAD} and whose gradient is sent"
        return label_rules.lacking(head, self.label_rule) if infers else None

    def reconstruct(self, observation: Observation, generator: Generators) -> Reconstruction:
        """Minimise from every restart and return each victim's restart of lowest matching loss."""
        compute = observation.compute
        sharp = second_order.in_double(observation) if self._second_order else observation
        problem, facts = self.problem(sharp), self.facts(sharp)
        restarts = Restarts(generator, self.restarts)
        start, owner = refinements.starts(self, sharp, problem, facts, restarts, generator), restarts.owner
        if self.tv_unit == "range":
            facts = facts.plus(own={"range": scale.ranges(sharp, problem, facts, start, _complete(sharp))})
        plan, perturb = self.plan(sharp), self.perturbation(sharp, restarts.trials("steps"))
        if perturb is not None:
            plan = dataclasses.replace(plan, perturb=perturb)
        self._try(sharp, problem, start, facts, owner)
        weights = self._prior_weights(sharp) if "weight" in facts.own else ()
        outcome, facts, goal = refinements.search(problem, start, facts, owner, plan, compute, weights)
        final = loop.finish(problem, outcome.variables, take(facts, owner), compute.width)
        answer = self._pick(outcome, final, restarts, goal)
        if observation.view is not None and observation.view.defense.softens and facts.knows_labels:
            # What the client trains on need not be largest at the label.
            answer = dataclasses.replace(answer, labels=self.labels(observation))
        return refinements.refine(self, observation, answer, goal)

    def begin(self, observation: Observation, generator: Generators) -> Variables:
        """Initial variables of a restart, [N, ...], with what `initial` returned checked."""
        return answers.stacked(self.initial(observation, generator), observation.victims, self, "initial")

    def _try(self, observation: Observation, problem: Problem, start: Variables, facts: Facts, owner: Tensor) -> None:
        view = _complete(observation)
        likelihood = view is not None and view.defense.has_likelihood
        match = answers.Hook(view.defense, "nll") if view is not None and likelihood else answers.Hook(self, "distance")
        answers.try_first(match, answers.Hook(self, self._penalty), problem, start, facts, owner)

    @property
    def _penalty(self) -> str:
        return "penalty" if type(self).terms is GradientMatching.terms else "terms"

    def _prior(self, observation: Observation) -> Callable[[Guess, Variables, Facts], Tensor]:
        """Everything in a trial's loss but the matching: the hooks' part, then what options add."""
        network, by_class = observation.network, self._by_class(observation)
        layer = structure.of(network.module).head.layer if self.features else None

        def prior(guess: Guess, variables: Variables, facts: Facts) -> Tensor:
            images = guess.images if guess.before is None else guess.before
            total = answers.scalar(self.penalty(images), self, "penalty")
            if self.tv_unit == "range":
                total = total * facts.own["range"]
            for term in self.terms(guess, variables, facts):
                total = total + answers.scalar(term, self, "terms")
            if by_class:
                total = total + refinements.prior_rows(guess, facts).square().sum()
            if self.features:
                assert layer is not None
                inputs = facts.named["inputs"]
                total = total + self.features * penalties.feature_distance(network, layer, guess.images, inputs)
            if self.task:
                total = total + self.task * network.loss(guess.images, guess.targets, buffers=guess.buffers)
            return total

        return prior

    def problem(self, observation: Observation) -> Problem:
        """One trial's loss."""
        view = _complete(observation)
        shape = (observation.batch_size, *observation.shape)
        # Of unknown local steps the guess is one gradient, which a weight difference points away from.
        turned = observation.weight_difference and observation.training.lr is None
        residual = second_order.residual_of(observation, turned) if self._second_order else None

        def match(update: Update, facts: Facts) -> Tensor:
            if residual is not None:
                return residual(update, facts).square().sum()
            if view is None:
                return answers.scalar(self.distance(update, facts.update), self, "distance", update)
            if turned:
                update = {name: -tensor for name, tensor in update.items()}
            defense, message = view.defense, facts.message
            simulated = answers.tensors(view.simulate(update), defense, "simulate")
            answers.differentiable(simulated, defense, "simulate", update)
            return compare(simulated, message)

        def compare(simulated: Update, message: Update) -> Tensor:
            assert view is not None
            if view.defense.has_likelihood:
                return answers.scalar(view.nll(message, simulated), view.defense, "nll", simulated)
            answers.shaped(simulated, message, "the message", view.defense, "simulate", "protect")
            return answers.scalar(self.distance(simulated, message), self, "distance", simulated)

        def decode(variables: Variables, facts: Facts) -> Guess:
            return answers.guess(self.decode(variables, facts), shape, observation.classes, self)

        direct = None if residual is not None or (turned and view is not None) else self._direct(view)
        form = None if view is None or residual is not None or turned else view.closed_form()
        described = match if form is None else Described(match, compare, form, shape[0], self._plain_objective)
        clips = view is not None and view.defense.per_example_gradients
        prior, variation = self._prior(observation), partial(scale.variation, weight=self.tv, unit=self.tv_unit)
        return Problem(
            network=observation.network,
            training=observation.training,
            decode=PlainDecode(decode, _scaled) if self._scales else decode,
            match=described if direct is None else direct,
            penalty=PlainPenalty(prior, variation) if self._varies(observation) else prior,
            per_example=view.per_example if view is not None and clips else None,
            residual=residual,
            prior_residual=_prior_rows if residual is not None and self._by_class(observation) else None,
        )

    @property
    def _scales(self) -> bool:
        """Whether `decode` only scales pixels."""
        own = type(self).decode is not GradientMatching.decode or type(self).initial is not GradientMatching.initial
        return not own and self.parametrisation == "pixels" and self.needs.labels is not Labels.OPTIMISED

    def _varies(self, observation: Observation) -> bool:
        """Whether the prior is total variation or nothing."""
        kind = type(self)
        own = kind.penalty is not GradientMatching.penalty or kind.terms is not GradientMatching.terms
        more = own or self.features or self.task or self._by_class(observation)
        return not more and (not self.tv or self.tv_form == "anisotropic")

    @property
    def _second_order(self) -> bool:
        return self.optimiser == "levenberg-marquardt"

    def _by_class(self, observation: Observation) -> bool:
        """Whether the Gaussians of classes are part of the prior."""
        return bool(self.class_prior) and observation.auxiliary is not None

    def _prior_weights(self, observation: Observation) -> tuple[float, ...]:
        """Weights of the class prior, one run each."""
        return (1.0,) if self._second_order and second_order.is_noisy(observation) else self.class_prior

    def goal(self, observation: Observation) -> Tensor | None:
        """Matching loss [N] that the truth is expected not to exceed; None where that is not known."""
        if self._second_order:
            return second_order.goal(observation)
        view = second_order.known_view(observation)
        likelihood = view is not None and view.defense.has_likelihood
        if likelihood or type(self).distance is not GradientMatching.distance:
            return None
        return second_order.first_order_goal(observation, self.objective)

    @property
    def _plain_objective(self) -> str | None:
        """Name of the distance, if nothing makes it another."""
        changed = type(self).distance is not GradientMatching.distance or self.layer_weights != "equal"
        return None if changed or self.objective not in OBJECTIVES else self.objective

    def _direct(self, view: View | None) -> Direct | None:
        """Matching as a plain comparison, if nothing makes it another."""
        objective = self._plain_objective
        if objective is None or view is None:
            return None if objective is None else Direct(objective, "update")
        plain = not (view.defense.simulates or view.defense.has_likelihood)
        return Direct(objective, "message") if plain else None

    def facts(self, observation: Observation) -> Facts:
        """What is known of each victim, stacked."""
        mean, std = self.coordinates(observation.network)
        victims, view = observation.victims, observation.view
        unrolled = observation.training.lr is not None
        facts = Facts(
            message=observation.message,
            update=observation.update if unrolled else observation.gradient,
            own={
                "mean": mean.expand(victims, *mean.shape),
                "std": std.expand(victims, *std.shape),
                # Of no size: only its shape is a fact.
                "blank": mean.new_empty(victims, 0, *observation.shape),
            },
        )
        if self.needs.labels is not Labels.OPTIMISED:
            labels = self.labels(observation)
            targets = one_hot(labels, observation.classes, observation.dtype)
            if view is not None:
                targets = torch.stack([view.soft_targets(each) for each in targets])
            facts = dataclasses.replace(facts, targets=targets)
            if self.features:
                head = structure.of(observation.network.module).head
                facts = facts.plus(named={"inputs": penalties.told_features(observation.gradient, head, labels)})
        if self.tv_unit == "range":
            facts = facts.plus(own={"range": mean.new_ones(victims)})
        return refinements.with_prior(observation, facts) if self._by_class(observation) else facts

    def labels(self, observation: Observation) -> Tensor:
        """Labels [N, B]: granted ones, or inferred from the decoded update."""
        if observation.labels is not None:
            return observation.labels
        head = structure.of(observation.network.module).head
        return label_rules.infer(observation.gradient, head, observation.batch_size, rule=self.label_rule)

    def plan(self, observation: Observation) -> Plan:
        """How to minimise."""
        mean, std = self.coordinates(observation.network)
        return Plan(
            optimiser=self.new_optimiser,
            rate=self.lr,
            schedule=self.factor,
            iterations=self.iterations,
            tolerance=self.tolerance,
            patience=self.patience,
            goal=self.goal(observation) if self.budget == "ceiling" else None,
            ends_at_goal=not self._second_order,
            halving=self.halving,
            project=lambda variables: self.project(variables, mean, std),
        )

    def factor(self, done: Tensor) -> Tensor:
        """Factor [W] of the rate at shares [W] of the iterations."""
        factor = SCHEDULES[self.schedule](done)
        if self.warm_up:
            factor = factor * ((done * self.iterations + 1) / self.warm_up).clamp(max=1)
        return factor

    def coordinates(self, network: Network) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [C or 1, 1, 1] of the space searched."""
        like = next(iter(network.parameters.values()))
        if self.space == "normalised":
            found = structure.of(network.module)
            if found.mean is not None and found.std is not None:
                return found.mean.to(like), found.std.to(like)
        return like.new_zeros(1, 1, 1), like.new_ones(1, 1, 1)

    def loss(self, observation: Observation, images: Tensor, targets: Tensor, buffers: dict[str, Tensor]) -> Tensor:
        """Matching loss [N] of given batches."""
        if self._second_order:
            observation = second_order.in_double(observation)
            images, targets = images.double(), targets.double()
            buffers = {name: tensor.double() for name, tensor in buffers.items()}
        rows: dict[str, Any] = {"images": images, "targets": targets, "buffers": buffers}
        return loop.evaluate(self.problem(observation), rows, self.facts(observation), observation.compute.width)

    def _pick(
        self, outcome: loop.Outcome, final: loop.Final, restarts: Restarts, goal: Tensor | None = None
    ) -> Reconstruction:
        """Each victim's restart of lowest matching loss, or the first that reached its goal [N]."""
        losses, spent, candidates = (restarts.grid(t) for t in (final.matching, outcome.iterations, final.images))
        best = least(losses)
        if goal is not None:
            best, made = first_to_reach(losses, goal)
            # Restarts after it were made or not as slots were free.
            spent = torch.where(made, spent, 0)
            column = made.view(*made.shape, *(1,) * (candidates.ndim - 2))
            candidates = torch.where(column, candidates, final.images[restarts.picked(best)])
        picked, iterations = restarts.picked(best), spent.sum(0)
        return Reconstruction(
            images=final.images[picked],
            labels=final.targets[picked].argmax(-1),
            loss=final.matching[picked],
            status=[outcome.status[index] for index in picked.tolist()],
            iterations=iterations,
            gradient_evaluations=iterations * self._gradients(final.images[0].numel()),
            candidates=candidates.transpose(0, 1) if self.restarts > 1 else None,
            trace=outcome.trace[picked],
            backend=outcome.backend,
            backend_reason=outcome.reason,
            guessed={name: tensor[picked] for name, tensor in final.buffers.items()},
            details={} if goal is None else {"converged": (final.matching[picked] <= goal).to(final.matching)},
        )

    def _gradients(self, unknowns: int) -> int:
        return LevenbergMarquardt().gradients(unknowns) if self._second_order else self.gradients_per_iteration()

    def gradients_per_iteration(self) -> int:
        """Gradients of the client's model that one iteration computes."""
        return 1


def single_step(training: LocalTraining) -> LocalTraining:
    """Return the FedSGD protocol an attacker assumes who does not know the client's local training."""
    return dataclasses.replace(training, steps=1, batch_size=None, lr=None)


def _complete(observation: Observation) -> View | None:
    """Return what is known of the defense, if that is enough to simulate its messages."""
    view = observation.view
    return view if view is not None and view.complete else None


def _shape(facts: Facts) -> tuple[int, int, int]:
    _, channels, height, width = facts.own["blank"].shape
    return channels, height, width


def _prior_rows(guess: Guess, variables: Variables, facts: Facts) -> Tensor:
    return refinements.prior_rows(guess, facts)


def _scaled(variables: Variables, facts: Facts) -> Guess:
    mean, std = facts.own["mean"][:, None], facts.own["std"][:, None]
    return Guess(variables["pixels"] * std + mean, facts.targets)


def _zeros(generator: Generators) -> Any:
    return lambda *shape: torch.zeros_like(generator.uniform(*shape))
