"""The contracts of plugins as checks on a small case: what `gradleak check` and the tests of built-ins run."""

from .checks import CHECKS, check, check_file
from .findings import Broken, Finding, Unchecked

__all__ = ["CHECKS", "Broken", "Finding", "Unchecked", "check", "check_file"]
