"""R-GAP: one image computed back layer by layer from the gradients of a network without biases."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import grad

from gradleak import structure
from gradleak.attack import Attack, Reconstruction
from gradleak.defense import Defense
from gradleak.engine.objectives import relative_squared
from gradleak.seeds import Generators
from gradleak.structure import Link
from gradleak.threat import Observation, Setting
from gradleak.update import LocalTraining, Update, by_transform, local_update, one_hot

_GRID = 4001  # starting points of the search for the confidence in the label
_RIDGE = 1e-12  # keeps normal equations regular; the refinement undoes it wherever something is determined
_REFINEMENTS = 5
_MEMORY = 2**26  # numbers in the linear systems that are solved together


@dataclass(frozen=True, kw_only=True)
class RGAP(Attack):
    """Recovers each layer's input from two linear systems: its outputs, and its weight gradient.

    References: Zhu and Blaschko, ICLR 2021, arXiv:2010.07733. Going down from a layer's output z and its derivative
    k, the input x solves W * x = z (weight rows) and dL/dW = k * x (gradient rows) by least squares; x and W^T k
    through the inverse of the activation are z and k of the layer below. Deviation: several logits instead of one.
    The last dL/dW = k h^T gives k and h up to one factor, which k = softmax(W h) - y settles: the label's is the one
    negative entry, and the size of k decides both sides.
    The loss is the squared distance of the reconstruction's gradient relative to the observed one's.
    """

    family = "analytic"
    reference = "arXiv:2010.07733"
    ensembles = ("auto-v2",)

    def unsuited(self, module: nn.Module, setting: Setting, defense: Defense) -> str | None:
        """It needs one image and a chain of convolutions and linear layers without biases, leaky ReLUs between."""
        if setting.batch_size != 1:
            return f"needs a batch of 1, not {setting.batch_size}"
        found = structure.of(module)
        if not setting.trains.plain:
            return "needs a client that minimises the plain cross-entropy"
        layers = [module.get_submodule(link.name) for link in found.chain]
        whole = bool(layers) and found.on_pixels[0].whole
        if not whole or not all(_invertible(layer) for layer in layers) or not isinstance(layers[-1], nn.Linear):
            return "needs a chain of convolutions and linear layers without biases, leaky ReLUs between them (cnn6)"
        frozen = {name for link in found.chain for name in _weights(module, link)} - set(found.sent)
        return f"needs the gradients of all layers; {min(frozen)} is not trained" if frozen else None

    def reconstruct(self, observation: Observation, generator: Generators) -> Reconstruction:
        """Go down from the logits; of several possible k, the images of the smallest loss are returned."""
        # With two classes k is along (1, -1) whatever the label; besides the true size of k a tiny one may fit.
        several = itertools.product((1.0, -1.0) if observation.classes == 2 else (1.0,), (0, 1))
        answers = []
        for sign, root in several:
            images, labels = self._descend(observation, sign, root)
            targets = one_hot(labels, observation.classes, observation.dtype)
            answers.append((images, labels, self.loss(observation, images, targets, {})))
        images, labels, losses = (torch.stack(parts) for parts in zip(*answers, strict=True))
        best = losses.nan_to_num(torch.inf).argmin(0)
        victim = torch.arange(observation.victims, device=observation.device)
        return Reconstruction(images=images[best, victim], labels=labels[best, victim], loss=losses[best, victim])

    def _descend(self, observation: Observation, sign: float, root: int) -> tuple[Tensor, Tensor]:
        """Images [N, 1, C, H, W] and labels [N, 1] for one sign and size of the derivatives at the logits."""
        module = observation.network.module
        found = structure.of(module)
        gradient = {name: tensor.double() for name, tensor in observation.gradient.items()}
        own = {name: tensor.double() for name, tensor in observation.network.parameters.items()}
        (last,) = _weights(module, found.chain[-1])
        features, inner, labels = _head(gradient[last], own[last], sign, root)
        inner = inner @ own[last]
        for link in reversed(found.chain[:-1]):
            layer = module.get_submodule(link.name)
            features, inner = features.reshape(-1, *link.above), inner.reshape(-1, *link.above)
            if isinstance(layer, nn.LeakyReLU):
                slope = torch.where(features > 0, 1.0, layer.negative_slope)
                features, inner = features / slope, inner * slope
            elif isinstance(layer, nn.Conv2d | nn.Linear):
                (name,) = _weights(module, link)
                features = _solve(layer, own[name], features, inner, gradient[name], link.below)
                inner = _transposed(layer, own[name], inner, link.below)
        images = found.on_pixels[0].to_images(features.flatten(1), observation.shape)
        images = images[:, None].nan_to_num(0.5).clamp(0, 1)
        return images.to(observation.dtype), labels[:, None]

    def loss(self, observation: Observation, images: Tensor, targets: Tensor, buffers: dict[str, Tensor]) -> Tensor:
        """Squared distance [N] between the gradients of given images and the observed ones, relative to these."""

        def distance(images: Tensor, targets: Tensor, buffers: dict[str, Tensor], observed: Update) -> Tensor:
            guess = local_update(
                observation.network, images, targets, LocalTraining(), buffers=buffers, differentiate=by_transform
            )
            return relative_squared(guess, observed)

        return vmap(distance)(images, targets, buffers, observation.gradient)


def _weights(module: nn.Module, link: Link) -> list[str]:
    """Names of a layer's parameters, as they are in an update."""
    own = {id(tensor) for tensor in module.get_submodule(link.name).parameters()}
    return [name for name, tensor in module.named_parameters() if id(tensor) in own]


