"""Quantum and quantum-inspired encodings: the model sees images only through oscillating feature maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from gradleak import seeds
from gradleak.defense import Defense
from gradleak.errors import GradleakError
from gradleak.mechanisms.quantum import (
    AngleEncoded,
    Entangler,
    Gates,
    Observable,
    encode_amplitudes,
    encode_angles,
    entangle,
    evolve,
    expectations,
    kronecker,
    observable,
    pool,
    rotate_x,
    unpool,
)
from gradleak.model import Normalise
from gradleak.update import copied

_Quantum = Literal["angle", "product", "exponential", "reupload", "amplitude"]
_Classical = Literal["fourier", "chebyshev", "angle-patches", "amplitude-patches"]


@dataclass(frozen=True, kw_only=True)
class QuantumEncoding(Defense):
    """Replaces the model by a variational quantum circuit, or its first layer's input by a feature map.

    References: Kumar, Heredge, Li, Eloul, Sureshbabu, Pistoia, arXiv:2309.13002 (exponential frequencies, base 5;
    overparametrised hardware-efficient ansatz). Fixed, public and noiseless, so there is no guarantee, and
    matching through the model is exact already. The adaptive answer frees the encoding angles of all encodings
    that have frequencies; the others (amplitude, patches) have none to hide behind.

    Circuits see the image as a grid of average grey values, as many as they encode features: `qubits` (angle,
    reupload), `qubits / repetitions` (product, exponential) or 2^qubits (amplitude). What this pooling hides
    from PSNR is no merit of the circuit: compare with the pooled image itself. Amplitudes also lose the scale,
    of the image or of every patch.
    Classical maps keep every pixel, so the given model stays, with a first layer for more channels.
    """

    family = "representation"
    reference = "arXiv:2309.13002"
    counter_attacks = ("quantum-relaxation",)

    encoding: _Quantum | _Classical = "exponential"
    """Circuits. angle: RX(x) on a qubit a feature; product: on `repetitions` qubits; exponential: RX(base^k x) on
    them; reupload: RX(x) before each of `repetitions` ansatz blocks; amplitude. Classical maps. fourier: cosine
    and sine of base^k x; chebyshev: polynomials up to degree `repetitions`; angle-patches, amplitude-patches:
    states of 2x2 pixels as four qubits, or as four amplitudes."""
    qubits: Annotated[int, Ge(1), Le(10)] = 8
    """Qubits of a circuit."""
    repetitions: Annotated[int, Ge(1), Le(32)] = 2
    """Encoding degree; without effect for angle, amplitude and patches."""
    base: Annotated[int, Ge(2), Le(9)] = 5
    """Ratio of consecutive frequencies (exponential, fourier)."""
    turn: Annotated[float, Gt(0), Le(1)] = 0.5
    """Share of a full turn that a feature's range takes; the paper's 1 takes black for white."""
    layers: Annotated[int, Ge(1)] = 4
    """Layers of the ansatz, after each upload; the paper calls 2 overparametrised."""
    entangler: Entangler = "chain"
    observable: Observable = "qubits"
    """What is measured: Z on each qubit, or on all of them together (the paper)."""
    head: Literal["trained", "fixed"] = "trained"
    """Class scores from measurements: a trained linear layer, which gives every measurement away, or a fixed
    random one, so that only the circuit's gradient is sent; labels must then be granted."""
    seed: int = 0
    """Seed of all weights that this defense adds."""

    def __post_init__(self) -> None:
        registers = self.encoding in ("product", "exponential")
        if registers and self.qubits % self.repetitions:
            raise GradleakError(
                f"defense 'quantum-encoding': qubits = {self.qubits} is not a multiple of repetitions = "
                f"{self.repetitions}, as encoding {self.encoding!r} needs"
            )

    def prepare_model(self, module: nn.Module) -> nn.Module:
        """Return the circuit with as many classes as `module`, or a copy of `module` behind a feature map.

        Raises:
            GradleakError: `module` has no linear layer, or no layer to put the map in front of.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeds.derive("quantum-encoding", self.seed))
            if self.encoding == "amplitude":
                return _AmplitudeCircuit(self, _classes(module))
            if self.encoding in ("angle", "product", "exponential", "reupload"):
                return _AngleCircuit(self, _classes(module))
            if self.encoding == "fourier":
                return _Fourier(_widened(module, 2 * self.repetitions), self)
            if self.encoding == "chebyshev":
                return _Chebyshev(_widened(module, self.repetitions), self)
            if self.encoding == "angle-patches":
                return nn.Sequential(_AnglePatches(self.turn), _widened(module, 4))
            return nn.Sequential(_AmplitudePatches(), _widened(module, 1))


class _Circuit(nn.Module):
    """Encoding, ansatz and read-out, to class scores [B, classes]."""

    order: Tensor
    eigenvalues: Tensor

    def __init__(self, options: QuantumEncoding, uploads: int, classes: int):
        super().__init__()
        self.amplitudes = options.encoding == "amplitude"
        angles = torch.rand(uploads, options.layers, options.qubits, 2)
        self.rotations = nn.Parameter(2 * torch.pi * angles)
        self.register_buffer("order", entangle(options.qubits, options.entangler))
        self.register_buffer("eigenvalues", observable(options.qubits, options.observable))
        outputs = self.eigenvalues.shape[1]
        if options.head == "trained":
            self.head: nn.Module = nn.Linear(outputs, classes)
        else:
            self.head = _FixedHead(outputs, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Scores of amplitudes [B, 2^n], or of angles [B, uploads, n], one upload before each block."""
        state = encode_amplitudes(inputs) if self.amplitudes else encode_angles(inputs[:, 0])
        state = evolve(state, self.rotations[0], self.order)
        for upload in range(1, len(self.rotations)):
            state = Gates(rotate_x(inputs[:, upload]))(state)
            state = evolve(state, self.rotations[upload], self.order)
        scores: Tensor = self.head(expectations(state, self.eigenvalues))
        return scores


