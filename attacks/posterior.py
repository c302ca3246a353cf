"""Posterior mean over public images, weighted by how well their messages agree with the one observed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.func import vmap

from gradleak import seeds
from gradleak.attack import Attack, Reconstruction
from gradleak.channel import Channel
from gradleak.dataset import Images
from gradleak.defense import Defense, Message
from gradleak.engine.loop import Status
from gradleak.engine.objectives import relative_squared
from gradleak.seeds import Generators
from gradleak.threat import Knowledge, Level, Observation, Setting
from gradleak.update import one_hot, stack

from ._imitation import class_prior, sorted_labels, summed, untold


@dataclass(frozen=True, kw_only=True)
class Posterior(Attack):
    """Answers the mean of public images, weighted by the likelihood of the message that each would have sent.

    Our own attack: importance sampling (Kahn & Marshall 1953) with public images as draws from the prior. Candidates
    have the victim's labels. The weight of candidate j is exp(-d_j / t), d_j the defense's negative log-likelihood of
    the message given the candidate's (where it has none, their relative squared distance). Likelihoods are known up to
    scale: the temperature t is the one that reconstructs public images best, whose messages are made as a client's.
    So a message that says nothing gets the mean of the class, and one that says everything the nearest public image.
    In a batch the images take turns, each weighed with the others at their present means.
    """

    family = "learned"
    reference = "gradleak"
    ensembles = ("auto-v2",)
    needs = Knowledge(auxiliary=True, defense=Level.PUBLIC)
    adaptive = True
    tuning = "the temperature is chosen on public images in every run; the rest is as first tried"

    candidates: Annotated[int, Ge(2)] = 512
    """Most public images, of the victim's class where labels are known, that a message is compared with."""
    trials: Annotated[int, Ge(2)] = 64
    """Public images or batches on which the temperature is chosen."""
    rounds: Annotated[int, Ge(1)] = 2
    """Turns of each image of a batch; a batch of one takes one."""

    def unsuited(self, module: nn.Module, setting: Setting, defense: Defense) -> str | None:
        """It has to do what the client does."""
        return untold(setting)

    def reconstruct(self, observation: Observation, generator: Generators) -> Reconstruction:
        """Weigh public images; `details` has the effective number of candidates and the temperature."""
        asked = sorted_labels(observation)
        labels = None if asked is None else asked[0]
        bank = _Bank(observation, labels is not None, self.candidates, generator)
        prior = class_prior(observation, labels)
        questions = [
            _Question(
                {key: tensor[victim] for key, tensor in observation.message.items()},
                prior[victim],
                None if labels is None else labels[victim],
                name,
            )
            for victim, name in enumerate(generator.names)
        ]
        try:
            temperature = self._calibrate(bank)
            effective = self._weigh(bank, questions, temperature)
        except _TimeIsUp:
            images, status = prior, [Status.TIMEOUT] * observation.victims
            effective, temperature = prior.new_full((observation.victims,), torch.inf), torch.inf
        else:
            images, status = torch.stack([question.images for question in questions]), []
        if asked is not None:
            images = images.gather(1, asked[1].view(*images.shape[:2], 1, 1, 1).expand_as(images))
        return Reconstruction(
            images=images,
            status=status,
            details={"effective": effective, "temperature": torch.full_like(effective, temperature)},
        )

    def _weigh(self, bank: _Bank, questions: list[_Question], temperature: float) -> Tensor:
        """Put the posterior means into the questions; return the effective number of candidates of the last, [N]."""
        effective = questions[0].images.new_ones(len(questions))
        size = len(questions[0].images)
        for turn in range(size * (self.rounds if size > 1 else 1)):
            slot = turn % size
            for index, (pool, distances) in enumerate(bank.distances(questions, slot)):
                weights = _weights(distances, temperature)
                means = questions[index].images.clone()
                means[slot] = torch.einsum("k,kchw->chw", weights, pool)
                questions[index].images = means
                effective[index] = 1 / weights.square().sum()
        return effective

    def _calibrate(self, bank: _Bank) -> float:
        """The temperature whose posterior means come nearest to public images that are left out of their candidates."""
        questions, truths, slot = *bank.trials(self.trials), 0
        rows = []
        for (pool, distances), truth in zip(bank.distances(questions, slot), truths, strict=True):
            itself = (pool == truth[slot]).flatten(1).all(1)
            rows.append((pool.flatten(1), distances.masked_fill(itself, torch.inf)))
        finite = torch.cat([distances[distances.isfinite()] for _, distances in rows])
        middle = finite.median()
        # What distances differ in by rounding says nothing.
        least = 16 * torch.finfo(finite.dtype).eps * float(middle.abs()) + 1e-30
        unit = float((finite - middle).abs().median())
        wanted = torch.stack([truth[slot].flatten() for truth in truths])
        errors = {}
        for temperature in (torch.inf, *(max(least, unit * 2.0**power) for power in _POWERS)):
            means = torch.stack([_weights(distances, temperature) @ pool for pool, distances in rows])
            errors[temperature] = float((means - wanted).square().mean().nan_to_num(torch.inf))
        return min(errors, key=errors.__getitem__)


def _weights(distances: Tensor, temperature: float) -> Tensor:
    """Weights of candidates [K]; equal ones at an infinite temperature."""
    return torch.where(distances.isfinite(), -distances / temperature, -torch.inf).softmax(0)


