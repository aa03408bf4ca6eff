"""Convolutional encoder–decoder in the style of ConvS2S (Gehring et al. 2017).

A layer is a gated convolution (GLU) with a residual connection; every decoder layer has cross-attention. Sums of two
are scaled by √½, which keeps their variance. Differences from ConvS2S: no weight normalization, attention scores
scaled by 1/√D, no scaling of the context or of the encoder's gradients, no dropout of the embeddings in the values.

B batch, S source length, T target length, D model width, N beams, W width of the convolution.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from transformer.attention.dropout import dropout
from transformer.attention.mask import AttentionMask
from transformer.config import ModelConfig
from transformer.models.base import FixedSizeCache, Seq2SeqModel, position_ids, segment_ids, shift_right
from transformer.models.cross_attention import SingleHeadCrossAttention, weighted_sum
from transformer.models.linear import linear
from transformer.models.params import Key, add_bias, glorot, make_param, read_param, split_layer_keys
from transformer.models.stack import apply_layers, stack_layers, unstack_layers


class SourceStates(NamedTuple):
    """Encoder states, and values (states plus embeddings), [B, S, D] both."""

    encoded_BSD: Array
    values_BSD: Array
    mask: AttentionMask


class EncodedSource(NamedTuple):
    """The source with the keys of each decoder layer, shared by all beams; target position encodings [T, D]."""

    states: SourceStates
    keys: list[Array]
    position_encodings_TD: Array


class GatedConvolution(nnx.Module):
    """x → a · σ(b), where a and b are convolutions of x (Dauphin et al. 2017)."""

    def __init__(self, width: int, kernel_width: int, dropout_rate: float, rngs: nnx.Rngs):
        # Keeps the variance: the gate halves it, dropout and the W positions of the kernel add up (their section 3.5).
        init = jax.nn.initializers.normal((4.0 * (1.0 - dropout_rate) / (kernel_width * width)) ** 0.5)
        self.kernel = make_param(rngs, init, (kernel_width, width, 2 * width), ("conv_kernel", "embed", "gates"))
        self.bias = make_param(rngs, jax.nn.initializers.zeros, (2 * width,), ("norm",))

    def __call__(self, x_BTD: Array, causal: bool, segment_ids_BT: Array | None) -> Array:
        """[B, T, D] → [B, T, D]; positions outside the row or the segment are read as zeros."""
        kernel_width = self.kernel.shape[0]
        first = 1 - kernel_width if causal else -(kernel_width // 2)
        window = [shift(x_BTD, offset, segment_ids_BT) for offset in range(first, first + kernel_width)]
        return self.glu(jnp.concatenate(window, axis=-1))

    def glu(self, window: Array) -> Array:
        """Convolves the window of each position and gates the result: [..., W · D] → [..., D]."""
        kernel = read_param(self.kernel, window.dtype)
        out = linear("...d,de->...e", window, kernel.reshape(-1, kernel.shape[-1]))
        value, gate = jnp.split(add_bias(out, self.bias), 2, axis=-1)
        return value * jax.nn.sigmoid(gate)


class EncoderLayer(nnx.Module):
    """A gated convolution centred at each position."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.dropout_rate = config.dropout_rate
        self.convolution = GatedConvolution(config.emb_dim, config.kernel_width, config.dropout_rate, rngs)

    def __call__(self, x_BSD: Array, segment_ids_BS: Array, key: Key) -> Array:
        return scale_by_sqrt_half(
            x_BSD + self.convolution(dropout(x_BSD, self.dropout_rate, key), False, segment_ids_BS)
        )