class _FixedHead(nn.Module):
    """Random class scores of measurements, not trained."""

    matrix: Tensor

    def __init__(self, outputs: int, classes: int):
        super().__init__()
        self.register_buffer("matrix", torch.randn(outputs, classes))

    def forward(self, measured: Tensor) -> Tensor:
        return measured @ self.matrix


class _AmplitudeCircuit(nn.Module):
    """A circuit on the pooled image as amplitudes."""

    def __init__(self, options: QuantumEncoding, classes: int):
        super().__init__()
        self.pixels = 2**options.qubits
        self.circuit = _Circuit(options, 1, classes)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.circuit(pool(images, self.pixels))
        return scores


class _AngleCircuit(AngleEncoded):
    """A circuit on the pooled image as angles [B, m, features]: m copies of every feature."""

    def __init__(self, options: QuantumEncoding, classes: int):
        super().__init__()
        copies = 1 if options.encoding == "angle" else options.repetitions
        ratio = options.base if options.encoding == "exponential" else 1
        self.register_buffer("multipliers", _powers(ratio, copies))
        self.turn = options.turn
        self.uploads = copies if options.encoding == "reupload" else 1
        self.count = options.qubits * self.uploads // copies
        self.circuit = _Circuit(options, self.uploads, classes)

    def features(self, images: Tensor) -> Tensor:
        return pool(images, self.count)

    def restored(self, features: Tensor, shape: tuple[int, int, int]) -> Tensor:
        return unpool(features, shape)

    def from_angles(self, angles: Tensor) -> Tensor:
        scores: Tensor = self.circuit(angles.flatten(1).unflatten(1, (self.uploads, -1)))
        return scores


class _Map(AngleEncoded):
    """A network behind a feature map of every pixel; angles are [B, m, C, H, W]."""

    def __init__(self, network: nn.Module, multipliers: Tensor, turn: float):
        super().__init__()
        self.network = network
        self.register_buffer("multipliers", multipliers)
        self.turn = turn

    def features(self, images: Tensor) -> Tensor:
        return images

    def restored(self, features: Tensor, shape: tuple[int, int, int]) -> Tensor:
        return features


class _Fourier(_Map):
    """Cosine and sine of exponentially spaced multiples."""

    def __init__(self, network: nn.Module, options: QuantumEncoding):
        super().__init__(network, _powers(options.base, options.repetitions), options.turn)

    def from_angles(self, angles: Tensor) -> Tensor:
        scores: Tensor = self.network(torch.cat([angles.cos(), angles.sin()], dim=1).flatten(1, 2))
        return scores


