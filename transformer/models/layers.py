"""The layers of the paper: embeddings, position encodings, attention, feed-forward, residual blocks.

B batch, T target length, S source or key length, D model width, H heads, K width per head (`value_dim` may give values
another), F feed-forward width, V vocabulary, N beams.

Activations have the dtype of the input, and logical axis names, which only `sharding` maps to a mesh. Attribute names
are part of the checkpoint format: renaming one breaks old checkpoints.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from transformer.attention import dot_product
from transformer.attention.dispatch import attend
from transformer.attention.dot_product import einsum_f32
from transformer.attention.dropout import dropout
from transformer.attention.mask import AttentionMask
from transformer.attention.rotary import Rotation, rotate
from transformer.config import ModelConfig
from transformer.distributed import sharding
from transformer.models.linear import linear
from transformer.models.norm import Norm
from transformer.models.params import Key, add_bias, glorot, make_bias, make_param, read_param


def sinusoidal_position_encoding(length: int, width: int) -> np.ndarray:
    """Position encodings, float32 [length, width]: sines in even columns, cosines in odd ones (paper, 3.5)."""
    position = np.arange(length, dtype=np.float64)[:, None]
    rate = np.exp(-math.log(10000.0) * np.arange(0, width, 2, dtype=np.float64) / width)[None, :]
    table = np.empty((length, width), np.float32)
    table[:, 0::2], table[:, 1::2] = np.sin(position * rate), np.cos(position * rate)
    return table


class Embedding(nnx.Module):
    """A matrix [V, D] that embeds ids, scaled by √D, and, transposed, gives logits (paper, 3.4)."""

    def __init__(self, vocab_size: int, width: int, rngs: nnx.Rngs):
        init = jax.nn.initializers.normal(width**-0.5)
        self.table = make_param(rngs, init, (vocab_size, width), ("vocab", "embed"))

    def __call__(self, ids: Array, dtype: jnp.dtype) -> Array:
        """ids [...] → [..., D]."""
        table_VD = read_param(self.table)
        return jnp.take(table_VD, ids, axis=0).astype(dtype) * jnp.asarray(table_VD.shape[1] ** 0.5, dtype)

    def logits(self, x: Array) -> Array:
        """[..., D] → float32 [..., V]."""
        table_VD = read_param(self.table, x.dtype)
        logits = linear("...d,vd->...v", x, table_VD, einsum_f32)
        return sharding.with_logical_constraint(logits, ("batch", "length", "vocab"))


def gelu(x: Array) -> Array:
    """x Φ(x) (Hendrycks & Gimpel 2016); in float32 by erf, which a CPU computes faster than erfc."""
    if x.dtype != jnp.float32:
        return jax.nn.gelu(x, approximate=False)
    return 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"relu": jax.nn.relu, "gelu": gelu, "silu": jax.nn.silu}
ACTIVATIONS |= {"swiglu": ACTIVATIONS["silu"], "geglu": ACTIVATIONS["gelu"]}


class FeedForward(nnx.Module):
    """f(x W1 + b1) W2 + b2, f = ReLU (paper, equation 2) or another activation.

    Gated: (f(x W3 + b3) ⊙ (x W1 + b1)) W2 + b2 (Shazeer 2020).
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        width, mlp_dim, use_bias = config.emb_dim, config.mlp_dim, config.use_bias
        self.activation, self.dropout_rate = config.activation, config.mlp_dropout_rate
        self.kernel_in = make_param(rngs, glorot(), (width, mlp_dim), ("embed", "mlp"))
        self.bias_in = make_bias(use_bias, rngs, mlp_dim, "mlp")
        self.kernel_out = make_param(rngs, glorot(), (mlp_dim, width), ("mlp", "embed"))
        self.bias_out = make_bias(use_bias, rngs, width)
        gated = config.is_gated
        self.kernel_gate = make_param(rngs, glorot(), (width, mlp_dim), ("embed", "mlp")) if gated else None
        self.bias_gate = make_bias(gated and use_bias, rngs, mlp_dim, "mlp")

    def __call__(self, x: Array, key: Key = None) -> Array:
        hidden, activate = self._hidden(x, self.kernel_in, self.bias_in), ACTIVATIONS[self.activation]
        if self.kernel_gate is None:
            hidden = activate(hidden)
        else:
            hidden = activate(self._hidden(x, self.kernel_gate, self.bias_gate)) * hidden
        hidden = dropout(hidden, self.dropout_rate, key)
        return add_bias(linear("...f,fd->...d", hidden, read_param(self.kernel_out, x.dtype)), self.bias_out)

    def _hidden(self, x: Array, kernel: nnx.Param, bias: nnx.Param | None) -> Array:
        """[..., D] → [..., F], before the activation."""
        hidden = linear("...d,df->...f", x, read_param(kernel, x.dtype))
        return add_bias(sharding.with_logical_constraint(hidden, ("batch", "length", "mlp")), bias)