_POWERS = range(-24, 13)
"""Powers of two of the temperatures tried, in median deviations of the distances."""


class _TimeIsUp(Exception):
    """The deadline has passed."""


@dataclass
class _Question:
    """A message, and the estimate of its images so far."""

    message: Message
    images: Tensor
    """[B, C, H, W]."""
    labels: Tensor | None
    """[B], ascending, where they are known."""
    name: object
    """What private draws of imitations depend on where images take turns."""


class _Bank:
    """Public images and the messages that they would have sent."""

    def __init__(self, observation: Observation, labelled: bool, most: int, generator: Generators) -> None:
        assert observation.auxiliary is not None and observation.view is not None
        assert observation.view.public is not None
        self.observation, self.view, self.labelled, self.context = observation, observation.view, labelled, generator
        self.channel = Channel(observation.network, self.view.defense, observation.view.public, observation.training)
        public = observation.auxiliary
        device = observation.device
        self.public = Images(public.images.to(device, observation.dtype), public.labels.to(device))
        order = torch.randperm(len(public), generator=generator.shared("candidates")).to(device)
        kinds = range(observation.classes) if labelled else [-1]
        self.members = {kind: order[(self.public.labels[order] == kind) | (kind < 0)][:most] for kind in kinds}

    def trials(self, count: int) -> tuple[list[_Question], list[Tensor]]:
        """Questions made of public images, in batches of ascending labels, and these images [B, C, H, W]."""
        stream = self.context.shared("trials")
        questions, truths = [], []
        for trial in range(count):
            index = torch.randint(len(self.public), (self.observation.batch_size,), generator=stream)
            index = index.to(self.public.labels.device)
            # The image that is asked for is the first, so that the batch is rolled from its order by label.
            batch = self.public[index[self.public.labels[index].argsort(stable=True)]]
            turn = int(torch.randint(len(index), (), generator=stream))
            batch = batch[torch.arange(len(index)).roll(-turn)]
            message = summed(self.channel, batch.images, self._targets(batch.labels), stream)
            prior = torch.stack([self._pool(int(k) if self.labelled else -1).images.mean(0) for k in batch.labels])
            questions.append(_Question(message, prior, batch.labels if self.labelled else None, ("trial", trial)))
            truths.append(batch.images)
        return questions, truths

    def distances(self, questions: list[_Question], slot: int) -> list[tuple[Tensor, Tensor]]:
        """Of each question the candidates [K, C, H, W] for one image, and their distances [K]."""
        if self.observation.batch_size > 1:
            return [self._turn(question, slot) for question in questions]
        found: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0))] * len(questions)
        kinds = [-1 if question.labels is None else int(question.labels) for question in questions]
        for kind in sorted(set(kinds)):
            mine = [index for index, other in enumerate(kinds) if other == kind]
            pool = self._pool(kind)
            messages = stack([questions[index].message for index in mine])
            stream = self.context.shared("imitations", kind)
            rows = self._compare(pool.images[:, None], pool.labels[:, None], messages, stream)
            for index, row in zip(mine, rows, strict=True):
                found[index] = (pool.images, row)
        return found

    def _turn(self, question: _Question, slot: int) -> tuple[Tensor, Tensor]:
        """Candidates for one image of a batch, the others at their present means, and their distances."""
        pool = self._pool(-1 if question.labels is None else int(question.labels[slot]))
        size, own = self.observation.batch_size, pool.labels
        stream = seeds.generator("posterior", question.name, slot)
        known = question.labels
        if known is None:
            known = own[torch.randint(len(own), (size,), generator=stream).to(own.device)]
        labels = known.expand(len(own), size).clone()
        labels[:, slot] = own
        batches = question.images.expand(len(pool), *question.images.shape).clone()
        batches[:, slot] = pool.images
        return pool.images, self._compare(batches, labels, stack([question.message]), stream)[0]

    def _compare(self, images: Tensor, labels: Tensor, messages: Message, stream: torch.Generator) -> Tensor:
        """Distances [Q, K] of messages [Q, ...] to those of batches [K, B, C, H, W], without the noise of clients."""
        clients, defense, view = self.view.defense.cohort, self.view.defense, self.view
        likelihood = view.nll if defense.has_likelihood else lambda sent, guess: relative_squared(guess, sent)
        columns = []
        for batch, kinds in zip(images, labels, strict=True):
            if self.observation.compute.expired:
                raise _TimeIsUp
            parts = zip(batch.chunk(clients), self._targets(kinds).chunk(clients), strict=True)
            sent = stack(
                [
                    defense.simulate(self.channel.update(self.channel.batch(*part, stream)), self.channel.public)
                    for part in parts
                ]
            )
            guess = {name: tensor.mean(0) for name, tensor in sent.items()}
            columns.append(vmap(lambda message, guess=guess: likelihood(message, guess))(messages))
        return torch.stack(columns, dim=1).nan_to_num(torch.inf)

    def _pool(self, kind: int) -> Images:
        """Public images of a class; all where there are none of it."""
        index = self.members[kind]
        return self.public[index] if len(index) else self.public

    def _targets(self, labels: Tensor) -> Tensor:
        return one_hot(labels, self.observation.classes, self.observation.dtype)
