"""Measurements behind the figures in README.md and docs/; each prints a table and its JSON."""
