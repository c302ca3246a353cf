"""Networks as people have them: which backend computes their attack, and how far it is from plain autograd.

    python benchmarks/zoo.py small          # one of each kind, in small; what tests/test_zoo.py asserts
    python benchmarks/zoo.py full           # torchvision's networks as they come, at 32x32
    python benchmarks/zoo.py full --only resnet18

A line is a network in a mode: the backend that `layerwise`, the default, ends at, the largest relative difference of
a trial's image gradient from plain double backward of the module itself (float64), and the seconds that choosing,
comparison included, took. A network that cannot be attacked through its gradient shows the reason instead.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torchvision import models
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import EfficientNet, MBConvConfig
from torchvision.models.regnet import BlockParams
from torchvision.models.resnet import BasicBlock, Bottleneck

from gradleak import process
from gradleak.engine.choice import choose
from gradleak.engine.derivatives import twice_differentiable
from gradleak.engine.problem import Direct, Facts, Guess, Problem
from gradleak.errors import GradleakError
from gradleak.models._foreign import quieten
from gradleak.update import (
    LocalTraining,
    Network,
    cross_entropy,
    local_update,
    one_hot,
    stack,
    twice_differentiable_kernels,
)

CLASSES, VICTIMS, BATCH = 10, 3, 2


class Lambda(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply it."""
        return self.function(inputs)


class Parts(nn.Module):
    """Named layers and a function of them and the images: a network with a `forward` of its own."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **layers: nn.Module):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.rule = forward

    def forward(self, images: Tensor) -> Tensor:
        """Apply the function."""
        return self.rule(self, images)


class NormAct(nn.BatchNorm2d):
    """Batch normalisation with the activation inside, as model zoos have it."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise and activate."""
        normal: Tensor = super().forward(inputs)
        return F.silu(normal)


class Scaled(nn.Module):
    """A layer's output times a vector of its own (ConvNeXt's layer scale), channels last inside."""

    def __init__(self, dim: int):
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.gamma = nn.Parameter(0.1 * torch.ones(dim))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [B, C, H, W] to the same."""
        hidden: Tensor = self.norm(self.depthwise(inputs).permute(0, 2, 3, 1))
        changed: Tensor = self.gamma * self.down(F.gelu(self.up(hidden)))
        return inputs + changed.permute(0, 3, 1, 2)


def pooled(*layers: nn.Module, width: int = 8) -> nn.Module:
    """Layers between a small stem and a linear head."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 2, 1), *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, CLASSES)
    )


def tokens(layer: Callable[[Any, Tensor], Tensor], dim: int = 12, **layers: nn.Module) -> nn.Module:
    """A network on patches: `layer` maps tokens [B, T, dim] to the same."""

    def forward(self: Any, images: Tensor) -> Tensor:
        rows = self.patches(images).flatten(2).transpose(1, 2)
        return self.head(layer(self, rows).square().mean(1))  # type: ignore[no-any-return]

    return Parts(forward, patches=nn.Conv2d(3, dim, 8, 8), head=nn.Linear(dim, CLASSES), **layers)