class MultiHeadAttention(nnx.Module):
    """Multi-head attention (paper, 3.2.2): H heads, projections without biases, any width of keys and values.

    Queries and keys may be normalized (`model.qk_norm`: Henry et al. 2020; with a learned scale as in Dehghani et al.
    2023), then rotated.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.dropout_rate, self.implementation = config.attention_dropout_rate, config.attention
        into_heads = jax.nn.initializers.variance_scaling(
            config.qkv_init_gain**2, "fan_avg", "uniform", in_axis=0, out_axis=(1, 2)
        )
        from_heads = glorot(in_axis=(0, 1), out_axis=2)
        width, heads = config.emb_dim, config.num_heads
        key_shape, value_shape = ((width, heads, dim // heads) for dim in (config.qkv_dim, config.value_dim))
        axes = ("embed", "heads", "kv")
        self.query = make_param(rngs, into_heads, key_shape, axes)
        self.key = make_param(rngs, into_heads, key_shape, axes)
        self.value = make_param(rngs, into_heads, value_shape, axes)
        self.out = make_param(rngs, from_heads, (*value_shape[1:], width), ("heads", "kv", "embed"))
        self.query_norm = Norm(config, key_shape[-1], rngs, use_bias=False) if config.qk_norm else None
        self.key_norm = Norm(config, key_shape[-1], rngs, use_bias=False) if config.qk_norm else None

    def queries(self, x: Array, rotation: Rotation | None = None) -> Array:
        """[..., D] → [..., H, K]."""
        queries = linear("...d,dhk->...hk", x, read_param(self.query, x.dtype))
        return norm_and_rotate(queries, self.query_norm, rotation)

    def keys_values(self, x: Array, rotation: Rotation | None = None) -> tuple[Array, Array]:
        """[..., D] → keys and values, each [..., H, K]."""
        keys = linear("...d,dhk->...hk", x, read_param(self.key, x.dtype))
        keys = norm_and_rotate(keys, self.key_norm, rotation)
        return keys, linear("...d,dhk->...hk", x, read_param(self.value, x.dtype))

    def project(self, heads: Array) -> Array:
        """[..., H, K] → [..., D]."""
        return linear("...hk,hkd->...d", heads, read_param(self.out, heads.dtype))

    def __call__(
        self,
        x_BTD: Array,
        kv_BSD: Array,
        mask: AttentionMask,
        dropout_key: Key = None,
        rotation: Rotation | None = None,
        weights: list[Array] | None = None,
    ) -> Array:
        """Attends from `x_BTD` to `kv_BSD`; returns [B, T, D].

        Args:
          weights: a list to which the weights before dropout are appended, float32 [B, H, T, S].
        """
        q_BTHK, k_BSHK, v_BSHK = (
            sharding.with_logical_constraint(heads, sharding.HEAD_AXES)
            for heads in (self.queries(x_BTD, rotation), *self.keys_values(kv_BSD, rotation))
        )
        if weights is not None:
            weights.append(dot_product.attention_weights(q_BTHK, k_BSHK, mask))
        return self.project(attend(self.implementation, q_BTHK, k_BSHK, v_BSHK, mask, self.dropout_rate, dropout_key))

    def attend_to_source(self, x_BND: Array, k_BHKS: Array, v_BHSK: Array, mask: AttentionMask) -> Array:
        """Cross-attention of each beam to the source, whose keys and values were computed before."""
        return self.project(dot_product.decode_attention(self.queries(x_BND), k_BHKS, v_BHSK, mask))

    def source_attention_weights(self, x_BND: Array, k_BHKS: Array, mask: AttentionMask) -> Array:
        """The weights of `attend_to_source`: float32 [B, H, N, S]."""
        return dot_product.decode_attention_weights(self.queries(x_BND), k_BHKS, mask)


def norm_and_rotate(heads: Array, norm: Norm | None, rotation: Rotation | None) -> Array:
    """Queries or keys [..., H, K] as attention takes them."""
    heads = heads if norm is None else norm(heads)
    return heads if rotation is None else rotate(heads, rotation)


class ResidualBlock(nnx.Module):
    """Dropout, residual connection and norm around a sublayer.

    post: norm(x + dropout(f(x))) (paper, 3.1); pre: x + dropout(f(norm(x))).
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.post, self.dropout_rate = config.norm == "post", config.dropout_rate
        self.norm = Norm(config, config.emb_dim, rngs)

    def __call__(self, x: Array, sublayer: Callable[[Array], Array], key: Key = None) -> Array:
        return self.after(x, sublayer(self.before(x)), key)

    def before(self, x: Array) -> Array:
        """The input of the sublayer."""
        return x if self.post else self.norm(x)

    def after(self, x: Array, out: Array, key: Key = None) -> Array:
        """Adds the output of the sublayer to x."""
        out = sharding.with_logical_constraint(out, sharding.ACTIVATION_AXES)
        out = dropout(out, self.dropout_rate, key)
        return self.norm(x + out) if self.post else x + out
