"""The compiled training step of chips that are not here: what it needs, costs and could reach."""