def flat(layer: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> nn.Module:
    """A network on 48 features: `layer` maps [B, 48] to the same."""

    def forward(self: Any, images: Tensor) -> Tensor:
        return self.head(layer(self, self.stem(F.avg_pool2d(images, 4).flatten(1))))  # type: ignore[no-any-return]

    return Parts(forward, stem=nn.Linear(192, 48), head=nn.Linear(48, CLASSES), **layers)


def unet() -> nn.Module:
    """An encoder and a decoder with a skip connection, and a pooled head."""

    def forward(self: Any, images: Tensor) -> Tensor:
        fine = F.relu(self.first(images), inplace=True)
        coarse = F.relu(self.second(F.max_pool2d(fine, 2)), inplace=True)
        up = F.interpolate(self.up(coarse), scale_factor=2, mode="bilinear", align_corners=False)
        merged = self.third(torch.cat([fine, up], 1)).relu_()
        return self.head(merged).mean((-2, -1))  # type: ignore[no-any-return]

    return Parts(
        forward,
        first=nn.Conv2d(3, 4, 3, 2, 1),
        second=nn.Conv2d(4, 8, 3, 1, 1),
        up=nn.ConvTranspose2d(8, 4, 1),
        third=nn.Conv2d(8, 8, 3, 1, 1),
        head=nn.Conv2d(8, CLASSES, 1),
    )


def tied() -> nn.Module:
    """Two layers with one weight."""
    network = flat(
        lambda self, x: self.two(torch.tanh(self.one(x))),
        one=nn.Linear(48, 48),
        two=nn.Linear(48, 48),
    )
    network.get_submodule("two").weight = network.get_submodule("one").weight
    return network


def residual_in_place() -> nn.Module:
    """A sum and an activation in place, written in `forward`."""

    def forward(self: Any, features: Tensor) -> Tensor:
        out = self.norm(self.inner(features))
        out += features
        return out.relu_()  # type: ignore[no-any-return]

    return pooled(Parts(forward, inner=nn.Conv2d(8, 8, 3, 1, 1), norm=nn.BatchNorm2d(8)), nn.Tanh())


def by_rows(kind: type[nn.LSTM] | type[nn.GRU]) -> nn.Module:
    """A recurrent network that reads an image row by row."""
    return Parts(
        lambda self, images: self.head(self.recurrent(images.mean(1))[0][:, -1]),
        recurrent=kind(32, 16, batch_first=True),
        head=nn.Linear(16, CLASSES),
    )


def mixer() -> nn.Module:
    """One block of an MLP-mixer (Tolstikhin et al., arXiv:2105.01601)."""

    def layer(self: Any, rows: Tensor) -> Tensor:
        rows = rows + self.across(self.before(rows).transpose(1, 2)).transpose(1, 2)
        return rows + self.along(self.after(rows))  # type: ignore[no-any-return]

    return tokens(
        layer,
        across=nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)),
        along=nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12)),
        before=nn.LayerNorm(12),
        after=nn.LayerNorm(12),
    )


def reparametrised(change: Callable[[nn.Module], object]) -> nn.Module:
    """A small network whose first and last layers are changed."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(3072, 16), nn.Sigmoid(), nn.Linear(16, CLASSES))
    for index in (1, 3):
        change(network[index])
    return network


def attend(self: Any, rows: Tensor) -> Tensor:
    """Attend with torch's fused function, two heads."""
    queries, keys, values = self.inner(rows).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    return rows + F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)


def branch(self: Any, rows: Tensor) -> Tensor:
    """Decide by the data."""
    return self.inner(torch.tanh(rows / 255 if rows.max() > 1.5 else rows))  # type: ignore[no-any-return]


def hooked() -> nn.Module:
    """A layer whose output a hook changes."""
    layer = nn.Linear(48, 48)
    layer.register_forward_hook(lambda module, inputs, output: torch.tanh(output))
    return flat(lambda self, x: self.inner(x), inner=layer)


Build = Callable[[], nn.Module]

TORCHVISION: dict[str, Build] = {
    "resnet": partial(models.ResNet, BasicBlock, [1, 1, 1, 1], CLASSES),
    "resnext": partial(models.ResNet, Bottleneck, [1, 1, 1, 1], CLASSES, groups=4, width_per_group=2),
    "mobilenet_v2": partial(
        models.MobileNetV2, CLASSES, 0.25, [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 1, 2]], dropout=0.0
    ),
    "mobilenet_v3_small": partial(models.mobilenet_v3_small, num_classes=CLASSES, dropout=0.0),
    "efficientnet": partial(
        EfficientNet,
        [MBConvConfig(1, 3, 1, 8, 8, 1), MBConvConfig(4, 3, 2, 8, 12, 2)],
        dropout=0.0,
        stochastic_depth_prob=0.0,
        num_classes=CLASSES,
        last_channel=32,
    ),
    "convnext": partial(
        models.ConvNeXt, [CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 1)], 0.0, num_classes=CLASSES
    ),
    "densenet": partial(models.DenseNet, 8, (2, 2), 16, num_classes=CLASSES),
    "squeezenet1_1": partial(models.SqueezeNet, "1_1", CLASSES, dropout=0.0),
    "shufflenet_v2": partial(models.ShuffleNetV2, [1, 1, 1], [8, 16, 32, 64, 64], CLASSES),
    "regnet_y": lambda: models.RegNet(BlockParams.from_init_params(4, 16, 16, 2.5, 8, se_ratio=0.25), CLASSES),
    "mnasnet": partial(models.MNASNet, 0.25, CLASSES, dropout=0.0),
    "vit": partial(models.VisionTransformer, 32, 8, 2, 2, 24, 48, num_classes=CLASSES),
    "swin": partial(
        models.SwinTransformer, [4, 4], 16, [2], [2], [4, 4], stochastic_depth_prob=0.0, num_classes=CLASSES
    ),
    "googlenet": partial(models.GoogLeNet, CLASSES, aux_logits=False, init_weights=False, dropout=0.0),
}
"""torchvision's networks in small configurations."""

