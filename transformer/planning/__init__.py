"""A training step compiled for chips that are not here."""
