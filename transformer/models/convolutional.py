"""What attention replaced, second: gated convolutions, in the style of ConvS2S (Gehring et al. 2017).

A layer is a convolution of twice the width, of which one half gates the other, and adds to what it is given;
every layer of the decoder looks at the source. Sums of two are scaled by √½, which keeps their variance. Unlike
there, weights are not normalised, scores are scaled by 1/√D, what is found in the source is not scaled, nor are the
encoder's gradients, and the embeddings in the decoder's values are not dropped.

B batch, S source length, T target length, D model width, N beams, W width of the convolution.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from transformer.attention.dropout import dropout
from transformer.attention.mask import Visible
from transformer.config import ModelConfig
from transformer.models.base import TextModel, move_beams, positions, segments, shift_right
from transformer.models.layers import (
    SourceAttention,
    add_bias,
    glorot,
    layers_of,
    make_param,
    make_stack,
    run_stack,
    use,
    weighted,
)

Key = Array | None


class Source(NamedTuple):
    """The source as the decoder sees it: states and, added to their embeddings, values, [B, S, D] both."""

    encoded_BSD: Array
    values_BSD: Array
    visible: Visible


class Memory(NamedTuple):
    """The same with the keys of each layer, one for all beams, and the positions of the target [T, D]."""

    source: Source
    keys: list[Array]
    places_TD: Array


class Cache(NamedTuple):
    """What each layer of the decoder was given at the W - 1 places before, of each beam: [B, N, W - 1, D]."""

    layers: list[Array]

    def reorder(self, parents_BN: Array) -> "Cache":
        """After hypotheses moved from beams `parents_BN`, int32 [B, N]: these places move along."""
        return move_beams(self, parents_BN)

    def grow(self, max_length: int) -> "Cache":
        """It has the same size whatever the length."""
        return self


class GatedConvolution(nnx.Module):
    """x → a · σ(b), where a and b are convolutions of x (Dauphin et al. 2017)."""

    def __init__(self, width: int, kernel_width: int, dropout_rate: float, rngs: nnx.Rngs):
        # The gate halves, dropout and W taps add up: such weights keep the variance (their section 3.5).
        init = jax.nn.initializers.normal((4.0 * (1.0 - dropout_rate) / (kernel_width * width)) ** 0.5)
        self.kernel = make_param(rngs, init, (kernel_width, width, 2 * width), ("conv_kernel", "embed", "gates"))
        self.bias = make_param(rngs, jax.nn.initializers.zeros, (2 * width,), ("norm",))

    def __call__(self, x_BTD: Array, causal: bool, segments_BT: Array | None) -> Array:
        """[B, T, D] → [B, T, D]; what is outside of the row, or of a place's own segment, is zero to it."""
        taps = self.kernel.shape[0]
        first = 1 - taps if causal else -(taps // 2)
        near = [shifted(x_BTD, offset, segments_BT) for offset in range(first, first + taps)]
        return self.gate(jnp.concatenate(near, axis=-1))

    def gate(self, near: Array) -> Array:
        """From the taps of each place, one after the other: [..., W · D] → [..., D]."""
        kernel = use(self.kernel, near.dtype)
        both = jnp.einsum("...d,de->...e", near, kernel.reshape(-1, kernel.shape[-1]))
        value, gate = jnp.split(add_bias(both, self.bias[...]), 2, axis=-1)
        return value * jax.nn.sigmoid(gate)


class EncoderLayer(nnx.Module):
    """A gated convolution over both sides of each place."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.dropout_rate = config.dropout_rate
        self.convolution = GatedConvolution(config.emb_dim, config.kernel_width, config.dropout_rate, rngs)

    def __call__(self, x_BSD: Array, segments_BS: Array, key: Key) -> Array:
        return half(x_BSD + self.convolution(dropout(x_BSD, self.dropout_rate, key), False, segments_BS))


class DecoderLayer(nnx.Module):
    """A gated convolution over each place and those before it, then attention to the source."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.dropout_rate = config.dropout_rate
        self.convolution = GatedConvolution(config.emb_dim, config.kernel_width, config.dropout_rate, rngs)
        self.attention = SourceAttention(config.emb_dim, config.attention_score, rngs)
        self.out = make_param(rngs, glorot(), (config.emb_dim, config.emb_dim), ("embed", "hidden"))

    def __call__(
        self, x_BTD: Array, y_BTD: Array, source: Source, segments_BT: Array | None, key: Key
    ) -> tuple[Array, Array]:
        """`y_BTD` are the embedded inputs; the second result are the weights of the source, float32 [B, T, S]."""
        convolved = self.convolution(dropout(x_BTD, self.dropout_rate, key), True, segments_BT)
        return self.look(x_BTD, convolved, y_BTD, source, self.attention.keys(source.encoded_BSD))

    def look(
        self, x_BTD: Array, convolved_BTD: Array, y_BTD: Array, source: Source, keys_BSD: Array
    ) -> tuple[Array, Array]:
        """What comes after the convolution."""
        weights_BTS = self.attention.weights(half(convolved_BTD + y_BTD), keys_BSD, source.visible)
        found_BTD = weighted(weights_BTS, source.values_BSD)
        found_BTD = jnp.einsum("btd,de->bte", found_BTD, use(self.out, found_BTD.dtype))
        return half(x_BTD + half(convolved_BTD + found_BTD)), weights_BTS

    def step(
        self, x_BND: Array, y_BND: Array, source: Source, keys_BSD: Array, before: Array
    ) -> tuple[Array, Array, Array]:
        """One place of every beam: its state, the cache moved on by it, and the weights of the source."""
        near = jnp.concatenate([before, x_BND[:, :, None]], axis=2)
        convolved_BND = self.convolution.gate(near.reshape(*near.shape[:2], -1))
        x_BND, weights_BNS = self.look(x_BND, convolved_BND, y_BND, source, keys_BSD)
        return x_BND, near[:, :, 1:], weights_BNS


class ConvolutionalModel(TextModel):
    """Encoder and decoder of gated convolutions."""

    def __init__(self, config: ModelConfig, vocab_size: int, rngs: nnx.Rngs):
        super().__init__(config, vocab_size, rngs)
        self.encoder = make_stack([EncoderLayer(config, rngs) for _ in range(config.num_layers)], config.scan_layers)
        self.decoder = make_stack([DecoderLayer(config, rngs) for _ in range(config.num_layers)], config.scan_layers)

    def encode(self, source_BS: Array, key: Key = None, packed: bool = False) -> Array:
        """As `TextModel.encode`."""
        keys, embed_key = self._layer_keys(key)
        segments_BS = segments(source_BS)

        def call(layer: EncoderLayer, x_BSD: Array, layer_key: Key) -> Array:
            return layer(x_BSD, segments_BS, layer_key)

        x_BSD = self._embed("source", source_BS, self._places("source", segments_BS, packed), embed_key)
        return run_stack(self.encoder, x_BSD, keys, self.config.remat, call)

    def decode(
        self, encoded_BSD: Array, source_BS: Array, target_BT: Array, key: Key = None, packed: bool = False
    ) -> Array:
        """As `TextModel.decode`."""
        keys, embed_key = self._layer_keys(key)
        inside = segments(target_BT) if packed else None
        source, y_BTD = self._inputs(encoded_BSD, source_BS, target_BT, inside, embed_key)

        def call(layer: DecoderLayer, x_BTD: Array, layer_key: Key) -> Array:
            return layer(x_BTD, y_BTD, source, inside, layer_key)[0]

        return self._logits(run_stack(self.decoder, y_BTD, keys, self.config.remat, call))

    def cross_attention(self, source_BS: Array, target_BT: Array) -> Array:
        """As `TextModel.cross_attention`; there is one head."""
        source, y_BTD = self._inputs(self.encode(source_BS), source_BS, target_BT, None, None)
        x_BTD, found = y_BTD, []
        for layer in self._decoder_layers():
            x_BTD, weights_BTS = layer(x_BTD, y_BTD, source, None, None)
            found.append(weights_BTS)
        return jnp.stack(found, axis=1)[:, :, None]

    def start(self, source_BS: Array, beams: int, max_length: int, room: int | None = None) -> tuple[Memory, Cache]:
        """As `TextModel.start`; the cache has the same size whatever the length."""
        source = self._source(self.encode(source_BS), source_BS, None)
        shape = (source_BS.shape[0], beams, self.config.kernel_width - 1, self.config.emb_dim)
        keys = [layer.attention.keys(source.encoded_BSD) for layer in self._decoder_layers()]
        places_TD = self._positions("target", max_length)[0]
        return Memory(source, keys, places_TD), Cache([jnp.zeros(shape, self.dtype) for _ in keys])

    def advance(
        self, memory: Memory, cache: Cache, inputs_BN: Array, position: Array, attending: bool
    ) -> tuple[Array, Cache, Any]:
        """As `TextModel.advance`."""
        place_11D = jax.lax.dynamic_slice_in_dim(memory.places_TD, position, 1)[None]
        y_BND = self._embed("target", inputs_BN, place_11D, None)
        x_BND, weights_BNS, written = y_BND, None, []
        for layer, keys_BSD, before in zip(self._decoder_layers(), memory.keys, cache.layers, strict=True):
            x_BND, after, weights_BNS = layer.step(x_BND, y_BND, memory.source, keys_BSD, before)
            written.append(after)
        return self._logits(x_BND), Cache(written), weights_BNS if attending else None

    def _inputs(
        self, encoded_BSD: Array, source_BS: Array, target_BT: Array, inside: Array | None, key: Key
    ) -> tuple[Source, Array]:
        """The source, and the embedded inputs of the decoder; `inside` are the segments of packed rows."""
        ids_BT = shift_right(target_BT)
        places = self._places("target", segments(target_BT), inside is not None)
        return self._source(encoded_BSD, source_BS, inside), self._embed("target", ids_BT, places, key)

    def _source(self, encoded_BSD: Array, source_BS: Array, inside: Array | None) -> Source:
        segments_BS = segments(source_BS)
        embedded_BSD = self._embed("source", source_BS, self._places("source", segments_BS, inside is not None), None)
        return Source(encoded_BSD, half(encoded_BSD + embedded_BSD), Visible(inside, segments_BS))

    def _places(self, side: str, segments_BT: Array, packed: bool) -> Array:
        return self._positions(side, segments_BT.shape[1], positions(segments_BT) if packed else None)

    def _decoder_layers(self) -> Sequence[DecoderLayer]:
        return layers_of(self.decoder, self.config.num_layers)


def shifted(x_BTD: Array, offset: int, segments_BT: Array | None) -> Array:
    """What stands `offset` places after each place; zero outside of the row or of the place's segment."""
    if offset == 0:
        return x_BTD
    length = x_BTD.shape[1]
    here, there = (slice(max(-offset, 0), length - max(offset, 0)), slice(max(offset, 0), length + min(offset, 0)))
    if abs(offset) >= length:
        return jnp.zeros_like(x_BTD)
    near_BTD = x_BTD[:, there]
    if segments_BT is not None:
        same_BT = segments_BT[:, here] == segments_BT[:, there]
        near_BTD = jnp.where(same_BT[:, :, None], near_BTD, jnp.zeros((), x_BTD.dtype))
    return jnp.pad(near_BTD, ((0, 0), (max(-offset, 0), max(offset, 0)), (0, 0)))


def half(x: Array) -> Array:
    """A sum of two, of their variance."""
    return x * jnp.asarray(0.5**0.5, x.dtype)