OWN: dict[str, Build] = {
    "unet": unet,
    "group-norm": lambda: pooled(nn.GroupNorm(2, 8), nn.SiLU(inplace=True)),
    "layer-norm": lambda: tokens(lambda self, x: self.norm(x), norm=nn.LayerNorm(12)),
    "rms-norm": lambda: tokens(lambda self, x: self.norm(x), norm=nn.RMSNorm(12)),
    "instance-norm": lambda: pooled(nn.InstanceNorm2d(8, affine=True), nn.ELU()),
    "in-place": lambda: pooled(nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3), nn.ReLU6(inplace=True)),
    "in-place-residual": residual_in_place,
    "norm-with-activation": lambda: pooled(NormAct(8)),
    "layer-scale": lambda: pooled(Scaled(8)),
    "lstm": lambda: by_rows(nn.LSTM),
    "gru": lambda: by_rows(nn.GRU),
    "mlp-mixer": mixer,
    "tied": tied,
    "called-twice": lambda: flat(lambda self, x: self.inner(torch.tanh(self.inner(x))), inner=nn.Linear(48, 48)),
    "weight-read": lambda: flat(
        lambda self, x: self.inner(x) + torch.tanh(F.linear(x, self.inner.weight)),
        inner=nn.Linear(48, 48),
    ),
    "named-argument": lambda: flat(lambda self, x: self.inner(input=torch.tanh(x)), inner=nn.Linear(48, 48)),
    "multi-head-attention": lambda: tokens(
        lambda self, x: x + self.inner(x, x, x)[0],
        inner=nn.MultiheadAttention(12, 3, batch_first=True),
    ),
    "fused-attention": lambda: tokens(attend, inner=nn.Linear(12, 36)),
    "transformer-encoder": lambda: tokens(
        lambda self, x: self.inner(x),
        inner=nn.TransformerEncoder(
            nn.TransformerEncoderLayer(12, 3, 24, 0.0, batch_first=True), 1, enable_nested_tensor=False
        ),
    ),
    "sequence-first": lambda: tokens(
        lambda self, x: torch.tanh(self.inner(x.transpose(0, 1))).transpose(0, 1),
        inner=nn.Linear(12, 12),
    ),
    "batch-statistics": lambda: pooled(Lambda(lambda x: (x - x.mean()) / (x.std() + 1e-6)), nn.Tanh()),
    "centred-batch": lambda: pooled(Lambda(lambda x: x - x.mean(0, keepdim=True)), nn.Tanh()),
    "branch": lambda: flat(branch, inner=nn.Linear(48, 48)),
    "hooked": hooked,
    "weight-norm": lambda: reparametrised(parametrizations.weight_norm),
    "old-weight-norm": lambda: reparametrised(nn.utils.weight_norm),
    "spectral-norm": lambda: reparametrised(parametrizations.spectral_norm),
    "old-spectral-norm": lambda: reparametrised(nn.utils.spectral_norm),
    "pruned": lambda: reparametrised(lambda layer: prune.l1_unstructured(layer, "weight", 0.5)),
    "hard-sigmoid": lambda: pooled(nn.Hardsigmoid()),
}
SMALL = {**TORCHVISION, **OWN}

FULL: dict[str, Build] = {
    name: lambda name=name, options=options: quieten(getattr(models, name)(num_classes=CLASSES, **options))  # type: ignore[misc]
    for name, options in {
        "resnet18": {},
        "resnet50": {},
        "resnext50_32x4d": {},
        "mobilenet_v2": {},
        "mobilenet_v3_small": {},
        "efficientnet_b0": {},
        "convnext_tiny": {},
        "densenet121": {},
        "squeezenet1_1": {},
        "shufflenet_v2_x0_5": {},
        "regnet_y_400mf": {},
        "mnasnet0_5": {},
        "googlenet": {"aux_logits": False, "init_weights": False},
        "swin_t": {},
    }.items()
}


