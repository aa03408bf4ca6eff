"""The blocks that the model stacks: embeddings, positions, LayerNorm, multi-head attention, feed-forward.

B batch, T target length, S source or key length, D model width, H heads, K width per head,
F feed-forward width, V vocabulary, N beams.

Params are float32, and carry the logical names of their axes, as activations are given theirs, which only
`sharding` maps to a mesh. Activations have the dtype of the input.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from transformer.attention import dot_product, fused
from transformer.attention.blockwise import blockwise_attention
from transformer.attention.dot_product import float32_product
from transformer.attention.dropout import dropout
from transformer.attention.mask import LOWEST, Visible
from transformer.attention.ring import ring_attention
from transformer.config.validation import BLOCKWISE_FROM, KERNELS
from transformer.distributed import sharding

Key = Array | None

POLICIES: dict[str, Callable] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def make_stack(layers: Sequence[nnx.Module], scan: bool) -> nnx.Module:
    """The layers as a list, or with `scan` as one whose params have a first axis `layers`, of the same values."""
    if not scan:
        return nnx.List(layers)
    states = [nnx.state(layer) for layer in layers]
    stacked = nnx.merge(nnx.graphdef(layers[0]), jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))
    for _, param in nnx.to_flat_state(nnx.state(stacked, nnx.Param)):
        param.set_metadata(axes=("layers", *param.get_metadata()["axes"]))
    return stacked


def layers_of(stack: nnx.Module, count: int) -> list[Any]:
    """The layers, one by one, however they are kept."""
    if isinstance(stack, nnx.List):
        return list(stack)
    graphdef, params = nnx.split(stack)
    return [nnx.merge(graphdef, jax.tree.map(lambda leaf, i=i: leaf[i], params)) for i in range(count)]


def run_stack(
    stack: nnx.Module, x_BTD: Array, keys_L: Key, remat: str, call: Callable[[Any, Array, Key], Array]
) -> Array:
    """`call(layer, x_BTD, key)` of one layer after the other.

    Args:
      keys_L: of dropout, one a layer; None: nothing is dropped.
      remat: what the backward pass computes again, `none` or one of POLICIES (Chen et al. 2016). Params that were
        gathered to be used are gathered again in any case, else each device would keep those of all layers.
    """

    def kept(function: Callable) -> Callable:
        if remat == "none":
            gathers = sharding.num_shards("embed") > 1
            return jax.checkpoint(function, policy=sharding.save_all_but_gathered) if gathers else function
        return jax.checkpoint(function, policy=POLICIES[remat])

    if isinstance(stack, nnx.List):
        for i, layer in enumerate(stack):
            key = None if keys_L is None else keys_L[i]
            x_BTD = kept(lambda x, key, layer=layer: call(layer, x, key))(x_BTD, key)
        return x_BTD
    graphdef, params = nnx.split(stack)
    body = kept(lambda x, layer: (call(nnx.merge(graphdef, layer[0]), x, layer[1]), None))
    return jax.lax.scan(body, x_BTD, (params, keys_L))[0]


EPSILON = 1e-6
STATES = ("batch", "length", "embed")  # axes of what passes from layer to layer
glorot = jax.nn.initializers.glorot_uniform


def make_param(rngs: nnx.Rngs, init: Callable, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    """A float32 parameter whose axes have logical names."""
    return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=axes)


def use(param: nnx.Param, dtype: jnp.dtype | None = None) -> Array:
    """A param to compute with, in a dtype, and whole where only its storage is split."""
    value = param[...] if dtype is None else param[...].astype(dtype)
    axes = param.get_metadata()["axes"]
    return sharding.all_gather_param(value, axes[len(axes) - value.ndim :])  # without that of the layers, if stacked


def dtype_in_use(param: nnx.Param, dtype: jnp.dtype) -> jnp.dtype:
    """The dtype that a model computing in `dtype` wants of a param: vectors and positions are added in float32."""
    axes = [axis for axis in param.get_metadata()["axes"] if axis != "layers"]
    return jnp.dtype(jnp.float32) if len(axes) == 1 or "positions" in axes else dtype


def split_key(key: Key, count: int) -> list[Key]:
    """`count` keys for dropout, or as many times None: nothing is dropped."""
    return [None] * count if key is None else list(jax.random.split(key, count))


def sinusoids(length: int, width: int) -> np.ndarray:
    """Position encodings, float32 [length, width]: sines in even places, cosines in odd ones (paper, 3.5)."""
    position = np.arange(length, dtype=np.float64)[:, None]
    rate = np.exp(-math.log(10000.0) * np.arange(0, width, 2, dtype=np.float64) / width)[None, :]
    table = np.empty((length, width), np.float32)
    table[:, 0::2], table[:, 1::2] = np.sin(position * rate), np.cos(position * rate)
    return table


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: Array, scale_D: Array, bias_D: Array, epsilon: float = EPSILON) -> Array:
    """(x - mean) / √(variance + ε) · scale + bias over the last axis, computed in float32.

    The gradient is written by hand: XLA's CPU back end compiles the one of autodiff badly.
    """
    return _layer_norm_forward(x, scale_D, bias_D, epsilon)[0]


def _broadcast(vector_D: Array, x: Array) -> Array:
    return jnp.broadcast_to(vector_D, x.shape)


def _layer_norm_forward(x: Array, scale_D: Array, bias_D: Array, epsilon: float) -> tuple[Array, tuple]:
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)
    normed = centred * inverse
    out = normed * _broadcast(scale_D, x) + _broadcast(bias_D, x)
    return out.astype(x.dtype), (normed, inverse, scale_D)


def _layer_norm_backward(epsilon: float, saved: tuple, grad: Array) -> tuple[Array, Array, Array]:
    normed, inverse, scale_D = saved
    wide = grad.astype(jnp.float32)
    leading = tuple(range(grad.ndim - 1))
    scaled = wide * _broadcast(scale_D, grad)
    along = (scaled * normed).mean(-1, keepdims=True)
    grad_x = inverse * (scaled - scaled.mean(-1, keepdims=True) - normed * along)
    return grad_x.astype(grad.dtype), (wide * normed).sum(leading), wide.sum(leading)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def add_bias(x: Array, bias_D: Array) -> Array:
    """x + bias over the last axis, in the dtype of x.

    It is added in float32, so that the bias' gradient, a sum over all tokens, is summed in float32: in bfloat16 it is
    10% to 30% wrong for a batch of 25,000.
    """
    return (x.astype(jnp.float32) + _broadcast(bias_D, x)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """LayerNorm with a learned scale and bias."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.scale = make_param(rngs, jax.nn.initializers.ones, (width,), ("norm",))
        self.bias = make_param(rngs, jax.nn.initializers.zeros, (width,), ("norm",))

    def __call__(self, x: Array) -> Array:
        return layer_norm(x, self.scale[...], self.bias[...])


