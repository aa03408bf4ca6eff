"""The config: fields with bounds and meaning, and what is checked before JAX is imported."""

from transformer.config.schema import (
    Config,
    DataConfig,
    DecodeConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    default_config,
)

__all__ = [
    "Config",
    "DataConfig",
    "DecodeConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "TrainConfig",
    "default_config",
]
