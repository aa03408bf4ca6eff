"""The Transformer: encoder, decoder, and decoding one token at a time from a cache (paper, section 3).

B batch, S source length, T target length, D model width, V vocabulary, N beams,
H heads, K width per head, L layers.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from transformer.attention import dot_product
from transformer.attention.mask import Visible
from transformer.config import ModelConfig
from transformer.models.base import TextModel, positions, segments, shift_right
from transformer.models.layers import (
    FeedForward,
    LayerNorm,
    MultiHeadAttention,
    Residual,
    layers_of,
    make_stack,
    run_stack,
    split_key,
)

Key = Array | None


class LayerCache(NamedTuple):
    """What one decoder layer has written so far: keys and values of each position of each beam, S = T * N."""

    k_BHKS: Array
    v_BHSK: Array


class Cache(NamedTuple):
    """What decoding remembers of all beams, and which beam wrote each position of a hypothesis' past."""

    layers: list[LayerCache]
    ancestors_BNT: Array

    def reorder(self, parents_BN: Array) -> "Cache":
        """After hypotheses moved from beams `parents_BN`, int32 [B, N]: keys and values stay where they are."""
        return self._replace(ancestors_BNT=jnp.take_along_axis(self.ancestors_BNT, parents_BN[:, :, None], 1))

    def grow(self, max_length: int) -> "Cache":
        """With room for so many positions."""
        beams, missing = self.ancestors_BNT.shape[1], max_length - self.ancestors_BNT.shape[2]

        def filled_up(array: Array, axis: int, count: int) -> Array:
            return jnp.pad(array, [(0, count if i == axis else 0) for i in range(array.ndim)])

        layers = [
            LayerCache(filled_up(k_BHKS, 3, missing * beams), filled_up(v_BHSK, 2, missing * beams))
            for k_BHKS, v_BHSK in self.layers
        ]
        return Cache(layers, filled_up(self.ancestors_BNT, 2, missing))


class Memory(NamedTuple):
    """The source as the decoder sees it: of each layer keys [B, H, K, S] and values [B, H, S, K], for all beams."""

    layers: list[tuple[Array, Array]]
    visible: Visible


class EncoderLayer(nnx.Module):
    """Self-attention, then feed-forward."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.attention = make_attention(config, rngs)
        self.attention_residual = make_residual(config, rngs)
        self.mlp = make_mlp(config, rngs)
        self.mlp_residual = make_residual(config, rngs)

    def __call__(self, x_BSD: Array, visible: Visible, key: Key) -> Array:
        keys = split_key(key, 4)
        x_BSD = self.attention_residual(x_BSD, lambda y: self.attention(y, y, visible, keys[0]), keys[1])
        return self.mlp_residual(x_BSD, lambda y: self.mlp(y, keys[2]), keys[3])


class DecoderLayer(nnx.Module):
    """Causal self-attention, attention to the source, then feed-forward."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.attention = make_attention(config, rngs)
        self.attention_residual = make_residual(config, rngs)
        self.cross = make_attention(config, rngs)
        self.cross_residual = make_residual(config, rngs)
        self.mlp = make_mlp(config, rngs)
        self.mlp_residual = make_residual(config, rngs)

    def __call__(self, x_BTD: Array, encoded_BSD: Array, past: Visible, source: Visible, key: Key) -> Array:
        keys = split_key(key, 6)
        x_BTD = self.attention_residual(x_BTD, lambda y: self.attention(y, y, past, keys[0]), keys[1])
        x_BTD = self.cross_residual(x_BTD, lambda y: self.cross(y, encoded_BSD, source, keys[2]), keys[3])
        return self.mlp_residual(x_BTD, lambda y: self.mlp(y, keys[4]), keys[5])

    def weights(self, x_BTD: Array, encoded_BSD: Array, past: Visible, source: Visible) -> tuple[Array, Array]:
        """As a call without dropout; also the weights of its attention to the source, float32 [B, H, T, S]."""
        weights_BHTS = jnp.zeros(())

        def look(y_BTD: Array) -> Array:
            nonlocal weights_BHTS
            k_BSHK, _ = self.cross.keys_values(encoded_BSD)
            weights_BHTS = self.cross.weights(y_BTD, k_BSHK, source)
            return self.cross(y_BTD, encoded_BSD, source)

        x_BTD = self.attention_residual(x_BTD, lambda y: self.attention(y, y, past))
        x_BTD = self.cross_residual(x_BTD, look)
        return self.mlp_residual(x_BTD, self.mlp), weights_BHTS

    def step(
        self,
        x_BND: Array,
        source: tuple[Array, Array],
        visible: Visible,
        cache: LayerCache,
        ancestors_BNT: Array,
        position: Array,
        attending: bool,
    ) -> tuple[Array, LayerCache, Array | None]:
        """One position of every beam; beams share the source's keys and values as so many queries.

        If `attending`, the third result is how much each beam attends to the source: float32 [B, N, S].
        """
        weights_BNS = None

        def look_back(y_BND: Array) -> Array:
            nonlocal cache
            k_BNHK, v_BNHK = self.attention.keys_values(y_BND)
            cache = LayerCache(*dot_product.write_cache(*cache, k_BNHK, v_BNHK, position))
            heads = dot_product.cached_attention(self.attention.queries(y_BND), *cache, ancestors_BNT, position)
            return self.attention.project(heads)

        def look_across(y_BND: Array) -> Array:
            nonlocal weights_BNS
            if attending:
                weights_BNS = self.cross.look_weights(y_BND, source[0], visible).mean(axis=1)
            return self.cross.look(y_BND, *source, visible)

        x_BND = self.attention_residual(x_BND, look_back)
        x_BND = self.cross_residual(x_BND, look_across)
        return self.mlp_residual(x_BND, self.mlp), cache, weights_BNS