class _Chebyshev(_Map):
    """T_k(1 - 2x) = cos(k arccos(1 - 2x)), k from 1 to the degree; the first alone gives the pixel."""

    def __init__(self, network: nn.Module, options: QuantumEncoding):
        super().__init__(network, torch.arange(1.0, options.repetitions + 1), 0.5)

    def forward(self, images: Tensor) -> Tensor:
        if self.relaxed:
            return super().forward(images)
        # The recurrence has no arc cosine, whose slope is infinite at black and white.
        position = 1 - 2 * images
        values = [torch.ones_like(position), position]
        for _ in range(len(self.multipliers) - 1):
            values.append(2 * position * values[-1] - values[-2])
        scores: Tensor = self.network(torch.cat(values[1:], dim=1))
        return scores

    def features(self, images: Tensor) -> Tensor:
        return (1 - 2 * images).arccos() / torch.pi

    def restored(self, features: Tensor, shape: tuple[int, int, int]) -> Tensor:
        return (1 - (torch.pi * features).cos()) / 2

    def images(self, angles: Tensor, shape: tuple[int, int, int]) -> Tensor:
        # A cosine hides the angle's sign, so higher degrees cannot refine the first.
        return (1 - angles[:, 0].cos()) / 2

    def from_angles(self, angles: Tensor) -> Tensor:
        scores: Tensor = self.network(angles.cos().flatten(1, 2))
        return scores


class _AnglePatches(nn.Module):
    """The 16 real amplitudes of four qubits (cos x, sin x), for every 2x2 patch, as 4 channels."""

    def __init__(self, turn: float):
        super().__init__()
        self.turn = turn

    def forward(self, images: Tensor) -> Tensor:
        # [B, C, H, W] to [B, C, H/2, W/2, 4 qubits, 2 amplitudes, 1].
        angles = torch.pi * self.turn * _patches(images).movedim(2, -1)
        qubits = torch.stack([angles.cos(), angles.sin()], dim=-1).unsqueeze(-1)
        amplitudes = kronecker(qubits).squeeze(-1).movedim(-1, 2)
        return pixel_shuffle(amplitudes.flatten(1, 2), 2)


class _AmplitudePatches(nn.Module):
    """Every 2x2 patch divided by its norm."""

    def forward(self, images: Tensor) -> Tensor:
        patches = _patches(images)
        norms = (patches.square().sum(2, keepdim=True) + 1e-12).sqrt()
        return pixel_shuffle((patches / norms).flatten(1, 2), 2)


def _patches(images: Tensor) -> Tensor:
    """Return images [B, C, H, W] as 2x2 patches [B, C, 4, H/2, W/2]."""
    height, width = images.shape[-2:]
    if height % 2 or width % 2:
        raise GradleakError(f"defense 'quantum-encoding': patches of 2x2 pixels need even sides, not {height}x{width}")
    patches: Tensor = pixel_unshuffle(images, 2).unflatten(1, (-1, 4))
    return patches


def _powers(base: int, count: int) -> Tensor:
    return torch.tensor([float(base**exponent) for exponent in range(count)])


def _classes(module: nn.Module) -> int:
    linear = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    if not linear:
        raise GradleakError("defense 'quantum-encoding': the model has no linear layer to tell the number of classes")
    return linear[-1].out_features


def _widened(module: nn.Module, factor: int) -> nn.Module:
    """Copy without normalisation and with `factor` times the input channels.

    The first layer is drawn anew, normal, of the old standard deviation over sqrt(factor), which keeps the
    scale of what it puts out.
    """
    module = copied(module)
    layers = dict(module.named_modules())
    for name, layer in layers.items():
        if isinstance(layer, Normalise):
            _replace(module, name, nn.Identity())
        elif isinstance(layer, nn.Linear | nn.Conv2d) and getattr(layer, "groups", 1) == 1:
            old = layer.weight
            shape = (old.shape[0], factor * old.shape[1], *old.shape[2:])
            layer.weight = nn.Parameter(torch.randn(shape).to(old) * old.detach().std() / factor**0.5)
            if isinstance(layer, nn.Linear):
                layer.in_features *= factor
            else:
                layer.in_channels *= factor
            return module
    raise GradleakError("defense 'quantum-encoding': the model has no linear or convolutional layer")


def _replace(module: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, layer)
