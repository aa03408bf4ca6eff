"""Checkpoints: save, verify, select, average, restore."""