class Transformer(TextModel):
    """Encoder and decoder of attention and feed-forward layers."""

    def __init__(self, config: ModelConfig, vocab_size: int, rngs: nnx.Rngs):
        super().__init__(config, vocab_size, rngs)
        self.encoder = make_stack([EncoderLayer(config, rngs) for _ in range(config.num_layers)], config.scan_layers)
        self.decoder = make_stack([DecoderLayer(config, rngs) for _ in range(config.num_layers)], config.scan_layers)
        if config.norm == "pre":
            self.encoder_norm = LayerNorm(config.emb_dim, rngs)
            self.decoder_norm = LayerNorm(config.emb_dim, rngs)

    def encode(self, source_BS: Array, key: Key = None, packed: bool = False) -> Array:
        """Ids int32 [B, S] → states [B, S, D] in the compute dtype; those at padding must not be used."""
        keys, embed_key = self._layer_keys(key)
        segments_BS = segments(source_BS)
        visible = Visible(segments_BS if packed else None, segments_BS)
        places = positions(segments_BS) if packed else None
        x_BSD = self._embed("source", source_BS, self._positions("source", source_BS.shape[1], places), embed_key)

        def call(layer: EncoderLayer, x_BSD: Array, layer_key: Key) -> Array:
            return layer(x_BSD, visible, layer_key)

        x_BSD = run_stack(self.encoder, x_BSD, keys, self.config.remat, call)
        return self.encoder_norm(x_BSD) if self.config.norm == "pre" else x_BSD

    def decode(
        self, encoded_BSD: Array, source_BS: Array, target_BT: Array, key: Key = None, packed: bool = False
    ) -> Array:
        """Logits float32 [B, T, V] of all places of the target at once, each given the tokens before it.

        Padding comes last in a row, so causality alone keeps real positions from seeing it.
        """
        keys, embed_key = self._layer_keys(key)
        past, source, places = Visible(causal=True), Visible(keys_BS=segments(source_BS)), None
        if packed:
            segments_BT = segments(target_BT)
            past, source = Visible(segments_BT, segments_BT, causal=True), Visible(segments_BT, source.keys_BS)
            places = positions(segments_BT)
        inputs_BT = shift_right(target_BT)
        x_BTD = self._embed("target", inputs_BT, self._positions("target", inputs_BT.shape[1], places), embed_key)

        def call(layer: DecoderLayer, x_BTD: Array, layer_key: Key) -> Array:
            return layer(x_BTD, encoded_BSD, past, source, layer_key)

        return self._logits(run_stack(self.decoder, x_BTD, keys, self.config.remat, call))

    def cross_attention(self, source_BS: Array, target_BT: Array) -> Array:
        """How the decoder weighs the source where it predicts each target token, teacher-forced.

        Returns:
          float32 [B, L, H, T, S]; rows of padding tokens mean nothing.
        """
        encoded_BSD = self.encode(source_BS)
        inputs_BT = shift_right(target_BT)
        x_BTD = self._embed("target", inputs_BT, self._positions("target", inputs_BT.shape[1]), None)
        past, source, found = Visible(causal=True), Visible(keys_BS=segments(source_BS)), []
        for layer in layers_of(self.decoder, self.config.num_layers):
            x_BTD, weights_BHTS = layer.weights(x_BTD, encoded_BSD, past, source)
            found.append(weights_BHTS)
        return jnp.stack(found, axis=1)

    def start(self, source_BS: Array, beams: int, max_length: int, room: int | None = None) -> tuple[Memory, Cache]:
        """As `TextModel.start`: the encoded source, and an empty cache of `room` slots a beam."""
        encoded_BSD = self.encode(source_BS)
        both = [layer.cross.keys_values(encoded_BSD) for layer in layers_of(self.decoder, self.config.num_layers)]
        layers = [(k_BSHK.transpose(0, 2, 3, 1), v_BSHK.swapaxes(1, 2)) for k_BSHK, v_BSHK in both]
        room = room or max_length
        S = room * beams
        empty = [
            LayerCache(
                jnp.zeros((*k_BHKS.shape[:3], S), self.dtype),
                jnp.zeros((*v_BHSK.shape[:2], S, v_BHSK.shape[3]), self.dtype),
            )
            for k_BHKS, v_BHSK in layers
        ]
        ancestors_BNT = jnp.zeros((source_BS.shape[0], beams, room), jnp.int32)
        return Memory(layers, Visible(keys_BS=segments(source_BS))), Cache(empty, ancestors_BNT)

    def advance(
        self, memory: Memory, cache: Cache, inputs_BN: Array, position: Array, attending: bool
    ) -> tuple[Array, Cache, Any]:
        """As `TextModel.advance`."""
        table_1TD = self._positions("target", cache.ancestors_BNT.shape[2])
        row_11D = jax.lax.dynamic_slice_in_dim(table_1TD, position, 1, axis=1)
        x_BND = self._embed("target", inputs_BN, row_11D, None)
        here_BN1 = jax.lax.broadcasted_iota(jnp.int32, (*inputs_BN.shape, 1), 1)
        ancestors_BNT = jax.lax.dynamic_update_slice_in_dim(cache.ancestors_BNT, here_BN1, position, axis=2)
        written, attended_BNS, layers = [], None, layers_of(self.decoder, self.config.num_layers)
        for layer, source, past in zip(layers, memory.layers, cache.layers, strict=True):
            asked = attending and layer is layers[-1]
            x_BND, past, attended_BNS = layer.step(x_BND, source, memory.visible, past, ancestors_BNT, position, asked)
            written.append(past)
        return self._logits(x_BND), Cache(written, ancestors_BNT), attended_BNS

    def _logits(self, x: Array) -> Array:
        if self.config.norm == "pre":
            x = self.decoder_norm(x)
        return super()._logits(x)


def make_attention(config: ModelConfig, rngs: nnx.Rngs) -> MultiHeadAttention:
    return MultiHeadAttention(
        config.emb_dim,
        config.num_heads,
        config.qkv_dim,
        config.value_dim,
        config.attention_dropout_rate,
        config.attention,
        rngs,
        config.qkv_init_gain,
    )


def make_mlp(config: ModelConfig, rngs: nnx.Rngs) -> FeedForward:
    return FeedForward(config.emb_dim, config.mlp_dim, config.mlp_dropout_rate, rngs)


def make_residual(config: ModelConfig, rngs: nnx.Rngs) -> Residual:
    return Residual(config.emb_dim, config.norm, config.dropout_rate, rngs)
