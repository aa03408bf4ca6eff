"""Layers: embeddings, position encodings, norms, attention, feed-forward; stacking and rematerialization.

B batch, T target length, S source or key length, D model width, H heads, K width per head,
F feed-forward width, V vocabulary, N beams.

Params are float32. Params and activations have logical axis names, which only `sharding` maps to a mesh. Activations
have the dtype of the input. Attribute names are part of the checkpoint format: renaming one breaks old checkpoints.
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
from transformer.attention.dot_product import einsum_f32
from transformer.attention.dropout import dropout
from transformer.attention.mask import MASK_VALUE, AttentionMask
from transformer.attention.ring import ring_attention
from transformer.attention.rotary import Rotation, rotate
from transformer.config import ModelConfig
from transformer.config.validation import BLOCKWISE_MIN_LENGTH, FUSED_ATTENTION_PLATFORMS
from transformer.distributed import platform as platforms
from transformer.distributed import sharding
from transformer.models.linear import linear

Key = Array | None

REMAT_POLICIES: dict[str, Callable] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def stack_layers(layers: Sequence[nnx.Module], scan: bool) -> nnx.Module:
    """Returns a list of layers, or with `scan` one layer whose params are stacked along a first axis `layers`."""
    if not scan:
        return nnx.List(layers)
    states = [nnx.state(layer) for layer in layers]
    stacked = nnx.merge(nnx.graphdef(layers[0]), jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))
    for _, param in nnx.to_flat_state(nnx.state(stacked, nnx.Param)):
        param.set_metadata(axes=("layers", *param.get_metadata()["axes"]))
    return stacked


def unstack_layers(stack: nnx.Module) -> list[Any]:
    """The list of layers, stacked or not."""
    if isinstance(stack, nnx.List):
        return list(stack)
    graphdef, params = nnx.split(stack)
    count = jax.tree.leaves(params)[0].shape[0]
    return [nnx.merge(graphdef, jax.tree.map(lambda leaf, i=i: leaf[i], params)) for i in range(count)]


def apply_layers(
    stack: nnx.Module, x_BTD: Array, keys_L: Key, remat: str, call: Callable[[Any, Array, Key], Array]
) -> Array:
    """Applies `call(layer, x_BTD, key)` layer by layer, unrolled or by `lax.scan`.

    Args:
      keys_L: dropout keys, one per layer; None: no dropout.
      remat: what the backward pass recomputes, `none` or one of REMAT_POLICIES (Chen et al. 2016). All-gathered
        params are gathered again in any case, else each device would keep those of all layers.
    """

    def maybe_remat(function: Callable) -> Callable:
        if remat == "none":
            gathers = sharding.num_shards("embed") > 1
            return jax.checkpoint(function, policy=sharding.save_all_but_gathered) if gathers else function
        return jax.checkpoint(function, policy=REMAT_POLICIES[remat])

    if isinstance(stack, nnx.List):
        for i, layer in enumerate(stack):
            key = None if keys_L is None else keys_L[i]
            x_BTD = maybe_remat(lambda x, key, layer=layer: call(layer, x, key))(x_BTD, key)
        return x_BTD
    graphdef, params = nnx.split(stack)
    body = maybe_remat(lambda x, layer: (call(nnx.merge(graphdef, layer[0]), x, layer[1]), None))
    return jax.lax.scan(body, x_BTD, (params, keys_L))[0]


ACTIVATION_AXES = ("batch", "length", "embed")  # axes of what passes from layer to layer
glorot = jax.nn.initializers.glorot_uniform


def make_param(rngs: nnx.Rngs, init: Callable, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    """A float32 parameter whose axes have logical names."""
    return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=axes)


def read_param(param: nnx.Param, dtype: jnp.dtype | None = None) -> Array:
    """The value of a param in a dtype, all-gathered where only its storage is sharded."""
    value = param[...] if dtype is None else param[...].astype(dtype)
    axes = param.get_metadata()["axes"]
    return sharding.all_gather_param(value, axes[len(axes) - value.ndim :])  # without the axis `layers`, if stacked


def param_compute_dtype(param: nnx.Param, dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of a param in a model that computes in `dtype`: vectors and positions are added in float32."""
    axes = [axis for axis in param.get_metadata()["axes"] if axis != "layers"]
    return jnp.dtype(jnp.float32) if len(axes) == 1 or "positions" in axes else dtype


