"""Learning to invert: a network that has seen what messages of other images look like."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, Gt
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from gradleak.attack import Attack, Reconstruction
from gradleak.dataset import Images
from gradleak.defense import Defense
from gradleak.engine.loop import Status
from gradleak.engine.optimisers import cosine_decay
from gradleak.seeds import Generators
from gradleak.threat import Compute, Knowledge, Level, Observation, Setting
from gradleak.update import one_hot, stack

from ._imitation import Hashing, channel_of, untold


@dataclass(frozen=True, kw_only=True)
class LTI(Attack):
    """Trains a network from message to images on public images that go through the defense as a client's would.

    References: Wu, Chen, Guo, Weinberger, UAI 2023, arXiv:2210.10880. It learns whatever the defense does, noise
    included, and so is the adaptive attack of last resort. One network serves all victims; it depends on the suite's
    seed, not on which victims there are. Messages are a client's first: it has no memory yet. Images of a batch may
    come in any order: the loss assigns them. Longer messages are hashed with random signs. If the round's public
    randomness is not known, each training message has its own. Deviations: entries are standardised by the training
    messages; layers are narrower, and their number of steps is for small images; the defense acts on the whole batch,
    as it does at a client, not on each image. Labels are not used.
    """

    family = "learned"
    reference = "arXiv:2210.10880"
    version = "2"
    ensembles = ("auto-v1", "auto-v2")
    needs = Knowledge(auxiliary=True, defense=Level.PARAMETERS)
    adaptive = True
    tuning = "first try: 1 setting on 8 tuning victims of digits (lenet) under sign, top-k and gaussian-noise"

    messages: Annotated[int, Ge(1)] = 4096
    """Messages to learn from, each of a random batch of the public images."""
    features: Annotated[int, Ge(1)] = 4096
    """Most entries that the network sees; those of a longer message are hashed to so many."""
    hidden: Annotated[int, Ge(1)] = 512
    """Width of the two hidden layers."""
    epochs: Annotated[int, Ge(1)] = 40
    batch: Annotated[int, Ge(1)] = 64
    """Messages in a step."""
    lr: Annotated[float, Gt(0)] = 1e-3

    def unsuited(self, module: nn.Module, setting: Setting, defense: Defense) -> str | None:
        """It has to do what the client does."""
        if (unknown := untold(setting)) is not None:
            return unknown
        if defense.cohort > 1:
            return "learns from the messages of single clients, which secure aggregation does not show"
        return None

    def reconstruct(self, observation: Observation, generator: Generators) -> Reconstruction:
        """Collect messages, learn, and answer all victims; `details` has the last training loss."""
        assert observation.auxiliary is not None and observation.view is not None
        sent = observation.view.summary(observation.message)
        hashing = Hashing(sent, self.features, generator.shared("hash"), torch.float32)
        rows, images = self._collect(observation, observation.auxiliary, hashing, generator.shared("messages"))
        if images is None:
            return self._too_late(observation)
        spread, mean = torch.std_mean(rows, dim=0, correction=0)
        # Entries that never change say nothing, and what is rounded off would be magnified.
        scale = torch.where(spread > 1e-6 * spread.amax(), 1 / spread, torch.zeros_like(spread))
        loss, network = self._learn((rows - mean) * scale, images, observation, generator)
        if network is None:
            return self._too_late(observation)
        with torch.no_grad():
            answer = network((hashing.shorten(hashing.flat(sent)) - mean) * scale)
        shape = (observation.victims, observation.batch_size, *observation.shape)
        return Reconstruction(
            images=answer.view(shape).to(observation.dtype),
            details={"training_loss": torch.full((observation.victims,), loss)},
        )

    def _collect(
        self, observation: Observation, public: Images, hashing: Hashing, stream: torch.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """Hashed messages [M, features] of random batches, and their images [M, B, C, H, W]; None if time ran out."""
        assert observation.view is not None
        size = observation.batch_size
        rows, truths = [], []
        for _ in range(self.messages):
            if observation.compute.expired:
                return torch.empty(0), None
            index = torch.randint(len(public), (size,), generator=stream)
            images = public.images[index].to(observation.device, observation.dtype)
            targets = one_hot(public.labels[index].to(images.device), observation.classes, images.dtype)
            message = channel_of(observation, size, stream).message(images, targets, stream)
            rows.append(hashing.shorten(hashing.flat(observation.view.summary(stack([message])))))
            truths.append(images.float())
        return torch.cat(rows), torch.stack(truths)

    def _learn(
        self, rows: Tensor, images: Tensor, observation: Observation, generator: Generators
    ) -> tuple[float, nn.Module | None]:
        """Train the network; it is None if time ran out."""
        sizes = [rows.shape[1], self.hidden, self.hidden, images[0].numel()]
        network = _perceptron(sizes, generator.shared("weights")).to(rows.device)
        optimiser = torch.optim.Adam(network.parameters(), lr=self.lr)
        stream = generator.shared("order")
        loss = float("nan")
        for epoch in range(self.epochs):
            if observation.compute.expired:
                return loss, None
            rate = self.lr * float(cosine_decay(torch.tensor(epoch / self.epochs)))
            for group in optimiser.param_groups:
                group["lr"] = rate
            order = torch.randperm(len(rows), generator=stream).to(rows.device)
            total = 0.0
            for index in order.split(self.batch):
                guess = network(rows[index]).view_as(images[index])
                step = F.mse_loss(guess, _ordered(images[index], guess.detach()))
                optimiser.zero_grad()
                step.backward()
                optimiser.step()
                total += float(step.detach()) * len(index)
            loss = total / len(rows)
            _tell(observation.compute, (epoch + 1) / self.epochs, loss)
        return loss, network

    def _too_late(self, observation: Observation) -> Reconstruction:
        shape = (observation.victims, observation.batch_size, *observation.shape)
        blank = torch.full(shape, 0.5, dtype=observation.dtype, device=observation.device)
        return Reconstruction(images=blank, status=[Status.TIMEOUT] * observation.victims)


def _perceptron(sizes: list[int], stream: torch.Generator) -> nn.Sequential:
    """Linear layers with ReLU between them and a sigmoid at the end."""
    layers: list[nn.Module] = []
    for width, out in itertools.pairwise(sizes):
        linear = nn.utils.skip_init(nn.Linear, width, out)
        with torch.no_grad():
            # He et al., arXiv:1502.01852.
            linear.weight.normal_(0, (2 / width) ** 0.5, generator=stream)
            linear.bias.zero_()
        layers += [linear, nn.ReLU()]
    layers[-1] = nn.Sigmoid()
    return nn.Sequential(*layers)


def _ordered(images: Tensor, guess: Tensor) -> Tensor:
    """Images [K, B, C, H, W] of each batch in the order in which they are nearest the guess."""
    if images.shape[1] == 1:
        return images
    cost = (guess[:, :, None] - images[:, None]).square().flatten(3).sum(-1).cpu().numpy()
    order = torch.as_tensor(np.stack([linear_sum_assignment(table)[1] for table in cost]), device=images.device)
    return images.gather(1, order.view(*order.shape, 1, 1, 1).expand_as(images))


def _tell(compute: Compute, share: float, loss: float) -> None:
    if compute.progress is not None:
        compute.progress(share, loss)
