"""The Transformer: encoder, decoder, and decoding one token at a time from a cache (paper, section 3).

B batch, S source length, T target length, D model width, V vocabulary, N beams,
H heads, K width per head, L layers, C = T * N positions of a KV cache.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from transformer.attention import dot_product
from transformer.attention.mask import AttentionMask
from transformer.attention.padding import pad_end
from transformer.attention.rotary import Rotation, rotation_at
from transformer.config import ModelConfig
from transformer.models.base import Seq2SeqModel, gather_beams, position_ids, segment_ids, shift_right
from transformer.models.layers import FeedForward, MultiHeadAttention, ResidualBlock
from transformer.models.norm import Norm
from transformer.models.params import Key, split_key, split_layer_keys
from transformer.models.stack import apply_layers, stack_layers, unstack_layers


class LayerKVCache(NamedTuple):
    """The KV cache of one decoder layer: keys and values of each position of each beam, C = T * N."""

    k_BHKC: Array
    v_BHCK: Array


class KVCache(NamedTuple):
    """KV caches of all layers, and which beam wrote each position of a hypothesis (see `cached_attention`)."""

    layers: list[LayerKVCache]
    beam_history_BNT: Array

    def reorder(self, parents_BN: Array) -> "KVCache":
        """Moves hypotheses from beams `parents_BN`, int32 [B, N]; keys and values stay where they were written."""
        return self._replace(beam_history_BNT=gather_beams(self.beam_history_BNT, parents_BN))

    def resize(self, cache_length: int) -> "KVCache":
        """Pads the cache to hold this many positions."""
        C = cache_length * self.beam_history_BNT.shape[1]
        layers = [LayerKVCache(pad_end(k_BHKC, 3, C), pad_end(v_BHCK, 2, C)) for k_BHKC, v_BHCK in self.layers]
        return KVCache(layers, pad_end(self.beam_history_BNT, 2, cache_length))


class EncodedSource(NamedTuple):
    """Cross-attention keys [B, H, K, S] and values [B, H, S, K] of each layer, shared by all beams."""

    layers: list[tuple[Array, Array]]
    mask: AttentionMask


def encoder_mask(source_BS: Array, packed: bool = False) -> AttentionMask:
    """Every position of the source attends to all tokens of its sentence."""
    segment_ids_BS = segment_ids(source_BS)
    return AttentionMask(segment_ids_BS if packed else None, segment_ids_BS)


def decoder_masks(source_BS: Array, target_BT: Array, packed: bool = False) -> tuple[AttentionMask, AttentionMask]:
    """The masks of self-attention, causal, and of cross-attention to the source.

    Padding comes last in a row, so causality alone keeps tokens from attending to it.
    """
    segment_ids_BT = segment_ids(target_BT) if packed else None
    self_mask = AttentionMask(segment_ids_BT, segment_ids_BT, causal=True)
    return self_mask, AttentionMask(segment_ids_BT, segment_ids(source_BS))


def packed_positions(mask: AttentionMask) -> Array | None:
    """Positions of the queries of packed rows, each in its sentence, int32 [B, T]; None where a row is a sentence."""
    return None if mask.q_segment_ids_BT is None else position_ids(mask.q_segment_ids_BT)


class DecoderWeights(NamedTuple):
    """Attention weights of the decoder, to which each layer appends its own; layers must not be in a scan."""

    self_attention: list[Array]
    cross_attention: list[Array]


class EncoderLayer(nnx.Module):
    """Self-attention, then feed-forward."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.attention = MultiHeadAttention(config, rngs)
        self.attention_residual = ResidualBlock(config, rngs)
        self.mlp = FeedForward(config, rngs)
        self.mlp_residual = ResidualBlock(config, rngs)

    def __call__(
        self,
        x_BSD: Array,
        mask: AttentionMask,
        key: Key,
        rotation: Rotation | None = None,
        weights: list[Array] | None = None,
    ) -> Array:
        """Returns [B, S, D]; appends the attention weights, float32 [B, H, S, S], to `weights`."""
        keys = split_key(key, 4)
        x_BSD = self.attention_residual(
            x_BSD, lambda y: self.attention(y, y, mask, keys[0], rotation, weights), keys[1]
        )
        return self.mlp_residual(x_BSD, lambda y: self.mlp(y, keys[2]), keys[3])