def split_key(key: Key, count: int) -> list[Key]:
    """`count` dropout keys, or as many times None: no dropout."""
    return [None] * count if key is None else list(jax.random.split(key, count))


def split_layer_keys(key: Key, num_layers: int) -> tuple[Key, Key]:
    """Dropout keys of the layers of encoder or decoder, and of its embeddings."""
    if key is None:
        return None, None
    keys = jax.random.split(key, num_layers + 1)
    return keys[:-1], keys[-1]


def sinusoidal_position_encoding(length: int, width: int) -> np.ndarray:
    """Position encodings, float32 [length, width]: sines in even columns, cosines in odd ones (paper, 3.5)."""
    position = np.arange(length, dtype=np.float64)[:, None]
    rate = np.exp(-math.log(10000.0) * np.arange(0, width, 2, dtype=np.float64) / width)[None, :]
    table = np.empty((length, width), np.float32)
    table[:, 0::2], table[:, 1::2] = np.sin(position * rate), np.cos(position * rate)
    return table


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalize(x: Array, scale_D: Array, bias_D: Array | None, norm_type: str, epsilon: float) -> Array:
    """LayerNorm or RMSNorm over the last axis, computed in float32.

    layer: (x - mean) / √(variance + ε) · scale + bias (Ba et al. 2016); rms: x / √(mean of x² + ε) · scale (Zhang &
    Sennrich 2019). The gradient is written by hand: XLA's CPU back end compiles that of autodiff badly, and others
    would take mean and deviation twice.
    """
    return _normalize_forward(x, scale_D, bias_D, norm_type, epsilon)[0]


def _broadcast(vector_D: Array, x: Array) -> Array:
    return jnp.broadcast_to(vector_D, x.shape)


def _mean(x: Array, norm_type: str) -> Array | None:
    """The mean that the norm subtracts; RMSNorm has none."""
    return x.mean(-1, keepdims=True) if norm_type == "layer" else None


def _centre(x: Array, mean: Array | None) -> Array:
    return x if mean is None else x - mean


def _normalize_forward(
    x: Array, scale_D: Array, bias_D: Array | None, norm_type: str, epsilon: float
) -> tuple[Array, tuple]:
    x_f32 = x.astype(jnp.float32)
    mean = _mean(x_f32, norm_type)
    centred = _centre(x_f32, mean)
    inverse = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)
    normed = centred * inverse
    out = normed * _broadcast(scale_D, x)
    out = out if bias_D is None else out + _broadcast(bias_D, x)
    saved = normed if platforms.norm_saves_normed() else (x, mean)
    return out.astype(x.dtype), (saved, inverse, scale_D, bias_D)


def _normalize_backward(
    norm_type: str, epsilon: float, residuals: tuple, grad: Array
) -> tuple[Array, Array, Array | None]:
    normed, inverse, scale_D, bias_D = residuals
    if isinstance(normed, tuple):
        x, mean, inverse = jax.lax.optimization_barrier((*normed, inverse))
        normed = _centre(x.astype(jnp.float32), mean) * inverse
    grad_f32 = grad.astype(jnp.float32)
    leading = tuple(range(grad.ndim - 1))
    scaled = grad_f32 * _broadcast(scale_D, grad)
    projection = (scaled * normed).mean(-1, keepdims=True)
    grad_x = (inverse * (_centre(scaled, _mean(scaled, norm_type)) - normed * projection)).astype(grad.dtype)
    grad_scale_D = (grad_f32 * normed).sum(leading)
    return grad_x, grad_scale_D, None if bias_D is None else grad_f32.sum(leading)


