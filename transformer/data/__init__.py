"""Parallel text from its source to host batches of token ids."""