class DecoderLayer(nnx.Module):
    """A causal gated convolution, then cross-attention."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.dropout_rate = config.dropout_rate
        self.convolution = GatedConvolution(config.emb_dim, config.kernel_width, config.dropout_rate, rngs)
        self.attention = SingleHeadCrossAttention(config.emb_dim, config.attention_score, rngs)
        self.out = make_param(rngs, glorot(), (config.emb_dim, config.emb_dim), ("embed", "hidden"))

    def __call__(
        self, x_BTD: Array, y_BTD: Array, source: SourceStates, segment_ids_BT: Array | None, key: Key
    ) -> tuple[Array, Array]:
        """`y_BTD` are the embedded inputs. Also returns the cross-attention weights, float32 [B, T, S]."""
        convolved = self.convolution(dropout(x_BTD, self.dropout_rate, key), True, segment_ids_BT)
        return self.attend(x_BTD, convolved, y_BTD, source, self.attention.keys(source.encoded_BSD))

    def attend(
        self, x_BTD: Array, convolved_BTD: Array, y_BTD: Array, source: SourceStates, keys_BSD: Array
    ) -> tuple[Array, Array]:
        """Cross-attention and residual connections, after the convolution."""
        weights_BTS = self.attention.weights(scale_by_sqrt_half(convolved_BTD + y_BTD), keys_BSD, source.mask)
        context_BTD = weighted_sum(weights_BTS, source.values_BSD)
        context_BTD = linear("...d,de->...e", context_BTD, read_param(self.out, context_BTD.dtype))
        return scale_by_sqrt_half(x_BTD + scale_by_sqrt_half(convolved_BTD + context_BTD)), weights_BTS

    def step(
        self, x_BND: Array, y_BND: Array, source: SourceStates, keys_BSD: Array, previous: Array
    ) -> tuple[Array, Array, Array]:
        """Computes one position of every beam from the last W - 1, `previous` [B, N, W - 1, D].

        Returns:
          State, updated cache and cross-attention weights.
        """
        window_BNWD = jnp.concatenate([previous, x_BND[:, :, None]], axis=2)
        convolved_BND = self.convolution.glu(window_BNWD.reshape(*window_BNWD.shape[:2], -1))
        x_BND, weights_BNS = self.attend(x_BND, convolved_BND, y_BND, source, keys_BSD)
        return x_BND, window_BNWD[:, :, 1:], weights_BNS


class ConvSeq2Seq(Seq2SeqModel):
    """The model of `family = convolutional`."""

    def __init__(self, config: ModelConfig, vocab_size: int, rngs: nnx.Rngs):
        super().__init__(config, vocab_size, rngs)
        self.encoder = stack_layers(
            [EncoderLayer(config, rngs) for _ in range(config.num_encoder_layers)], config.scan_layers
        )
        self.decoder = stack_layers(
            [DecoderLayer(config, rngs) for _ in range(config.num_decoder_layers)], config.scan_layers
        )

    def encode(self, source_BS: Array, key: Key = None, packed: bool = False) -> Array:
        """Implements `Seq2SeqModel.encode`."""
        keys, embed_key = split_layer_keys(key, self.config.num_encoder_layers)
        segment_ids_BS = segment_ids(source_BS)

        def call(layer: EncoderLayer, x_BSD: Array, layer_key: Key) -> Array:
            return layer(x_BSD, segment_ids_BS, layer_key)

        x_BSD = self._embed("source", source_BS, self._encodings("source", segment_ids_BS, packed), embed_key)
        return apply_layers(self.encoder, x_BSD, keys, self.config.remat, call)

    def decode(
        self, encoded_BSD: Array, source_BS: Array, target_BT: Array, key: Key = None, packed: bool = False
    ) -> Array:
        """Implements `Seq2SeqModel.decode`."""
        keys, embed_key = split_layer_keys(key, self.config.num_decoder_layers)
        segment_ids_BT = segment_ids(target_BT) if packed else None
        source, y_BTD = self._decoder_inputs(encoded_BSD, source_BS, target_BT, segment_ids_BT, embed_key)

        def call(layer: DecoderLayer, x_BTD: Array, layer_key: Key) -> Array:
            return layer(x_BTD, y_BTD, source, segment_ids_BT, layer_key)[0]

        return self._logits(apply_layers(self.decoder, y_BTD, keys, self.config.remat, call))

    def cross_attention(self, source_BS: Array, target_BT: Array) -> Array:
        """Implements `Seq2SeqModel.cross_attention`, with one head."""
        source, y_BTD = self._decoder_inputs(self.encode(source_BS), source_BS, target_BT, None, None)
        x_BTD, weights = y_BTD, []
        for layer in unstack_layers(self.decoder):
            x_BTD, weights_BTS = layer(x_BTD, y_BTD, source, None, None)
            weights.append(weights_BTS)
        return jnp.stack(weights, axis=1)[:, :, None]

    def init_decode(
        self, source_BS: Array, beams: int, max_length: int, cache_length: int | None = None
    ) -> tuple[EncodedSource, FixedSizeCache]:
        """Implements `Seq2SeqModel.init_decode`; the size of the cache does not depend on the length."""
        source = self._source(self.encode(source_BS), source_BS, None)
        shape = (source_BS.shape[0], beams, self.config.kernel_width - 1, self.config.emb_dim)
        keys = [layer.attention.keys(source.encoded_BSD) for layer in unstack_layers(self.decoder)]
        position_encodings_TD = self._position_encodings("target", max_length)[0]
        return EncodedSource(source, keys, position_encodings_TD), FixedSizeCache(
            [jnp.zeros(shape, self.dtype) for _ in keys]
        )

    def decode_step(
        self,
        source: EncodedSource,
        cache: FixedSizeCache,
        inputs_BN: Array,
        position: Array,
        return_attention: bool = False,
    ) -> tuple[Array, FixedSizeCache, Array | None]:
        """Implements `Seq2SeqModel.decode_step`."""
        encoding_11D = jax.lax.dynamic_slice_in_dim(source.position_encodings_TD, position, 1)[None]
        y_BND = self._embed("target", inputs_BN, encoding_11D, None)
        x_BND, weights_BNS, layer_caches = y_BND, None, []
        for layer, keys_BSD, previous in zip(unstack_layers(self.decoder), source.keys, cache.layers, strict=True):
            x_BND, layer_cache, weights_BNS = layer.step(x_BND, y_BND, source.states, keys_BSD, previous)
            layer_caches.append(layer_cache)
        return self._logits(x_BND), FixedSizeCache(layer_caches), weights_BNS if return_attention else None

    def _decoder_inputs(
        self, encoded_BSD: Array, source_BS: Array, target_BT: Array, segment_ids_BT: Array | None, key: Key
    ) -> tuple[SourceStates, Array]:
        """The source and the embedded decoder inputs; `segment_ids_BT` is None unless rows are packed."""
        ids_BT = shift_right(target_BT)
        encodings = self._encodings("target", segment_ids(target_BT), segment_ids_BT is not None)
        return self._source(encoded_BSD, source_BS, segment_ids_BT), self._embed("target", ids_BT, encodings, key)

    def _source(self, encoded_BSD: Array, source_BS: Array, segment_ids_BT: Array | None) -> SourceStates:
        segment_ids_BS = segment_ids(source_BS)
        encodings = self._encodings("source", segment_ids_BS, segment_ids_BT is not None)
        embedded_BSD = self._embed("source", source_BS, encodings, None)
        return SourceStates(
            encoded_BSD, scale_by_sqrt_half(encoded_BSD + embedded_BSD), AttentionMask(segment_ids_BT, segment_ids_BS)
        )

    def _encodings(self, side: str, segment_ids_BT: Array, packed: bool) -> Array:
        return self._position_encodings(side, segment_ids_BT.shape[1], position_ids(segment_ids_BT) if packed else None)


def shift(x_BTD: Array, offset: int, segment_ids_BT: Array | None) -> Array:
    """Shifts the row by `offset`; zeros outside of the row or of the position's segment.

    x = [1, 2, 3, 4]: offset -1 → [0, 1, 2, 3], offset 2 → [3, 4, 0, 0].
    """
    if offset == 0:
        return x_BTD
    length = x_BTD.shape[1]
    if abs(offset) >= length:
        return jnp.zeros_like(x_BTD)
    to = slice(max(-offset, 0), length - max(offset, 0))
    origin = slice(max(offset, 0), length + min(offset, 0))
    shifted_BTD = x_BTD[:, origin]
    if segment_ids_BT is not None:
        same_BT = segment_ids_BT[:, to] == segment_ids_BT[:, origin]
        shifted_BTD = jnp.where(same_BT[:, :, None], shifted_BTD, jnp.zeros((), x_BTD.dtype))
    return jnp.pad(shifted_BTD, ((0, 0), (max(-offset, 0), max(offset, 0)), (0, 0)))


def scale_by_sqrt_half(x: Array) -> Array:
    """Scales a sum of two to their variance."""
    return x * jnp.asarray(0.5**0.5, x.dtype)