@dataclass(frozen=True)
class Found:
    """A line of the table."""

    backend: str
    error: float
    seconds: float
    reason: str


def measure(build: Build, mode: str, size: int = 32) -> Found:
    """Choose a backend for a network's attack and compare all of its trials with plain autograd."""
    network, problem, start, facts = setup(build, mode, size)
    started = time.process_time()
    targets = one_hot(torch.arange(BATCH), CLASSES, torch.float64)
    refused = twice_differentiable(network, start["pixels"][0], targets)
    if refused is not None:
        return Found("refused", 0.0, time.process_time() - started, refused)
    name, backend, reason, _, ready = choose("layerwise", problem, start, facts, 300)
    seconds = time.process_time() - started
    values = backend(problem, start, ready)
    wanted = torch.stack([by_hand(network.module, facts, start["pixels"], row) for row in range(VICTIMS)])
    error = (values.gradients["pixels"] - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
    return Found(name, float(error.max()), seconds, reason)


def setup(build: Build, mode: str, size: int) -> tuple[Network, Problem, dict[str, Tensor], Facts]:
    """A network and an attack on three victims of it: their updates, and where the search starts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = build().double()
        pixels = torch.rand(2, VICTIMS, BATCH, 3, size, size, dtype=torch.float64)
        calibrate(module, pixels.flatten(0, 2))
    network = Network.of(module, mode)
    labels = torch.arange(VICTIMS * BATCH).view(VICTIMS, BATCH) % CLASSES
    targets = one_hot(labels, CLASSES, torch.float64)
    try:
        sent = [local_update(network, x, y, LocalTraining()) for x, y in zip(pixels[0], targets, strict=True)]
        update = {name: tensor.detach() for name, tensor in stack(sent).items()}
    except RuntimeError:  # not twice differentiable, which is asked next
        update = {}
    facts = Facts(targets, update=update)
    problem = Problem(
        network=network,
        training=LocalTraining(),
        decode=lambda row, known: Guess(row["pixels"], known.targets),
        match=Direct("cosine"),
        penalty=lambda guess, row, known: guess.images.new_zeros(()),
    )
    return network, problem, {"pixels": pixels[1]}, facts


def calibrate(module: nn.Module, images: Tensor) -> None:
    """Give batch normalisation the statistics of some images, as training would have."""
    norms = [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    usual = [layer.momentum for layer in norms]
    for layer in norms:
        layer.momentum = 1.0
    if norms:
        with torch.no_grad():
            module.train()(images)
    for layer, momentum in zip(norms, usual, strict=True):
        layer.momentum = momentum


def by_hand(module: nn.Module, facts: Facts, pixels: Tensor, row: int) -> Tensor:
    """One trial's image gradient by torch alone: the module is called as it is, and differentiated twice."""
    update, targets = facts.update, facts.targets
    images = pixels[row].clone().requires_grad_()
    weights = {name: tensor.requires_grad_() for name, tensor in module.named_parameters()}
    with twice_differentiable_kernels(module):
        loss = cross_entropy(module(images), targets[row])
        found = torch.autograd.grad(loss, list(weights.values()), create_graph=True, materialize_grads=True)
    one = torch.cat([tensor.flatten() for tensor in found])
    other = torch.cat([update[name][row].flatten() for name in weights])
    distance = 1 - one @ other / (one.norm() * other.norm())
    (slope,) = torch.autograd.grad(distance, images)
    module.requires_grad_(False)
    return slope


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=["small", "full"])
    parser.add_argument("--only", help="the network of this name")
    given = parser.parse_args()
    process.tune()
    print(f"{'network':24}{'mode':7}{'backend':12}{'error':>10}{'seconds':>9}  reason")
    for name, build in (SMALL if given.suite == "small" else FULL).items():
        for mode in ("eval", "train"):
            if given.only not in (None, name):
                continue
            try:
                found = measure(build, mode)
            except GradleakError as error:
                found = Found("refused", 0.0, 0.0, str(error))
            print(
                f"{name:24}{mode:7}{found.backend:12}{found.error:10.1e}{found.seconds:9.2f}  {found.reason}",
                flush=True,
            )


if __name__ == "__main__":
    main()
