"""Every attack of the registry, on a small case of its own that it can run on."""

from __future__ import annotations

import pytest
import torch

from gradleak import registry
from gradleak.contract import checks, findings
from gradleak.contract.attacks import AttackCase, Case
from gradleak.dataset import Data

CASES = {
    "spear": Case("mlp", {"widths": (64, 64)}, batch_size=2),
    "spear-pp": Case("mlp", {"widths": (64, 64)}, {"rounds": 3, "trials": 8}, batch_size=2),
    "linear-leakage": Case("mlp", {"widths": (32,)}),
    "cocktail-party": Case("mlp", {"widths": (64,)}, dataset="photos", batch_size=2),
    "april": Case("vit", {"dim": 16, "depth": 1, "heads": 2}),
    "r-gap": Case("cnn6", {"width": 6}),
    "dlg": Case("lenet", options={"iterations": 30}),
    "idlg": Case("lenet", options={"iterations": 30}),
    "quantum-relaxation": Case("mlp", {"widths": (32,)}, {"restarts": 2, "iterations": 20}, "quantum-encoding"),
    "bottleneck-inversion": Case("lenet", {}, {"iterations": 30}, "vib", {"width": 4}),
    "gradinversion": Case("convnet", {"width": 2}, {"iterations": 20}),
    "lti": Case("mlp", {"widths": (32,)}, {"messages": 512, "epochs": 10}),
    "message-regression": Case("mlp", {"widths": (32,)}, {"messages": 256}),
    "posterior": Case("mlp", {"widths": (32,)}, {"candidates": 64, "trials": 8}),
    "decoded-spear": Case("mlp", {"widths": (64,)}, defense="mixup", batch_size=2),
    "sme": Case("lenet", {}, {"iterations": 30}, local_lr=0.1),
    "tract-inversion": Case("mlp", {"widths": (32,)}, defense="tract"),
    "encoding-inversion": Case("lenet", {}, {"iterations": 30}, "augmentation"),
    "imprint-readout": Case("mlp", {"widths": (32,)}, server="imprint"),
    "loki-readout": Case("mlp", {"widths": (32,)}, server="loki", server_options={"clients": 2}),
    "trap-readout": Case("mlp", {"widths": (64,)}, server="trap-weights"),
}
"""Cases of attacks that need a certain model; all others run on the first of `USUAL` that suits them."""

USUAL = (Case("mlp", {"widths": (32,)}, {"iterations": 150}), Case("lenet", options={"iterations": 150}))

DIGITS, PHOTOS = (
    Data(registry.build("datasets", name), name).split.train.images.double().mean(0) for name in ("digits", "photos")
)

HINDERED = {
    "quantum-relaxation",
    "bottleneck-inversion",
    "gradinversion",
    "sme",
    "encoding-inversion",
    "cocktail-party",
}
"""Attacks that need not beat the mean image on their case: a defense, too short a run, or two of three batches that it
does not unmix stand in their way."""


@pytest.mark.parametrize("name", registry.names("attacks"))
def test_contract(name: str) -> None:
    torch.set_num_threads(1)
    case = AttackCase(name, [CASES[name]] if name in CASES else USUAL)
    try:
        observation, images = case.scene
    except findings.Unchecked as reason:
        assert case.attack.needs.generator, f"no usual case suits it ({reason}); give it one in CASES"
        pytest.skip(f"{name}: {reason}; tests of its own cover it")
    for check in checks.CHECKS["attacks"]:
        check(case)
    if name not in HINDERED and case.attack.family != "control":
        mean = DIGITS if observation.shape == (1, 8, 8) else PHOTOS
        error = (case.answer.images - images).square().mean((-3, -2, -1)).mean()
        floor = (mean - images).square().mean((-3, -2, -1)).mean()
        assert error < floor, f"mean squared error {error:.4f}, the mean image has {floor:.4f}"
