"""The registry of architectures, and the definition of a model apart from its params."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from transformer.config import ModelConfig
from transformer.distributed import sharding
from transformer.models.base import Seq2SeqModel
from transformer.models.convolutional import ConvSeq2Seq
from transformer.models.lstm import LstmSeq2Seq
from transformer.models.params import param_compute_dtype
from transformer.models.transformer import Transformer

MODELS: dict[str, type[Seq2SeqModel]] = {
    "attention": Transformer,
    "recurrent": LstmSeq2Seq,
    "convolutional": ConvSeq2Seq,
}


Params = dict[str, Any]


class ModelDef:
    """A model's definition without its params.

    Attributes:
      config: its `model` section.
      abstract_params: shapes, dtypes and logical axes of the params.
    """

    def __init__(self, config: ModelConfig, vocab_size: int):
        self.config = config
        self._build = lambda rngs: MODELS[config.family](config, vocab_size, rngs)
        module = nnx.eval_shape(lambda: self._build(nnx.Rngs(params=0)))
        self._graphdef, self.abstract_params = nnx.split(module, nnx.Param)

    def init(self, seed: int) -> Params:
        """Fresh params, float32."""
        return nnx.to_pure_dict(nnx.state(self._build(nnx.Rngs(params=jax.random.key(seed))), nnx.Param))

    def bind(self, params: Params) -> Seq2SeqModel:
        """The module with these params, for use inside one traced function."""
        return nnx.merge(self._graphdef, nnx.State(params))

    def in_compute_dtype(self, params: Params) -> Params:
        """Casts matrices and tables to the compute dtype; the rest stays float32.

        For decoding: in its loop XLA would cast them at every step.
        """
        dtype = jnp.dtype(self.config.dtype)
        if dtype == jnp.float32:
            return params
        flat = nnx.to_flat_state(self.abstract_params)
        dtypes = {path: param_compute_dtype(param, dtype) for path, param in flat}
        return jax.tree.map(
            lambda leaf, dtype: leaf.astype(dtype), params, nnx.to_pure_dict(nnx.from_flat_state(dtypes))
        )

    def num_params(self) -> int:
        """The number of parameters."""
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(self.abstract_params))


def sharded_param_shapes(model: ModelDef, mesh: Mesh) -> Params:
    """Shapes, dtypes and shardings of the params, for restoring them."""
    shardings = sharding.param_shardings(mesh, model.abstract_params)
    return with_shardings(nnx.to_pure_dict(model.abstract_params), shardings)


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Shapes and dtypes with a sharding for each, as restoring takes them."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
