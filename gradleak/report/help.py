"""What the headings of boards mean, in a sentence each: meaning, unit, direction."""

from __future__ import annotations

from collections.abc import Mapping

from ..scales import CAP

_LEAKS = "Higher leaks more."

HELP: Mapping[str, str] = {
    "rank": "Safest defense or strongest attack first; 2-5 is a tie that the data cannot order.",
    "defense": "What the client does to its message.",
    "attack": "What the attacker runs.",
    "standing": "At the floor: no attack is separably better than a guess that reads nothing of the message. Else why "
    "a row has no rank. Empty: some attack leads.",
    "images ≥ 20 dB, %": "Share of images that the worst attack recovers recognisably, PSNR of 20 dB or more. "
    + _LEAKS,
    "images exact, %": f"Share of images recovered pixel-exact, PSNR of {CAP:g} dB or more: every pixel right to 8 "
    f"bits. {_LEAKS}",
    "accuracy lost, points": "Test accuracy of training without a defense, less that under it, percentage points. "
    "Lower is better.",
    "accuracy, %": "Test accuracy of the model trained under the defense. Higher is better.",
    "bytes": "Size of one message of one client. Lower is cheaper.",
    "epsilon": "Differential privacy of all that the attacker saw of an example: the message, or the sum of several "
    "clients. Lower is safer; empty: no guarantee.",
    "training epsilon": "Differential privacy of the whole training run. Lower is safer.",
    "noise multiplier": "Standard deviation of the noise on what the attacker saw, over the most that one example "
    "changes of it. Higher is safer.",
    "checked": "How far the row was verified: as submitted; recomputed, what needs no attack; re-run, all of it.",
    "doubt": "Why the row may show too little leakage; the words stand in the notes. Empty: no doubt was found.",
    "PSNR, dB": f"Mean over images under the worst attack, each capped at {CAP:g} dB. {_LEAKS}",
    "floor, dB": "PSNR of the best guess that reads nothing of the message.",
    "above floor, dB": "PSNR beyond the best guess that reads nothing of the message. " + _LEAKS,
    "worst attack": "The attack or guess with the highest mean PSNR, and what it knew of the defense.",
    "most exposed, dB": "95 % quantile of PSNR over images: the client that is hit worst. " + _LEAKS,
    "attacks": "Attacks that the defense faced, of those that apply to it.",
    "quartiles, dB": "25 %, 50 % and 75 % quantile of PSNR over images. " + _LEAKS,
    "oblivious, dB": "PSNR of the best attack that knows nothing of the defense. " + _LEAKS,
    "adaptive, dB": "PSNR of the best attack made for the defense. " + _LEAKS,
    "oracle, dB": "PSNR of an attack that knows even the client's private randomness: a ceiling. " + _LEAKS,
    "SSIM": "Structural similarity under its own worst attack, at most 1. " + _LEAKS,
    "MS-SSIM": "Structural similarity over several scales, at most 1. " + _LEAKS,
    "LPIPS": "Learned perceptual distance, from 0. Lower leaks more.",
    "LPIPS at 64": "The same of images enlarged to 64 pixels, which small ones have too. Lower leaks more.",
    "fit, %": "How far the worst attack's loss fell, from that at the mean image (0) to the truth's (100), median. "
    "Low: the attack may have failed.",
    "contrast": "How much an undefended update depends on its image: cosine distance, 0 to 2, from that of the mean "
    "image. Near 0 matching gradients tells nothing.",
    "re-identified, %": "Share of images nearer to their reconstruction than any other candidate. " + _LEAKS,
    "labels, %": "Share of images whose label was recovered. " + _LEAKS,
    "images ≥ 30 dB, %": "Share of images with a PSNR of 30 dB or more. " + _LEAKS,
    "images SSIM ≥ 0.6, %": "Share of images with an SSIM of 0.6 or more. " + _LEAKS,
    "images LPIPS ≤ 0.2, %": "Share of images with an LPIPS of 0.2 or less. " + _LEAKS,
    "images LPIPS ≤ 0.1, %": "Share of images with an LPIPS of 0.1 or less. " + _LEAKS,
    "client, s": "Seconds a client computes for one message. Lower is cheaper.",
    "failed": "Trials that gave no image, of all; they score the floor.",
    "knowledge": "What the attack knew of the defense: nothing (oblivious), its parameters, or its public randomness.",
    "family": "How the attack works.",
    "sets worst of": "Defenses, context by context, whose worst case this attack is. Higher is stronger.",
    "gradients": "Gradients of the model computed for one victim, on average. Lower is cheaper.",
    "cells": "Defenses in contexts that the attack ran on, of all.",
    "unfit": "Cells where the attack's loss stayed far above the loss at the truth: it was not tuned for these.",
    "rating": "Bradley-Terry rating, every victim a game. Higher is stronger.",
    "seconds": "Seconds for one victim, on average. Lower is cheaper.",
    "specialist against": "Defenses that an attack without a rank breaks.",
    "setting": "How the clients train, and who sends the model.",
    "server": "Who sends the model, and what it does to it first.",
    "exact images": "Images of a client's batch that the worst attack recovers exactly, mean over victims. " + _LEAKS,
    "of": "Images in a client's batch.",
    "expected": "Exact images that the server's formula says; empty where it has none.",
    "honest": "Exact images that the worst attack recovers where the same clients have an honest server.",
    "class": "Threat model: F chooses the model, G also has public images.",
    "surface": "What the server changes: parameters, or the architecture too.",
    "queries": "Models that one client is sent for one batch, on average.",
    "refused, %": "Share of victims whose clients see through the model and send nothing.",
    "false alarms, %": "Share of rounds with an honest model that are refused all the same. Lower is cheaper.",
    "best image, dB": "PSNR of each victim's best image under the worst attack, mean over victims. " + _LEAKS,
    "tampered accuracy, %": "Test accuracy of the model that the client is sent.",
    "model accuracy, %": "Test accuracy of the model before the server changed it.",
    "added parameters": "Parameters that the server adds to the model.",
    "added bytes": "Bytes that these add to a dense message.",
    "honest rounds": "Rounds with an honest model on which false alarms were counted.",
    "front": "No other row is at least as good in everything and better in one thing.",
}
"""The sentence behind each heading."""
