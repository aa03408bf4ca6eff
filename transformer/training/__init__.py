"""The train step, the optimizer, the trainer, metrics and preemption."""
