"""Search over any step function, and what is asked of one translation."""
