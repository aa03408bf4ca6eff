"""The config: schema and validation; imports no JAX."""

from transformer.config.schema import (
    Config,
    DataConfig,
    DecodeConfig,
    EvalConfig,
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
    "EvalConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "TrainConfig",
    "default_config",
]
