"""Which model a config means."""

from flax import nnx

from transformer.config import ModelConfig
from transformer.models.base import TextModel
from transformer.models.convolutional import ConvolutionalModel
from transformer.models.lstm import RecurrentModel
from transformer.models.transformer import Transformer

FAMILIES: dict[str, type[TextModel]] = {
    "attention": Transformer,
    "recurrent": RecurrentModel,
    "convolutional": ConvolutionalModel,
}


def make_model(config: ModelConfig, vocab_size: int, rngs: nnx.Rngs) -> TextModel:
    """A model of the config's family, with fresh params."""
    return FAMILIES[config.family](config, vocab_size, rngs)