class Embedding(nnx.Module):
    """A matrix [V, D] that embeds ids, times √D, and, transposed, turns states into logits (paper, 3.4)."""

    def __init__(self, vocab_size: int, width: int, rngs: nnx.Rngs):
        init = jax.nn.initializers.normal(width**-0.5)
        self.table = make_param(rngs, init, (vocab_size, width), ("vocab", "embed"))

    def __call__(self, ids: Array, dtype: jnp.dtype) -> Array:
        """ids [...] → [..., D]."""
        table_VD = use(self.table)
        return jnp.take(table_VD, ids, axis=0).astype(dtype) * jnp.asarray(table_VD.shape[1] ** 0.5, dtype)

    def logits(self, x: Array) -> Array:
        """[..., D] → float32 [..., V]."""
        table_VD = use(self.table, x.dtype)
        logits = dot_product.float32_product("...d,vd->...v", x, table_VD)
        return sharding.with_logical_constraint(logits, ("batch", "length", "vocab"))


class FeedForward(nnx.Module):
    """max(0, x W1 + b1) W2 + b2 (paper, equation 2)."""

    def __init__(self, width: int, mlp_dim: int, dropout_rate: float, rngs: nnx.Rngs):
        self.dropout_rate = dropout_rate
        self.kernel_in = make_param(rngs, glorot(), (width, mlp_dim), ("embed", "mlp"))
        self.bias_in = make_param(rngs, jax.nn.initializers.zeros, (mlp_dim,), ("mlp",))
        self.kernel_out = make_param(rngs, glorot(), (mlp_dim, width), ("mlp", "embed"))
        self.bias_out = make_param(rngs, jax.nn.initializers.zeros, (width,), ("norm",))

    def __call__(self, x: Array, key: Key = None) -> Array:
        hidden = jnp.einsum("...d,df->...f", x, use(self.kernel_in, x.dtype))
        hidden = sharding.with_logical_constraint(hidden, ("batch", "length", "mlp"))
        hidden = jax.nn.relu(add_bias(hidden, self.bias_in[...]))
        hidden = dropout(hidden, self.dropout_rate, key)
        return add_bias(jnp.einsum("...f,fd->...d", hidden, use(self.kernel_out, x.dtype)), self.bias_out[...])


