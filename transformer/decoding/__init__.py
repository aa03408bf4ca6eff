"""Decoding: beam search and sampling over any step function, constraints, alignment, the translator."""
