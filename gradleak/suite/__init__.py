"""Suites: a YAML file that spans a grid, validated, and expanded into cells with stable keys."""

from .cells import (
    AttackCell,
    Cell,
    Draws,
    LeftOut,
    Note,
    TrainingCell,
    attacking,
    build_defense,
    dataset_label,
    key_of,
    question_of,
    unnamed,
    unnoted,
)
from .expand import CORE, Digest, expand
from .parts import DatasetPart, GivenPrior, LearnedPrior, Part
from .read import outline, read
from .schema import HELD_OUT, KNOWLEDGE, UTILITY, Engine, Entry, Prior, Suite, Utility, build_setting

__all__ = [
    "CORE",
    "HELD_OUT",
    "KNOWLEDGE",
    "UTILITY",
    "AttackCell",
    "Cell",
    "DatasetPart",
    "Digest",
    "Draws",
    "Engine",
    "Entry",
    "GivenPrior",
    "LearnedPrior",
    "LeftOut",
    "Note",
    "Part",
    "Prior",
    "Suite",
    "TrainingCell",
    "Utility",
    "attacking",
    "build_defense",
    "build_setting",
    "dataset_label",
    "expand",
    "key_of",
    "outline",
    "question_of",
    "read",
    "unnamed",
    "unnoted",
]
