"""What a grid promises before any of its cells runs: private images, models that are functions, clients that repeat."""
