"""Verification: a stranger's bundle is computed again, as far as that can be done."""

from .bundle import Extent, Verified, verify
from .findings import Finding

__all__ = ["Extent", "Finding", "Verified", "verify"]
