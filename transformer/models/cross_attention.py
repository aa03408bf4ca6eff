"""Single-head cross-attention of the LSTM and convolutional models.

B batch, T target length, S source length, D width.
Attribute names are part of the checkpoint format.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from transformer.attention.dot_product import einsum_f32, masked_softmax
from transformer.attention.mask import AttentionMask
from transformer.models.linear import linear
from transformer.models.params import glorot, make_param, read_param


class SingleHeadCrossAttention(nnx.Module):
    """Single-head cross-attention of the LSTM and convolutional models.

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
        """Projected keys of the source, [B, S, D]."""
        return linear("...d,de->...e", encoded_BSD, read_param(self.key, encoded_BSD.dtype))

    def weights(self, x_BTD: Array, keys_BSD: Array, mask: AttentionMask) -> Array:
        """Weights of each target and source state, float32 [B, T, S], of sum 1 over the source."""
        q_BTD = linear("...d,de->...e", x_BTD, read_param(self.query, x_BTD.dtype))
        scores_BTS = (self._dot if self.score == "dot" else self._additive)(q_BTD, keys_BSD)
        return masked_softmax(scores_BTS[:, None], mask)[:, 0]  # of one head

    def _dot(self, q_BTD: Array, k_BSD: Array) -> Array:
        scores_BTS = einsum_f32("btd,bsd->bts", q_BTD, k_BSD)
        return scores_BTS * q_BTD.shape[-1] ** -0.5

    def _additive(self, q_BTD: Array, k_BSD: Array) -> Array:
        # In float32, and so are the gradients of q and k, sums over S and T.
        q_BT1D, k_B1SD = q_BTD.astype(jnp.float32)[:, :, None, :], k_BSD.astype(jnp.float32)[:, None, :, :]
        hidden_BTSD = jnp.tanh((q_BT1D + k_B1SD).astype(q_BTD.dtype))
        v_D = self.weigh[...].astype(q_BTD.dtype)
        return einsum_f32("btsd,d->bts", hidden_BTSD, v_D)


def weighted_sum(weights_BTS: Array, values_BSD: Array) -> Array:
    """The weighted sum of the values, [B, T, D]."""
    return jnp.einsum("bts,bsd->btd", weights_BTS.astype(values_BSD.dtype), values_BSD)