class DecoderLayer(nnx.Module):
    """Causal self-attention, cross-attention, then feed-forward."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.attention = MultiHeadAttention(config, rngs)
        self.attention_residual = ResidualBlock(config, rngs)
        self.cross = MultiHeadAttention(config, rngs)
        self.cross_residual = ResidualBlock(config, rngs)
        self.mlp = FeedForward(config, rngs)
        self.mlp_residual = ResidualBlock(config, rngs)

    def __call__(
        self,
        x_BTD: Array,
        encoded_BSD: Array,
        self_mask: AttentionMask,
        cross_mask: AttentionMask,
        key: Key,
        rotation: Rotation | None = None,
        weights: DecoderWeights | None = None,
    ) -> Array:
        """Returns [B, T, D]; appends the attention weights, float32 [B, H, T, T] and [B, H, T, S], to `weights`."""
        keys = split_key(key, 6)
        self_weights, cross_weights = weights or (None, None)
        x_BTD = self.attention_residual(
            x_BTD, lambda y: self.attention(y, y, self_mask, keys[0], rotation, self_weights), keys[1]
        )
        x_BTD = self.cross_residual(
            x_BTD, lambda y: self.cross(y, encoded_BSD, cross_mask, keys[2], weights=cross_weights), keys[3]
        )
        return self.mlp_residual(x_BTD, lambda y: self.mlp(y, keys[4]), keys[5])

    def step(
        self,
        x_BND: Array,
        source_kv: tuple[Array, Array],
        mask: AttentionMask,
        cache: LayerKVCache,
        beam_history_BNT: Array | None,
        position: Array,
        rotation: Rotation | None,
        return_attention: bool,
    ) -> tuple[Array, LayerKVCache, Array | None]:
        """Decodes one position of every beam; the beams of a sentence share the source's keys and values.

        With `return_attention` the third result is the cross-attention of each beam: float32 [B, N, S].
        """
        y_BND = self.attention_residual.before(x_BND)
        k_BNHK, v_BNHK = self.attention.keys_values(y_BND, rotation)
        cache = LayerKVCache(*dot_product.write_cache(*cache, k_BNHK, v_BNHK, position))
        q_BNHK = self.attention.queries(y_BND, rotation)
        heads_BNHK = dot_product.cached_attention(q_BNHK, *cache, beam_history_BNT, position)
        x_BND = self.attention_residual.after(x_BND, self.attention.project(heads_BNHK))

        y_BND, weights_BNS = self.cross_residual.before(x_BND), None
        if return_attention:
            weights_BNS = self.cross.source_attention_weights(y_BND, source_kv[0], mask).mean(axis=1)
        x_BND = self.cross_residual.after(x_BND, self.cross.attend_to_source(y_BND, *source_kv, mask))
        return self.mlp_residual(x_BND, self.mlp), cache, weights_BNS


class Transformer(Seq2SeqModel):
    """The Transformer: encoder and decoder of attention and feed-forward layers."""

    def __init__(self, config: ModelConfig, vocab_size: int, rngs: nnx.Rngs):
        super().__init__(config, vocab_size, rngs)
        self.encoder = stack_layers(
            [EncoderLayer(config, rngs) for _ in range(config.num_encoder_layers)], config.scan_layers
        )
        self.decoder = stack_layers(
            [DecoderLayer(config, rngs) for _ in range(config.num_decoder_layers)], config.scan_layers
        )
        if config.norm == "pre":
            self.encoder_norm = Norm(config, config.emb_dim, rngs)
            self.decoder_norm = Norm(config, config.emb_dim, rngs)

    def encode(self, source_BS: Array, key: Key = None, packed: bool = False) -> Array:
        """Ids int32 [B, S] → states [B, S, D] in the compute dtype; those at padding must not be used."""
        keys, embed_key = split_layer_keys(key, self.config.num_encoder_layers)
        mask = encoder_mask(source_BS, packed)
        x_BSD, rotation = self._embed_with_positions("source", source_BS, packed_positions(mask), embed_key)

        def call(layer: EncoderLayer, x_BSD: Array, layer_key: Key) -> Array:
            return layer(x_BSD, mask, layer_key, rotation)

        x_BSD = apply_layers(self.encoder, x_BSD, keys, self.config.remat, call)
        return self.encoder_norm(x_BSD) if self.config.norm == "pre" else x_BSD

    def decode(
        self, encoded_BSD: Array, source_BS: Array, target_BT: Array, key: Key = None, packed: bool = False
    ) -> Array:
        """Logits float32 [B, T, V] of all target positions at once, each given the tokens before it."""
        keys, embed_key = split_layer_keys(key, self.config.num_decoder_layers)
        self_mask, cross_mask = decoder_masks(source_BS, target_BT, packed)
        positions_BT = packed_positions(self_mask)
        x_BTD, rotation = self._embed_with_positions("target", shift_right(target_BT), positions_BT, embed_key)

        def call(layer: DecoderLayer, x_BTD: Array, layer_key: Key) -> Array:
            return layer(x_BTD, encoded_BSD, self_mask, cross_mask, layer_key, rotation)

        x_BTD = apply_layers(self.decoder, x_BTD, keys, self.config.remat, call)
        return self._final_logits(x_BTD)

    def cross_attention(self, source_BS: Array, target_BT: Array) -> Array:
        """Implements `Seq2SeqModel.cross_attention`."""
        return jnp.stack(self._decoder_weights(source_BS, target_BT).cross_attention, axis=1)

    def self_attention(self, source_BS: Array, target_BT: Array) -> tuple[Array, Array]:
        """Implements `Seq2SeqModel.self_attention`."""
        x_BSD, rotation = self._embed_with_positions("source", source_BS)
        mask = encoder_mask(source_BS)
        weights: list[Array] = []
        for layer in unstack_layers(self.encoder):
            x_BSD = layer(x_BSD, mask, None, rotation, weights)
        decoder_weights = self._decoder_weights(source_BS, target_BT).self_attention
        return jnp.stack(weights, axis=1), jnp.stack(decoder_weights, axis=1)

    def _decoder_weights(self, source_BS: Array, target_BT: Array) -> DecoderWeights:
        encoded_BSD = self.encode(source_BS)
        x_BTD, rotation = self._embed_with_positions("target", shift_right(target_BT))
        self_mask, cross_mask = decoder_masks(source_BS, target_BT)
        weights = DecoderWeights([], [])
        for layer in unstack_layers(self.decoder):
            x_BTD = layer(x_BTD, encoded_BSD, self_mask, cross_mask, None, rotation, weights)
        return weights

    def init_decode(
        self, source_BS: Array, beams: int, max_length: int, cache_length: int | None = None
    ) -> tuple[EncodedSource, KVCache]:
        """Implements `Seq2SeqModel.init_decode`."""
        encoded_BSD = self.encode(source_BS)
        layers = unstack_layers(self.decoder)
        kv = [layer.cross.keys_values(encoded_BSD) for layer in layers]
        source_kv = [(k_BSHK.transpose(0, 2, 3, 1), v_BSHK.swapaxes(1, 2)) for k_BSHK, v_BSHK in kv]
        cache_length = cache_length or max_length
        C = cache_length * beams
        caches = [
            LayerKVCache(
                jnp.zeros((*k_BHKS.shape[:3], C), self.dtype),
                jnp.zeros((*v_BHSK.shape[:2], C, v_BHSK.shape[3]), self.dtype),
            )
            for k_BHKS, v_BHSK in source_kv
        ]
        beam_history_BNT = jnp.zeros((source_BS.shape[0], beams, cache_length), jnp.int32)
        source = EncodedSource(source_kv, encoder_mask(source_BS))
        return source, KVCache(caches, beam_history_BNT)

    def decode_step(
        self,
        source: EncodedSource,
        cache: KVCache,
        inputs_BN: Array,
        position: Array,
        return_attention: bool = False,
    ) -> tuple[Array, KVCache, Array | None]:
        """Implements `Seq2SeqModel.decode_step`."""
        cache_length = cache.beam_history_BNT.shape[2]
        x_BND, rotation = self._embed_with_positions("target", inputs_BN, position[None, None], length=cache_length)
        beam_BN1 = jax.lax.broadcasted_iota(jnp.int32, (*inputs_BN.shape, 1), 1)
        history_BNT = jax.lax.dynamic_update_slice_in_dim(cache.beam_history_BNT, beam_BN1, position, axis=2)
        read_history_BNT = history_BNT if self.attends_across_beams else None
        layers = unstack_layers(self.decoder)
        layer_caches, attention_BNS = [], None
        for layer, source_kv, layer_cache in zip(layers, source.layers, cache.layers, strict=True):
            is_returned = return_attention and layer is layers[-1]
            x_BND, layer_cache, attention_BNS = layer.step(
                x_BND, source_kv, source.mask, layer_cache, read_history_BNT, position, rotation, is_returned
            )
            layer_caches.append(layer_cache)
        return self._final_logits(x_BND), KVCache(layer_caches, history_BNT), attention_BNS

    def _embed_with_positions(
        self,
        side: str,
        ids: Array,
        position_ids_BT: Array | None = None,
        key: Key = None,
        length: int | None = None,
    ) -> tuple[Array, Rotation | None]:
        """Embeds ids, [B, T] or [B, N], at 0 … T - 1 or at given positions, int32 [B or 1, T or 1].

        Rotary positions are not added but returned, as the rotation of queries and keys in the self-attention of all
        layers.

        Args:
          length: given positions are below it; None: the width of `ids`.
        """
        length = ids.shape[1] if length is None else length
        if self.config.positions != "rotary":
            encodings = self._position_encodings(side, length, position_ids_BT)
            return self._embed(side, ids, encodings, key), None
        positions_BT = jnp.arange(length, dtype=jnp.int32)[None] if position_ids_BT is None else position_ids_BT
        rotation = rotation_at(positions_BT, self.config.qkv_dim // self.config.num_heads)
        return self._embed(side, ids, None, key), rotation

    def _final_logits(self, x: Array) -> Array:
        """Logits of the decoder's last states, which pre-norm layers leave without a norm."""
        return self._logits(self.decoder_norm(x) if self.config.norm == "pre" else x)
