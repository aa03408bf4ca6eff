"""The config: schema and validation; imports no JAX."""

from transformer.config.schema import Config as Config
from transformer.config.schema import DataConfig as DataConfig
from transformer.config.schema import DecodeConfig as DecodeConfig
from transformer.config.schema import EvalConfig as EvalConfig
from transformer.config.schema import MeshConfig as MeshConfig
from transformer.config.schema import MixtureEntry as MixtureEntry
from transformer.config.schema import ModelConfig as ModelConfig
from transformer.config.schema import OptimizerConfig as OptimizerConfig
from transformer.config.schema import TrainConfig as TrainConfig
from transformer.config.schema import default_config as default_config
