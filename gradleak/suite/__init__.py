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
from .contexts import grids
from .expand import CORE, Digest, expand
from .fields import Entry
from .parts import DatasetPart, GivenPrior, LearnedPrior, Part, plain
from .read import outline, read, title_of
from .schema import HELD_OUT, KNOWLEDGE, UTILITY, Context, Engine, Prior, Suite, Utility
from .settings import build_setting

__all__ = [
    "CORE",
    "HELD_OUT",
    "KNOWLEDGE",
    "UTILITY",
    "AttackCell",
    "Cell",
    "Context",
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
    "grids",
    "key_of",
    "outline",
    "plain",
    "question_of",
    "read",
    "title_of",
    "unnamed",
    "unnoted",
]