class MultiHeadAttention(nnx.Module):
    """Multi-head attention (paper, 3.2.2): H heads, projections without biases, keys and values of free width."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        qkv_dim: int,
        value_dim: int,
        dropout_rate: float,
        path: str,
        rngs: nnx.Rngs,
        gain: float = 1.0,
    ):
        self.dropout_rate, self.path = dropout_rate, path
        into_heads = jax.nn.initializers.variance_scaling(gain**2, "fan_avg", "uniform", in_axis=0, out_axis=(1, 2))
        from_heads = glorot(in_axis=(0, 1), out_axis=2)
        key_shape, value_shape = ((width, num_heads, dim // num_heads) for dim in (qkv_dim, value_dim))
        axes = ("embed", "heads", "kv")
        self.query = make_param(rngs, into_heads, key_shape, axes)
        self.key = make_param(rngs, into_heads, key_shape, axes)
        self.value = make_param(rngs, into_heads, value_shape, axes)
        self.out = make_param(rngs, from_heads, (*value_shape[1:], width), ("heads", "kv", "embed"))

    def queries(self, x: Array) -> Array:
        """[..., D] → [..., H, K]."""
        return jnp.einsum("...d,dhk->...hk", x, use(self.query, x.dtype))

    def keys_values(self, x: Array) -> tuple[Array, Array]:
        """[..., D] → keys and values, each [..., H, K]."""
        keys = jnp.einsum("...d,dhk->...hk", x, use(self.key, x.dtype))
        return keys, jnp.einsum("...d,dhk->...hk", x, use(self.value, x.dtype))

    def project(self, heads: Array) -> Array:
        """[..., H, K] → [..., D]."""
        return jnp.einsum("...hk,hkd->...d", heads, use(self.out, heads.dtype))

    def __call__(self, x_BTD: Array, memory_BSD: Array, visible: Visible, key: Key = None) -> Array:
        """Queries from `x_BTD`, keys and values from `memory_BSD`; returns [B, T, D]."""
        q_BTHK, k_BSHK, v_BSHK = (
            sharding.with_logical_constraint(heads, ("batch", "length", "heads", "kv"))
            for heads in (self.queries(x_BTD), *self.keys_values(memory_BSD))
        )
        queries, keys = q_BTHK.shape[1], k_BSHK.shape[1]
        kernel = ""
        if self.path in KERNELS or (self.path == "auto" and is_long(queries, keys)):
            kernel = fused.here(q_BTHK, v_BSHK, visible, 0.0 if key is None else self.dropout_rate)
        path = choose_path(self.path, queries, keys, kernel)
        if path == "plain":
            mask = visible.mask(queries, keys)
            heads_BTHK = dot_product.dot_product_attention(q_BTHK, k_BSHK, v_BSHK, mask, self.dropout_rate, key)
        elif path in KERNELS:
            attend = fused.splash_attention if path == "splash" else fused.cudnn_attention
            heads_BTHK = attend(q_BTHK, k_BSHK, v_BSHK, visible)
        else:
            by_blocks = ring_attention if path == "ring" else blockwise_attention
            heads_BTHK = by_blocks(q_BTHK, k_BSHK, v_BSHK, visible, self.dropout_rate, key)
        return self.project(heads_BTHK)

    def look(self, x_BND: Array, k_BHKS: Array, v_BHSK: Array, visible: Visible) -> Array:
        """Queries from `x_BND` over keys and values already computed, the source's while decoding."""
        mask = visible.mask(x_BND.shape[1], v_BHSK.shape[2])
        return self.project(dot_product.step_attention(self.queries(x_BND), k_BHKS, v_BHSK, mask))

    def look_weights(self, x_BND: Array, k_BHKS: Array, visible: Visible) -> Array:
        """How much each of these queries attends to each key: float32 [B, H, N, S]."""
        return dot_product.step_weights(self.queries(x_BND), k_BHKS, visible.mask(x_BND.shape[1], k_BHKS.shape[3]))

    def weights(self, x_BTD: Array, k_BSHK: Array, visible: Visible) -> Array:
        """How much each query attends to each key: float32 [B, H, T, S]."""
        mask = visible.mask(x_BTD.shape[1], k_BSHK.shape[1])
        return dot_product.attention_weights(self.queries(x_BTD), k_BSHK, mask)


def is_long(queries: int, keys: int) -> bool:
    """Whether plain attention would take much memory, so that `auto` chooses another."""
    return queries * keys >= BLOCKWISE_FROM**2


def choose_path(path: str, queries: int, keys: int, kernel: str = "") -> str:
    """Which attention is used where a path was asked for; a ring of one device is blockwise.

    Args:
      kernel: the one that can run; a checkpoint trained with another is used as if with auto.
    """
    ring = sharding.num_shards("length") > 1
    if path == "auto" or (path in KERNELS and path != kernel):
        return "ring" if ring else (kernel or "blockwise") if is_long(queries, keys) else "plain"
    return "blockwise" if path == "ring" and not ring else path


class Residual(nnx.Module):
    """A sublayer's dropout, residual sum and LayerNorm, in either order.

    post: LayerNorm(x + dropout(f(x))) (paper, 3.1); pre: x + dropout(f(LayerNorm(x))).
    """

    def __init__(self, width: int, norm: str, dropout_rate: float, rngs: nnx.Rngs):
        self.post, self.dropout_rate = norm == "post", dropout_rate
        self.norm = LayerNorm(width, rngs)

    def __call__(self, x: Array, sublayer: Callable[[Array], Array], key: Key = None) -> Array:
        out = sharding.with_logical_constraint(sublayer(x if self.post else self.norm(x)), STATES)
        out = dropout(out, self.dropout_rate, key)
        return self.norm(x + out) if self.post else x + out


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