def _invertible(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
        return layer.bias is None and plain and not isinstance(layer.padding, str)
    if isinstance(layer, nn.Linear):
        return layer.bias is None
    if isinstance(layer, nn.LeakyReLU):
        return layer.negative_slope > 0
    return isinstance(layer, nn.Flatten | nn.Identity)


def _head(gradient: Tensor, weight: Tensor, sign: float, root: int) -> tuple[Tensor, Tensor, Tensor]:
    """Last layer's input h [N, F], derivative k at the logits [N, K] and label [N] from its gradient k h^T."""
    left, values, right = torch.linalg.svd(gradient, full_matrices=False)
    # One entry of k = softmax - y is negative, the label's; with two classes both signs are possible.
    most = torch.where((left[..., 0] > 0).sum(1) >= (left[..., 0] < 0).sum(1), sign, -sign)[:, None]
    direction, features = most * left[..., 0], most * values[:, :1] * right[:, 0]
    labels = direction.argmin(1)
    target = one_hot(labels, direction.shape[1], direction.dtype)
    logits = features @ weight.mT
    largest = 1 / direction.gather(1, labels[:, None]).abs()

    def misfit(share: Tensor) -> Tensor:
        """How far k is from softmax(W h) - y [N, G], for shares of the largest scale of k."""
        scale = (share * largest)[..., None]
        rest = scale * direction[:, None] - ((logits[:, None] / scale).softmax(-1) - target[:, None])
        length: Tensor = rest.norm(dim=-1)
        return length

    grid = torch.linspace(0, 1, _GRID, dtype=direction.dtype, device=direction.device)[1:]
    # Shares from 1e-8 on: the surer the client is of its label, the smaller.
    shares = (10 ** (8 * (grid - 1))).expand(len(direction), -1)
    misfits = misfit(shares)
    # No valley at the lower end, where a k of zero fits anything.
    walls = F.pad(F.pad(misfits, (1, 0), value=-1.0), (0, 1), value=torch.inf)
    valley = (misfits <= walls[:, :-2]) & (misfits <= walls[:, 2:])
    middle = misfits.masked_fill(~valley, torch.inf).topk(root + 1, largest=False).indices[:, -1:]
    low = shares.gather(1, (middle - 1).clamp(min=0))
    high = shares.gather(1, (middle + 1).clamp(max=shares.shape[1] - 1))
    for _ in range(120):
        first, second = low + (high - low) / 3, high - (high - low) / 3
        left = misfit(first) < misfit(second)
        low, high = torch.where(left, low, first), torch.where(left, second, high)
    scale = (low + high) / 2 * largest
    return features / scale, scale * direction, labels


def _apply(layer: nn.Module, weight: Tensor, inputs: Tensor) -> Tensor:
    if isinstance(layer, nn.Conv2d):
        assert not isinstance(layer.padding, str)
        return F.conv2d(inputs, weight, None, layer.stride, layer.padding)
    return inputs @ weight.mT


def _transposed(layer: nn.Module, weight: Tensor, outer: Tensor, shape: torch.Size) -> Tensor:
    """Derivative at the layer's input from that at its output."""
    if isinstance(layer, nn.Conv2d):
        full = (len(outer), *shape)
        inner: Tensor = grad.conv2d_input(full, weight, outer, layer.stride, layer.padding)
        return inner
    return outer @ weight


def _gradient_rows(layer: nn.Module, outer: Tensor, shape: torch.Size) -> Tensor:
    """Gradient of the weight as a matrix on one input channel, [N, size of a channel, entries]; channels are alike."""
    if isinstance(layer, nn.Conv2d):
        assert not isinstance(layer.padding, str)
        pixels = shape[1:].numel()
        identity = torch.eye(pixels, dtype=outer.dtype, device=outer.device).unflatten(1, (1, *shape[1:]))
        columns = F.unfold(identity, layer.kernel_size, 1, layer.padding, layer.stride)
        return torch.einsum("pql,nol->npoq", columns, outer.flatten(2)).flatten(2)
    return outer[:, None]


def _solve(
    layer: nn.Module, weight: Tensor, outputs: Tensor, outer: Tensor, gradient: Tensor, shape: torch.Size
) -> Tensor:
    """Least squares for the input [N, *shape] from outputs and weight gradient, both kinds of rows of equal scale."""
    size, channels = shape.numel(), shape[0] if isinstance(layer, nn.Conv2d) else shape.numel()
    identity = torch.eye(size, dtype=weight.dtype, device=weight.device)
    forward = _apply(layer, weight, identity.unflatten(1, shape)).flatten(1)
    strength = (forward.square().sum() / size).sqrt()
    forward = forward / strength
    shared = forward @ forward.mT + _RIDGE * identity
    found = []
    for some in torch.arange(len(outputs), device=weight.device).split(max(1, _MEMORY // size**2)):
        rows = _gradient_rows(layer, outer[some], shape)
        power = (rows.square().sum((1, 2)) / rows.shape[1]).sqrt()[:, None, None] + 1e-300
        rows = rows / power
        blocks = rows @ rows.mT
        normal = shared + torch.stack([torch.block_diag(*block.expand(channels, -1, -1)) for block in blocks])
        factor, _ = torch.linalg.cholesky_ex(normal)
        above = outputs[some].flatten(1) / strength
        # [N, O, C, ...] to one row of entries a channel, [N, C, O ...]
        below = gradient[some].transpose(1, 2).flatten(2) / power
        x = torch.zeros_like(above[:, :1]).expand(-1, size).contiguous()
        for _ in range(_REFINEMENTS):
            rest = (above - x @ forward) @ forward.mT
            rest = rest + ((below - x.unflatten(1, (channels, -1)) @ rows) @ rows.mT).flatten(1)
            x = x + torch.cholesky_solve(rest[..., None], factor)[..., 0]
        found.append(x.unflatten(1, shape))
    return torch.cat(found)
