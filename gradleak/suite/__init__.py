"""Suites: a YAML file that spans a grid, validated, and expanded into cells with stable keys."""

from .cells import (
    UTILITY,
    Cell,
    LeftOut,
    Note,
    attack_and_defense,
    build_defense,
    build_defense_of,
    check_files,
    dataset_label,
    key_of,
    unnamed,
    unnoted,
)
from .expand import CORE, Digest, expand
from .read import read
from .schema import KNOWLEDGE, Engine, Entry, Prior, Suite, Utility, build_setting

__all__ = [
    "CORE",
    "KNOWLEDGE",
    "UTILITY",
    "Cell",
    "Digest",
    "Engine",
    "Entry",
    "LeftOut",
    "Note",
    "Prior",
    "Suite",
    "Utility",
    "attack_and_defense",
    "build_defense",
    "build_defense_of",
    "build_setting",
    "check_files",
    "dataset_label",
    "expand",
    "key_of",
    "read",
    "unnamed",
    "unnoted",
]
