"""Suites: a YAML file that spans a grid, validated, and expanded into cells with stable keys."""

from .cells import UTILITY, Cell, attack_and_defense, build_defense, build_defense_of, check_files, key_of, unnamed
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
    "Prior",
    "Suite",
    "Utility",
    "attack_and_defense",
    "build_defense",
    "build_defense_of",
    "build_setting",
    "check_files",
    "expand",
    "key_of",
    "read",
    "unnamed",
]
