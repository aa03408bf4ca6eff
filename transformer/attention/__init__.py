"""Attention as pure functions of arrays."""