normalize.defvjp(_normalize_forward, _normalize_backward)


def add_bias(x: Array, bias: nnx.Param | None) -> Array:
    """x + bias over the last axis, in the dtype of x; x itself without a bias.

    It is added in float32, so that its gradient, a sum over all tokens, is float32 too: in bfloat16 it is 10% to 30%
    wrong for a batch of 25,000 tokens.
    """
    return x if bias is None else (x.astype(jnp.float32) + _broadcast(bias[...], x)).astype(x.dtype)


def make_bias(use_bias: bool, rngs: nnx.Rngs, width: int, axis: str = "norm") -> nnx.Param | None:
    """A bias of zeros, or None."""
    return make_param(rngs, jax.nn.initializers.zeros, (width,), (axis,)) if use_bias else None


class Norm(nnx.Module):
    """The norm of `model.norm_type` over a width: a learned scale, and in LayerNorm a bias if `use_bias`."""

    def __init__(self, config: ModelConfig, width: int, rngs: nnx.Rngs, use_bias: bool = True):
        self.norm_type, self.epsilon = config.norm_type, config.norm_epsilon
        self.scale = make_param(rngs, jax.nn.initializers.ones, (width,), ("norm",))
        self.bias = make_bias(use_bias and config.use_bias and config.norm_type == "layer", rngs, width)

    def __call__(self, x: Array) -> Array:
        bias_D = None if self.bias is None else self.bias[...]
        return normalize(x, self.scale[...], bias_D, self.norm_type, self.epsilon)


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
    """f(x W1 + b1) W2 + b2, f the rectifier (paper, equation 2) or another activation.

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
        key: Key = None,
        rotation: Rotation | None = None,
        weights: list[Array] | None = None,
    ) -> Array:
        """Attends from `x_BTD` to `kv_BSD`; returns [B, T, D].

        Args:
          weights: a list to which the weights before dropout are appended, float32 [B, H, T, S].
        """
        q_BTHK, k_BSHK, v_BSHK = (
            sharding.with_logical_constraint(heads, ("batch", "length", "heads", "kv"))
            for heads in (self.queries(x_BTD, rotation), *self.keys_values(kv_BSD, rotation))
        )
        if weights is not None:
            mask_B1TS = mask.materialize(x_BTD.shape[1], kv_BSD.shape[1])
            weights.append(dot_product.attention_weights(q_BTHK, k_BSHK, mask_B1TS))
        rate = 0.0 if key is None else self.dropout_rate
        implementation = choose_attention(self.implementation, q_BTHK, v_BSHK, mask, rate)
        if implementation == "plain":
            mask_B1TS = mask.materialize(q_BTHK.shape[1], k_BSHK.shape[1])
            heads_BTHK = dot_product.dot_product_attention(q_BTHK, k_BSHK, v_BSHK, mask_B1TS, self.dropout_rate, key)
        elif implementation in FUSED_ATTENTION_PLATFORMS:
            fused_attention = fused.splash_attention if implementation == "splash" else fused.cudnn_attention
            heads_BTHK = fused_attention(q_BTHK, k_BSHK, v_BSHK, mask)
        else:
            attention = ring_attention if implementation == "ring" else blockwise_attention
            heads_BTHK = attention(q_BTHK, k_BSHK, v_BSHK, mask, self.dropout_rate, key)
        return self.project(heads_BTHK)

    def attend_cached(self, x_BND: Array, k_BHKS: Array, v_BHSK: Array, mask: AttentionMask) -> Array:
        """Attends from `x_BND` to projected keys and values, those of the source while decoding."""
        mask_B1NS = mask.materialize(x_BND.shape[1], v_BHSK.shape[2])
        return self.project(dot_product.decode_attention(self.queries(x_BND), k_BHKS, v_BHSK, mask_B1NS))

    def cached_attention_weights(self, x_BND: Array, k_BHKS: Array, mask: AttentionMask) -> Array:
        """Weights of each query and key: float32 [B, H, N, S]."""
        return dot_product.decode_attention_weights(
            self.queries(x_BND), k_BHKS, mask.materialize(x_BND.shape[1], k_BHKS.shape[3])
        )


def norm_and_rotate(heads: Array, norm: Norm | None, rotation: Rotation | None) -> Array:
    """Queries or keys [..., H, K] as attention takes them."""
    heads = heads if norm is None else norm(heads)
    return heads if rotation is None else rotate(heads, rotation)


def choose_attention(
    implementation: str, q_BTHK: Array, v_BSHK: Array, mask: AttentionMask, dropout_rate: float
) -> str:
    """Resolves `model.attention` for these arrays on the devices of the traced program."""
    queries, keys = q_BTHK.shape[1], v_BSHK.shape[1]
    is_forced = FUSED_ATTENTION_PLATFORMS.get(implementation) == platforms.current()
    is_auto = implementation == "auto" or implementation in FUSED_ATTENTION_PLATFORMS
    # The lengths of an exported program are symbols, which cannot be compared: it names its attention.
    may_fuse = is_forced or (is_auto and queries * keys >= platforms.fused_attention_min_length() ** 2)
    kernel = fused.select_kernel(q_BTHK, v_BSHK, mask, dropout_rate) if may_fuse else ""
    return select_attention_impl(implementation, queries, keys, kernel)


def select_attention_impl(implementation: str, queries: int, keys: int, kernel: str = "") -> str:
    """Resolves `model.attention` to an implementation; a ring of one device is blockwise.

    Args:
      kernel: the fused kernel to take where auto may choose; a forced one that is another is treated as auto.
    """
    ring = sharding.num_shards("length") > 1
    if implementation == "auto" or (implementation in FUSED_ATTENTION_PLATFORMS and implementation != kernel):
        is_long = queries * keys >= BLOCKWISE_MIN_LENGTH**2  # plain attention would take much memory
        return "ring" if ring else kernel or ("blockwise" if is_long else "plain")
    return "blockwise" if implementation == "ring" and not ring else implementation


class ResidualBlock(nnx.Module):
    """Dropout, residual connection and norm around a sublayer.

    post: norm(x + dropout(f(x))) (paper, 3.1); pre: x + dropout(f(norm(x))).
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.post, self.dropout_rate = config.norm == "post", config.dropout_rate
        self.norm = Norm(config, config.emb_dim, rngs)

    def __call__(self, x: Array, sublayer: Callable[[Array], Array], key: Key = None) -> Array:
        out = sharding.with_logical_constraint(sublayer(x if self.post else self.norm(x)), ACTIVATION_AXES)
        out = dropout(out, self.dropout_rate, key)
        return self.norm(x + out) if self.post else x + out


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
        mask_BTS = mask.materialize(scores_BTS.shape[1], scores_BTS.shape[2])[:, 0]
        return jax.nn.softmax(jnp.where(mask_BTS, scores_BTS, MASK_VALUE), axis=-1)

    def _dot(self, q_BTD: Array, k_BSD: Array) -> Array:
        scores_BTS = einsum_f32("btd,bsd->bts", q_BTD, k_BSD)
        return scores_BTS * q_BTD.shape[-1] ** -0.5

    def _additive(self, q_BTD: Array, k_BSD: Array) -> Array:
        # In float32, and so are the gradients of q and k, sums over S and T.
        q_BT1D, k_B1SD = q_BTD.astype(jnp.float32)[:, :, None, :], k_BSD.astype(jnp.float32)[:, None, :, :]
        hidden_BTSD = jnp.tanh((q_BT1D + k_B1SD).astype(q_BTD.dtype))
        v_D = self.weigh[...].astype(q_BTD.dtype)
        return einsum_f32("btsd,d->bts", hidden_BTSD, v_D)


def attend(weights_BTS: Array, values_BSD: Array) -> Array:
    """The weighted sum of the values, [B, T, D]."""
    return jnp.einsum("bts,bsd->btd", weights_BTS.astype(values_BSD.dtype), values_BSD)
