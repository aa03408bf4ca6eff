"""LSTM encoder–decoder in the style of GNMT (Wu et al. 2016).

The first encoder layer is bidirectional, half of the width each. All layers but the first of the encoder and of the
decoder have residual connections. The first decoder layer computes the queries of cross-attention, and all layers above
it, and here the output too, receive its context, as in the GNMT of MLPerf: so attention runs for all target positions
at once and only the recurrence is sequential.

B batch, S source length, T target length, D model width, N beams, H width of a state, G = 4 H its gates.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from transformer.attention.dropout import dropout
from transformer.attention.mask import AttentionMask
from transformer.config import ModelConfig
from transformer.distributed import sharding
from transformer.models.base import FixedSizeCache, Seq2SeqModel, segment_ids, shift_right
from transformer.models.cross_attention import SingleHeadCrossAttention, weighted_sum
from transformer.models.linear import linear, merge_leading
from transformer.models.params import Key, glorot, make_param, read_param, split_layer_keys


class LstmState(NamedTuple):
    """Output [B, H] and memory cell, float32 [B, H], after a step."""

    h: Array
    c: Array


class LstmWeights(NamedTuple):
    """Weights of input and previous state, and bias of the gates, in the compute dtype."""

    input_DG: Array
    state_HG: Array
    bias_G: Array


def lstm_cell(gates: Array, state: LstmState) -> tuple[LstmState, Array]:
    """Computes one step from pre-activation gates [..., G]; also returns the activated gates, float32 [..., G]."""
    width = gates.shape[-1] // 4
    gates_f32 = gates.astype(jnp.float32)
    activated = jnp.concatenate(
        [jax.nn.sigmoid(gates_f32[..., : 3 * width]), jnp.tanh(gates_f32[..., 3 * width :])], axis=-1
    )
    i, f, o, g = jnp.split(activated, 4, axis=-1)
    c = f * state.c + i * g
    return LstmState((o * jnp.tanh(c)).astype(gates.dtype), c), activated


def lstm(x_BTD: Array, weights: LstmWeights, keep_BT: Array | None = None, reverse: bool = False) -> Array:
    """Runs a layer over all steps from a state of zeros.

    Args:
      keep_BT: bool, whether a step continues from the previous state; false resets it; None: all continue.
      reverse: runs from the last step to the first.

    Returns:
      The states h [B, T, H].
    """
    # Length first, so that the rows of a step are contiguous; the input is transposed, for the gates are wider.
    x_TBD = jnp.swapaxes(x_BTD, 0, 1)
    x_TBG = linear("...d,dg->...g", x_TBD, weights.input_DG)
    keep_TB1 = None if keep_BT is None else keep_BT.T[:, :, None].astype(jnp.float32)
    return jnp.swapaxes(lstm_scan(x_TBG, weights.state_HG, weights.bias_G, keep_TB1, reverse), 0, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def lstm_scan(x_TBG: Array, state_HG: Array, bias_G: Array, keep_TB1: Array | None, reverse: bool) -> Array:
    """The recurrence: projected inputs [T, B, G] → states [T, B, H]; `keep_TB1` is `keep_BT` as float32."""
    return _forward(x_TBG, state_HG, bias_G, keep_TB1, reverse)[0]


def _forward(
    x_TBG: Array, state_HG: Array, bias_G: Array, keep_TB1: Array | None, reverse: bool
) -> tuple[Array, tuple]:
    B, H = x_TBG.shape[1], state_HG.shape[0]
    zero = LstmState(jnp.zeros((B, H), x_TBG.dtype), jnp.zeros((B, H), jnp.float32))

    def step(state: LstmState, inputs: tuple[Array, Array | None]) -> tuple[LstmState, tuple]:
        x_BG, keep_B1 = inputs
        previous = LstmState(*(_reset_state(value, keep_B1) for value in state))
        state, activated = lstm_cell(x_BG + previous.h @ state_HG + bias_G[None], previous)
        return state, (state.h, state.c, activated.astype(x_BG.dtype))

    _, (h_TBH, c_TBH, gates_TBG) = jax.lax.scan(step, zero, (x_TBG, keep_TB1), reverse=reverse)
    return h_TBH, (h_TBH, c_TBH, gates_TBG, state_HG, keep_TB1)


def _backward(reverse: bool, saved: tuple, grad_TBH: Array) -> tuple[Array, Array, Array, Array | None]:
    h_TBH, c_TBH, gates_TBG, state_HG, keep_TB1 = saved
    previous_h, previous_c = (_previous_states(states, keep_TB1, reverse) for states in (h_TBH, c_TBH))
    zero = LstmState(jnp.zeros(h_TBH.shape[1:], jnp.float32), jnp.zeros(c_TBH.shape[1:], jnp.float32))

    def step(next_grad: LstmState, inputs: tuple) -> tuple[LstmState, Array]:
        grad_BH, c, previous_c, gates, keep_B1 = inputs
        i, f, o, g = jnp.split(gates.astype(jnp.float32), 4, axis=-1)
        tanh_c = jnp.tanh(c)
        grad_h = next_grad.h + grad_BH.astype(jnp.float32)
        grad_c = next_grad.c + grad_h * o * (1.0 - tanh_c * tanh_c)
        grads = (
            grad_c * g * i * (1.0 - i),
            grad_c * previous_c * f * (1.0 - f),
            grad_h * tanh_c * o * (1.0 - o),
            grad_c * i * (1.0 - g * g),
        )
        grad_BG = jnp.concatenate(grads, axis=-1).astype(gates.dtype)
        grad_previous_h = jax.lax.dot_general(
            grad_BG, state_HG, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        return LstmState(_reset_state(grad_previous_h, keep_B1), _reset_state(grad_c * f, keep_B1)), grad_BG

    inputs = (grad_TBH, c_TBH, previous_c, gates_TBG, keep_TB1)
    _, grad_TBG = jax.lax.scan(step, zero, inputs, reverse=not reverse)
    return (
        grad_TBG,
        _weight_gradient(previous_h, grad_TBG),
        grad_TBG.sum((0, 1)),
        None if keep_TB1 is None else jnp.zeros_like(keep_TB1),
    )


def _weight_gradient(previous_TBH: Array, grad_TBG: Array) -> Array:
    """The gradient of `state_HG`, summed over all steps: [H, G]."""
    previous, grad = merge_leading(previous_TBH), merge_leading(grad_TBG)
    leading = list(range(grad.ndim - 1))
    return jnp.tensordot(previous, grad, (leading, leading))


lstm_scan.defvjp(_forward, _backward)


def _reset_state(value: Array, keep_B1: Array | None) -> Array:
    return value if keep_B1 is None else value * jnp.broadcast_to(keep_B1.astype(value.dtype), value.shape)


def _previous_states(states_TBH: Array, keep_TB1: Array | None, reverse: bool) -> Array:
    """The state from which each step continued."""
    end = ((0, 1), (0, 0), (0, 0)) if reverse else ((1, 0), (0, 0), (0, 0))
    shifted = jnp.pad(states_TBH[1:] if reverse else states_TBH[:-1], end)
    return _reset_state(shifted, keep_TB1)


class EncodedSource(NamedTuple):
    """Encoder states and their keys [B, S, D], shared by all beams."""

    encoded_BSD: Array
    keys_BSD: Array
    mask: AttentionMask


class Lstm(nnx.Module):
    """One layer in one direction."""

    def __init__(self, in_dim: int, width: int, rngs: nnx.Rngs, reverse: bool = False):
        self.reverse = reverse
        self.kernel_in = make_param(rngs, glorot(), (in_dim, 4 * width), ("hidden", "gates"))
        self.kernel_state = make_param(rngs, glorot(), (width, 4 * width), ("hidden", "gates"))
        self.bias = make_param(rngs, forget_bias_init, (4 * width,), ("norm",))

    def weights(self, dtype: jnp.dtype) -> LstmWeights:
        """The weights in the compute dtype."""
        return LstmWeights(
            read_param(self.kernel_in, dtype), read_param(self.kernel_state, dtype), self.bias[...].astype(dtype)
        )

    def __call__(self, x_BTD: Array, segment_ids_BT: Array | None) -> Array:
        """[B, T, D in] → [B, T, width]; the state is reset where a segment starts, and so at padding."""
        keep_BT = None if segment_ids_BT is None else continues_segment(segment_ids_BT, self.reverse)
        return lstm(x_BTD, self.weights(x_BTD.dtype), keep_BT, self.reverse)

    def step(self, x_BND: Array, state: LstmState) -> LstmState:
        """Computes one position of every beam."""
        weights = self.weights(x_BND.dtype)
        gates = x_BND @ weights.input_DG + state.h @ weights.state_HG
        return lstm_cell(gates + jnp.broadcast_to(weights.bias_G, gates.shape), state)[0]


class LstmSeq2Seq(Seq2SeqModel):
    """The model of `family = recurrent`; `lowest` is the first decoder layer."""

    def __init__(self, config: ModelConfig, vocab_size: int, rngs: nnx.Rngs):
        super().__init__(config, vocab_size, rngs)
        width = config.emb_dim
        self.forward = Lstm(width, width // 2, rngs)
        self.backward = Lstm(width, width // 2, rngs, reverse=True)
        self.encoder = nnx.List([Lstm(width, width, rngs) for _ in range(config.num_encoder_layers - 1)])
        self.lowest = Lstm(width, width, rngs)
        self.attention = SingleHeadCrossAttention(width, config.attention_score, rngs)
        self.decoder = nnx.List([Lstm(2 * width, width, rngs) for _ in range(config.num_decoder_layers - 1)])
        self.out = make_param(rngs, glorot(), (2 * width, width), ("hidden", "gates"))

    def encode(self, source_BS: Array, key: Key = None, packed: bool = False) -> Array:
        """Implements `Seq2SeqModel.encode`."""
        keys, embed_key = split_layer_keys(key, self.config.num_encoder_layers)
        # The backward layer reads padding before the sentence, so its state is always reset; the others only if packed.
        segment_ids_BS = segment_ids(source_BS)
        forward_segments_BS = segment_ids_BS if packed else None
        x_BSD = self._embed("source", source_BS, None, embed_key)
        x_BSD = jnp.concatenate(
            [self.forward(x_BSD, forward_segments_BS), self.backward(x_BSD, segment_ids_BS)], axis=-1
        )
        x_BSD = self._dropout(x_BSD, keys, 0)
        for number, layer in enumerate(self.encoder, 1):
            x_BSD = sharding.with_logical_constraint(
                x_BSD + self._dropout(layer(x_BSD, forward_segments_BS), keys, number), sharding.ACTIVATION_AXES
            )
        return x_BSD

    def decode(
        self, encoded_BSD: Array, source_BS: Array, target_BT: Array, key: Key = None, packed: bool = False
    ) -> Array:
        """Implements `Seq2SeqModel.decode`."""
        return self._teacher_forced(encoded_BSD, source_BS, target_BT, key, packed)[0]

    def cross_attention(self, source_BS: Array, target_BT: Array) -> Array:
        """Implements `Seq2SeqModel.cross_attention`, with one layer of one head."""
        weights_BTS = self._teacher_forced(self.encode(source_BS), source_BS, target_BT, None, False)[1]
        return weights_BTS[:, None, None]

    def _teacher_forced(
        self, encoded_BSD: Array, source_BS: Array, target_BT: Array, key: Key, packed: bool
    ) -> tuple[Array, Array]:
        """Logits and cross-attention weights, float32 [B, T, S]."""
        keys, embed_key = split_layer_keys(key, self.config.num_decoder_layers)
        segment_ids_BT = segment_ids(target_BT) if packed else None
        source = self._source(encoded_BSD, source_BS, segment_ids_BT)
        y_BTD = self._embed("target", shift_right(target_BT), None, embed_key)
        x_BTD = self._dropout(self.lowest(y_BTD, segment_ids_BT), keys, 0)
        context_BTD, weights_BTS = self._attend(x_BTD, source)
        for number, layer in enumerate(self.decoder, 1):
            out_BTD = layer(jnp.concatenate([x_BTD, context_BTD], axis=-1), segment_ids_BT)
            x_BTD = sharding.with_logical_constraint(
                x_BTD + self._dropout(out_BTD, keys, number), sharding.ACTIVATION_AXES
            )
        return self._output(x_BTD, context_BTD), weights_BTS

    def init_decode(
        self, source_BS: Array, beams: int, max_length: int, cache_length: int | None = None
    ) -> tuple[EncodedSource, FixedSizeCache]:
        """Implements `Seq2SeqModel.init_decode`; the size of the cache does not depend on the length."""
        shape = (source_BS.shape[0], beams, self.config.emb_dim)
        empty = [
            LstmState(jnp.zeros(shape, self.dtype), jnp.zeros(shape, jnp.float32))
            for _ in range(self.config.num_decoder_layers)
        ]
        return self._source(self.encode(source_BS), source_BS, None), FixedSizeCache(empty)

    def decode_step(
        self,
        source: EncodedSource,
        cache: FixedSizeCache,
        inputs_BN: Array,
        position: Array,
        return_attention: bool = False,
    ) -> tuple[Array, FixedSizeCache, Array | None]:
        """Implements `Seq2SeqModel.decode_step`."""
        states = [self.lowest.step(self._embed("target", inputs_BN, None, None), cache.layers[0])]
        x_BND = states[0].h
        context_BND, weights_BNS = self._attend(x_BND, source)
        for layer, previous in zip(self.decoder, cache.layers[1:], strict=True):
            states.append(layer.step(jnp.concatenate([x_BND, context_BND], axis=-1), previous))
            x_BND = x_BND + states[-1].h
        return self._output(x_BND, context_BND), FixedSizeCache(states), weights_BNS if return_attention else None

    def _source(self, encoded_BSD: Array, source_BS: Array, segment_ids_BT: Array | None) -> EncodedSource:
        return EncodedSource(
            encoded_BSD, self.attention.keys(encoded_BSD), AttentionMask(segment_ids_BT, segment_ids(source_BS))
        )

    def _attend(self, x_BTD: Array, source: EncodedSource) -> tuple[Array, Array]:
        """Context of each query, and its attention weights."""
        weights_BTS = self.attention.weights(x_BTD, source.keys_BSD, source.mask)
        return weighted_sum(weights_BTS, source.encoded_BSD), weights_BTS

    def _output(self, x_BTD: Array, context_BTD: Array) -> Array:
        joined_BTD = jnp.concatenate([x_BTD, context_BTD], axis=-1)
        return self._logits(linear("...e,ed->...d", joined_BTD, read_param(self.out, joined_BTD.dtype)))

    def _dropout(self, x_BTD: Array, keys: Key, layer: int) -> Array:
        return dropout(x_BTD, self.config.dropout_rate, None if keys is None else keys[layer])


def continues_segment(segment_ids_BT: Array, reverse: bool) -> Array:
    """Whether a position is in the segment of the one read before it, bool [B, T]; false for the first.

    segment ids [1, 1, 2, 0] → [F, T, F, F], and in reverse [T, F, F, F].
    """
    end = ((0, 0), (0, 1)) if reverse else ((0, 0), (1, 0))
    previous_BT = jnp.pad(segment_ids_BT[:, 1:] if reverse else segment_ids_BT[:, :-1], end, constant_values=-1)
    return segment_ids_BT == previous_BT


def forget_bias_init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Zeros, and ones for the forget gate (Gers et al. 2000)."""
    width = shape[0] // 4
    return jnp.zeros(shape, dtype).at[width : 2 * width].set(1)
