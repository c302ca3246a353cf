"""Clients, one file each; the file stem is the name."""
