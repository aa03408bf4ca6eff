"""How recurrent and convolutional decoders look at the source: one head, additive or dot-product.

B batch, T target length, S source length, D model width.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from transformer.attention.dot_product import LOWEST, Visible, float32_product
from transformer.models.layers import glorot, make_param, use

Array = jax.Array


class SourceAttention(nnx.Module):
    """softmax of a score of every pair of target and source states.

    dot: (W q) · (U k) / √D (Luong et al. 2015, with the paper's scale); additive: v · tanh(W q + U k)
    (Bahdanau et al. 2015), whose memory grows with T · S · D.
    """

    def __init__(self, width: int, score: str, rngs: nnx.Rngs):
        self.score = score
        self.query = make_param(rngs, glorot(), (width, width), ("embed", "hidden"))
        self.key = make_param(rngs, glorot(), (width, width), ("embed", "hidden"))
        if score == "additive":
            self.weigh = make_param(rngs, jax.nn.initializers.normal(width**-0.5), (width,), ("norm",))

    def keys(self, encoded_BSD: Array) -> Array:
        """What scores need of the source, [B, S, D]."""
        return jnp.einsum("bsd,de->bse", encoded_BSD, use(self.key, encoded_BSD.dtype))

    def weights(self, x_BTD: Array, keys_BSD: Array, visible: Visible) -> Array:
        """Of each source state for each target state, float32 [B, T, S], of sum 1 over what is visible."""
        q_BTD = jnp.einsum("btd,de->bte", x_BTD, use(self.query, x_BTD.dtype))
        scores_BTS = (self._dot if self.score == "dot" else self._additive)(q_BTD, keys_BSD)
        mask = visible.mask(scores_BTS.shape[1], scores_BTS.shape[2])[:, 0]
        return jax.nn.softmax(jnp.where(mask, scores_BTS, LOWEST), axis=-1)

    def _dot(self, q_BTD: Array, k_BSD: Array) -> Array:
        scores_BTS = float32_product("btd,bsd->bts", q_BTD, k_BSD)
        return scores_BTS * q_BTD.shape[-1] ** -0.5

    def _additive(self, q_BTD: Array, k_BSD: Array) -> Array:
        # In float32, as are then the sums over S and T that are the gradients of q and k.
        q_BT1D, k_B1SD = q_BTD.astype(jnp.float32)[:, :, None, :], k_BSD.astype(jnp.float32)[:, None, :, :]
        joined_BTSD = jnp.tanh((q_BT1D + k_B1SD).astype(q_BTD.dtype))
        weigh_D = self.weigh[...].astype(q_BTD.dtype)
        return float32_product("btsd,d->bts", joined_BTSD, weigh_D)


def weighted(weights_BTS: Array, values_BSD: Array) -> Array:
    """The mean of the values by these weights, [B, T, D]."""
    return jnp.einsum("bts,bsd->btd", weights_BTS.astype(values_BSD.dtype), values_BSD)
