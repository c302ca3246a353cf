"""Minimises the losses of many stacked trials."""
