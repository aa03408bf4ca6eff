"""Which model a config means."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from transformer.config import ModelConfig
from transformer.distributed import sharding
from transformer.models.base import TextModel
from transformer.models.convolutional import ConvolutionalModel
from transformer.models.layers import dtype_in_use
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


Params = dict[str, Any]


class Model:
    """The model's definition without its params.

    Attributes:
      abstract_params: shapes, dtypes and logical axes of the params.
    """

    def __init__(self, config: ModelConfig, vocab_size: int):
        self._make = lambda rngs: make_model(config, vocab_size, rngs)
        module = nnx.eval_shape(lambda: self._make(nnx.Rngs(params=0)))
        self._graphdef, self.abstract_params = nnx.split(module, nnx.Param)
        self._dtype = jnp.dtype(config.dtype)

    def init(self, seed: int) -> Params:
        """Fresh params, float32."""
        return nnx.to_pure_dict(nnx.state(self._make(nnx.Rngs(params=jax.random.key(seed))), nnx.Param))

    def bind(self, params: Params) -> TextModel:
        """The module with these params, for use inside one traced function."""
        return nnx.merge(self._graphdef, nnx.State(params))

    def in_compute_dtype(self, params: Params) -> Params:
        """The params, those that the model multiplies with or looks up in its compute dtype; float32: as they are.

        For a loop, inside which XLA would convert them at every step.
        """
        if self._dtype == jnp.float32:
            return params
        flat = nnx.to_flat_state(self.abstract_params)
        dtypes = {path: dtype_in_use(param, self._dtype) for path, param in flat}
        return jax.tree.map(
            lambda leaf, dtype: leaf.astype(dtype), params, nnx.to_pure_dict(nnx.from_flat_state(dtypes))
        )

    def num_params(self) -> int:
        """How many numbers the params hold."""
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(self.abstract_params))


def abstract_params(model: Model, mesh: Mesh) -> Params:
    """Shapes, dtypes and shardings of the params, for restoring them."""
    shardings = sharding.param_shardings(mesh, model.abstract_params)
    return _with_shardings(nnx.to_pure_dict(model.abstract_params), shardings)


def _with_shardings(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings)
