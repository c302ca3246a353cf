"""What the columns of the published tables hold: unit and meaning, for `schema.json`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from ..board.results import SUCCESSES
from ..scales import CAP, METRICS

_ENDS = {"low": "low end of its 95 % interval", "high": "high end of its 95 % interval"}
_OF_WORST = {
    "attack": "attack that sets the worst case of",
    "knowledge": "what the worst attack knew of the defense, for",
    "floor": "best guess that reads nothing of the message, in",
    "rank_low": "best rank by",
    "rank_high": "worst rank by",
}
_QUANTILES = {
    "q25": "25 % quantile",
    "median": "median",
    "q75": "75 % quantile",
    "q95": "95 % quantile",
    "best": "best",
}

_FACTS: Mapping[str, tuple[str, str]] = {
    "title": ("", "the board's title"),
    "board": ("", "the kind of board"),
    "attack": ("", "label of the attack"),
    "defense": ("", "label of the defense"),
    "model": ("", "label of the model"),
    "dataset": ("", "label of the dataset"),
    "setting": ("", "label of the setting"),
    "family": ("", "kind of attack or defense"),
    "knowledge": ("", "what the attacker knows of the defense"),
    "control": ("true or false", "whether an attack reads nothing of the message"),
    "standing": ("", "at the floor, or why a row has no rank"),
    "checked": (
        "",
        "how far a verifier checked the row: as submitted, recomputed or re-run; empty for one's own stores",
    ),
    "doubt": ("", "why a row may show too little leakage, words separated by spaces"),
    "above": ("dB", "PSNR beyond the floor"),
    "bytes": ("byte", "size of one message"),
    "dense_bytes": ("byte", "size of one message without a defense"),
    "client_seconds": ("s", "time of a client for one message"),
    "epsilon": ("", "differential privacy of all that the attacker saw of one example"),
    "delta": ("", "chance that epsilon does not hold"),
    "accountant": ("", "how epsilon was computed"),
    "noise": ("", "standard deviation of the noise over the most that one example changes of what is seen"),
    "unit": ("", "what neighbouring inputs differ in and what is seen, for epsilon"),
    "training_epsilon": ("", "differential privacy of the whole training run"),
    "test_accuracy": ("share, 0 to 1", "accuracy of the model trained under the defense"),
    "accuracy_lost": ("share, 0 to 1", "accuracy without a defense less that under it"),
    "victims": ("count", "clients attacked"),
    "victim": ("number", "which client of the list"),
    "image": ("number", "which image of the client's batch"),
    "matched": ("number", "which reconstruction was assigned to the image"),
    "seed": ("number", "seed of the cell"),
    "seeds": ("count", "seeds"),
    "attacks": ("count", "attacks that were run"),
    "attacks_faced": ("count", "attacks that were run to the end"),
    "attacks_expected": ("count", "attacks that apply"),
    "contexts": ("count", "contexts with an attack"),
    "floors": ("count", "contexts with a control"),
    "trials": ("count", "images times seeds"),
    "failed": ("count", "trials without an image; they score the floor"),
    "cells": ("count", "defenses in contexts that the attack ran on"),
    "of_cells": ("count", "defenses in contexts that any attack ran on"),
    "sets": ("count", "worst cases that the attack sets"),
    "breaks": ("", "defenses that the attack is separably above the floor on, by 10 dB or more"),
    "unfit": ("count", "cells where the loss stayed far above the loss at the truth"),
    "gradient_evaluations": ("count", "gradients of the model for one victim"),
    "seconds": ("s", "time for one victim"),
    "oracle_pick": ("dB", "PSNR had the truth picked the restart"),
    "oracle_psnr": ("dB", "PSNR had the truth picked the restart"),
    "rating": ("", "Bradley-Terry rating"),
    "front": ("true or false", "no other row is at least as good in everything and better in one thing"),
    "rank_low": ("rank", "best rank that the data allow"),
    "rank_high": ("rank", "worst rank that the data allow"),
    "flag": ("", "what kind of doubt"),
    "where": ("", "the cells it concerns"),
    "why": ("", "what was measured"),
    "key": ("", "hash of the cell's configuration"),
    "status": ("", "ok, or why there is no image"),
    "finite": ("true or false", "whether the reconstruction held only finite pixels"),
    "loss": ("", "the attacker's loss at its answer"),
    "loss_at_truth": ("", "the attacker's loss at the true images"),
    "loss_at_mean": ("", "the attacker's loss at the mean public image"),
    "fit": (
        "share",
        "how far the loss fell from that at the mean image (0) towards that at the truth (1), median over images",
    ),
    "contrast": ("", "cosine distance between the undefended updates of the mean public image and of the victim"),
    "message_norm": ("", "Euclidean norm of the message"),
    "late_progress": ("share, 0 to 1", "share of the loss's fall in the last tenth of the iterations"),
    "iterations": ("count", "iterations of the attack"),
    "extras": ("JSON", "anything else that was measured"),
    "config": ("JSON", "the resolved choices of the cell"),
    "provenance": ("JSON", "what is known of the cell beside its configuration"),
    "versions": ("JSON", "versions of the software"),
    "device": ("", "the device that computed the cell"),
    "suite": ("", "name of the suite"),
    "suite_version": ("", "version of the suite"),
    "batch_size": ("count", "images a client"),
    "claim": ("", "what a paper reports"),
    "ours": ("as metric", "the same measured here"),
    "reported": ("as metric", "the published number"),
    "tolerance": ("as metric", "by how much both may differ"),
    "relation": ("", "about, at least or at most"),
    "metric": ("", "what is compared"),
    "images": ("count", "images compared"),
    "verdict": ("", "whether both agree"),
    "source": ("", "where the number was published"),
    "server": ("", "who sends the model"),
    "threat_class": ("", "threat model, A to H of Carletti et al., USENIX Security 2025"),
    "surface": ("", "what the server changes: parameters, or the architecture too"),
    "recovered": ("count", "images of a client's batch recovered exactly under the worst attack"),
    "expected": ("count", "images recovered exactly by the server's formula"),
    "honest": ("count", "images recovered exactly from an honest server of the same clients"),
    "queries": ("count", "models that a client is sent for one batch"),
    "added_parameters": ("count", "parameters that the server adds"),
    "added_bytes": ("byte", "what these add to a dense message"),
    "tampered_accuracy": ("share, 0 to 1", "test accuracy of the model that the client is sent"),
    "model_accuracy": ("share, 0 to 1", "test accuracy of the model before the server changed it"),
    "best_image": ("dB", "PSNR of each victim's best image, mean over victims"),
    "refused": ("share, 0 to 1", "victims whose clients send nothing"),
    "false_alarms": ("share, 0 to 1", "rounds with an honest model that are refused"),
    "honest_rounds": ("count", "rounds on which false alarms were counted"),
    "attack_name": ("", "name of the attack's plugin"),
    "attack_family": ("", "kind of attack"),
    "defense_name": ("", "name of the defense's plugin"),
    "defense_family": ("", "kind of defense"),
}


def schema(columns: Iterable[str]) -> list[dict[str, str]]:
    """Return name, unit and meaning of columns."""
    found = []
    for name in columns:
        unit, meaning = describe(str(name))
        found.append({"name": str(name), "unit": unit, "meaning": meaning})
    return found


def describe(name: str) -> tuple[str, str]:
    """Return unit and meaning of a column; both empty where it is not known."""
    if name in _FACTS:
        return _FACTS[name]
    if name in METRICS:
        metric = METRICS[name]
        more = "higher leaks more" if metric.higher_is_better else "lower leaks more"
        cap = f"; in boards each image capped at {CAP:g} dB" if name == "psnr" else ""
        return metric.unit or "no unit", f"{metric.description} ({metric.id}); {more}{cap}"
    if name in SUCCESSES:
        return "share, 0 to 1", f"share of images with {SUCCESSES[name].name}"
    return _derived(name)


def _derived(name: str) -> tuple[str, str]:
    """Describe a column by the one that it belongs to: `psnr_low`, `psnr_attack`, `psnr_oblivious`."""
    base, _, last = name.rpartition("_")
    if last in _ENDS and not base.endswith("rank"):
        return describe(base)[0], f"{base}: {_ENDS[last]}"
    for suffix, text in _OF_WORST.items():
        if name.endswith(f"_{suffix}"):
            base = name.removesuffix(f"_{suffix}")
            unit = describe(base)[0] if suffix == "floor" else "rank" if "rank" in suffix else ""
            return unit, f"{text} {base}"
    if last in _QUANTILES:
        return describe(base)[0], f"{_QUANTILES[last]} of {base} over images"
    if found := re.fullmatch(r"psnr_(oblivious|adaptive|ceiling)", name):
        return "dB", f"PSNR of the best attack that is {found[1].replace('ceiling', 'an oracle')}"
    if found := re.fullmatch(r"(oblivious|adaptive|ceiling)_contexts", name):
        return "count", f"contexts with an attack that is {found[1].replace('ceiling', 'an oracle')}"
    return "", ""
