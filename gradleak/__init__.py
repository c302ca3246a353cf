"""gradleak: which defense stops which gradient inversion attack, and at what cost."""

__version__ = "0.1.0"
