"""What attention replaced, first: encoder and decoder of LSTM layers, in the style of GNMT (Wu et al. 2016).

The first layer of the encoder reads the source in both directions, half of the width each; every other layer adds
to what it is given. The lowest layer of the decoder looks at the source, and all layers above it are given what it
finds there, as in the GNMT of MLPerf, and here the output too: so all places of a target can be attended from at once,
and what is sequential is the recurrence alone.

B batch, S source length, T target length, D model width, N beams, G gates of an LSTM.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from transformer.attention.dropout import dropout
from transformer.attention.mask import Visible
from transformer.config import ModelConfig
from transformer.distributed import sharding
from transformer.models.base import TextModel, move_beams, segments, shift_right
from transformer.models.layers import STATES, SourceAttention, glorot, make_param, use, weighted


class LstmState(NamedTuple):
    """After a step: what the layer gives [B, H], and its memory cell, float32 [B, H]."""

    h: Array
    c: Array


class Weights(NamedTuple):
    """Of a layer, in the dtype it computes in: from the input, from the state before, and the bias of the gates."""

    input_DG: Array
    state_HG: Array
    bias_G: Array


def cell(gates: Array, state: LstmState) -> tuple[LstmState, Array]:
    """One step from the gates' inputs [..., G]; also the gates themselves, float32 [..., G]."""
    width = gates.shape[-1] // 4
    wide = gates.astype(jnp.float32)
    activated = jnp.concatenate([jax.nn.sigmoid(wide[..., : 3 * width]), jnp.tanh(wide[..., 3 * width :])], axis=-1)
    i, f, o, g = jnp.split(activated, 4, axis=-1)
    c = f * state.c + i * g
    return LstmState((o * jnp.tanh(c)).astype(gates.dtype), c), activated


def lstm(x_BTD: Array, weights: Weights, keep_BT: Array | None = None, reverse: bool = False) -> Array:
    """All steps of a layer, one after the other, from a state of zeros.

    Args:
      keep_BT: bool, whether a step goes on from the state before or begins anew; None: all go on.
      reverse: from the last step to the first.

    Returns:
      The states h [B, T, H].
    """
    # Length first, so that a step's rows lie together; the narrow side of the product is what is turned round.
    x_TBD = jnp.swapaxes(x_BTD, 0, 1)
    x_TBG = _rows(x_TBD) @ weights.input_DG
    x_TBG = x_TBG.reshape(*x_TBD.shape[:2], -1)
    keep_TB1 = None if keep_BT is None else keep_BT.T[:, :, None].astype(jnp.float32)
    return jnp.swapaxes(recur(x_TBG, weights.state_HG, weights.bias_G, keep_TB1, reverse), 0, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def recur(x_TBG: Array, state_HG: Array, bias_G: Array, keep_TB1: Array | None, reverse: bool) -> Array:
    """What is sequential in a layer: gates' inputs [T, B, G] → states [T, B, H]; `keep_TB1` as `keep_BT`, float32."""
    return _forward(x_TBG, state_HG, bias_G, keep_TB1, reverse)[0]


def _forward(
    x_TBG: Array, state_HG: Array, bias_G: Array, keep_TB1: Array | None, reverse: bool
) -> tuple[Array, tuple]:
    B, H = x_TBG.shape[1], state_HG.shape[0]
    zero = LstmState(jnp.zeros((B, H), x_TBG.dtype), jnp.zeros((B, H), jnp.float32))

    def step(state: LstmState, inputs: tuple[Array, Array | None]) -> tuple[LstmState, tuple]:
        x_BG, keep_B1 = inputs
        before = LstmState(*(_kept(value, keep_B1) for value in state))
        state, activated = cell(x_BG + before.h @ state_HG + bias_G[None], before)
        return state, (state.h, state.c, activated.astype(x_BG.dtype))

    _, (h_TBH, c_TBH, gates_TBG) = jax.lax.scan(step, zero, (x_TBG, keep_TB1), reverse=reverse)
    return h_TBH, (h_TBH, c_TBH, gates_TBG, state_HG, keep_TB1)


def _backward(reverse: bool, saved: tuple, grad_TBH: Array) -> tuple[Array, Array, Array, Array | None]:
    h_TBH, c_TBH, gates_TBG, state_HG, keep_TB1 = saved
    before_h, before_c = (_before(states, keep_TB1, reverse) for states in (h_TBH, c_TBH))
    zero = LstmState(jnp.zeros(h_TBH.shape[1:], jnp.float32), jnp.zeros(c_TBH.shape[1:], jnp.float32))

    def step(later: LstmState, inputs: tuple) -> tuple[LstmState, Array]:
        grad_BH, c, c_before, gates, keep_B1 = inputs
        i, f, o, g = jnp.split(gates.astype(jnp.float32), 4, axis=-1)
        squashed = jnp.tanh(c)
        grad_h = later.h + grad_BH.astype(jnp.float32)
        grad_c = later.c + grad_h * o * (1.0 - squashed * squashed)
        grads = (
            grad_c * g * i * (1.0 - i),
            grad_c * c_before * f * (1.0 - f),
            grad_h * squashed * o * (1.0 - o),
            grad_c * i * (1.0 - g * g),
        )
        grad_BG = jnp.concatenate(grads, axis=-1).astype(gates.dtype)
        grad_before = jax.lax.dot_general(
            grad_BG, state_HG, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        return LstmState(_kept(grad_before, keep_B1), _kept(grad_c * f, keep_B1)), grad_BG

    inputs = (grad_TBH, c_TBH, before_c, gates_TBG, keep_TB1)
    _, grad_TBG = jax.lax.scan(step, zero, inputs, reverse=not reverse)
    return (
        grad_TBG,
        _weight_gradient(before_h, grad_TBG),
        grad_TBG.sum((0, 1)),
        None if keep_TB1 is None else jnp.zeros_like(keep_TB1),
    )


def _weight_gradient(before_TBH: Array, grad_TBG: Array) -> Array:
    """Of the product of each step, over all steps: [H, G]."""
    before, grad = _rows(before_TBH), _rows(grad_TBG)
    leading = list(range(grad.ndim - 1))
    return jnp.tensordot(before, grad, (leading, leading))


recur.defvjp(_forward, _backward)


def _rows(x_TBD: Array) -> Array:
    """As a matrix, whose products XLA's CPU back end makes faster; as it is where a mesh splits the batch.

    XLA does not see that an axis is split once it is joined to another that comes before it, and gathers it.
    """
    return x_TBD if sharding.num_shards("batch") > 1 else x_TBD.reshape(-1, x_TBD.shape[-1])


def _kept(value: Array, keep_B1: Array | None) -> Array:
    return value if keep_B1 is None else value * jnp.broadcast_to(keep_B1.astype(value.dtype), value.shape)


def _before(states_TBH: Array, keep_TB1: Array | None, reverse: bool) -> Array:
    """The state from which each step went on."""
    end = ((0, 1), (0, 0), (0, 0)) if reverse else ((1, 0), (0, 0), (0, 0))
    shifted = jnp.pad(states_TBH[1:] if reverse else states_TBH[:-1], end)
    return _kept(shifted, keep_TB1)


Key = Array | None


class Memory(NamedTuple):
    """The source as the decoder sees it, one for all beams: states and their keys [B, S, D]."""

    encoded_BSD: Array
    keys_BSD: Array
    visible: Visible


class Cache(NamedTuple):
    """The state of each layer of the decoder, of each beam: [B, N, D]."""

    layers: list[LstmState]

    def reorder(self, parents_BN: Array) -> "Cache":
        """After hypotheses moved from beams `parents_BN`, int32 [B, N]: states move along."""
        return move_beams(self, parents_BN)

    def grow(self, max_length: int) -> "Cache":
        """It has the same size whatever the length."""
        return self


class Lstm(nnx.Module):
    """One layer in one direction."""

    def __init__(self, in_dim: int, width: int, rngs: nnx.Rngs, reverse: bool = False):
        self.reverse = reverse
        self.kernel_in = make_param(rngs, glorot(), (in_dim, 4 * width), ("hidden", "gates"))
        self.kernel_state = make_param(rngs, glorot(), (width, 4 * width), ("hidden", "gates"))
        self.bias = make_param(rngs, _forget_nothing, (4 * width,), ("norm",))

    def weights(self, dtype: jnp.dtype) -> Weights:
        """To compute with."""
        return Weights(use(self.kernel_in, dtype), use(self.kernel_state, dtype), self.bias[...].astype(dtype))

    def __call__(self, x_BTD: Array, segments_BT: Array | None) -> Array:
        """[B, T, D in] → [B, T, width]; it begins anew where a segment does, and so at padding."""
        keep_BT = None if segments_BT is None else goes_on(segments_BT, self.reverse)
        return lstm(x_BTD, self.weights(x_BTD.dtype), keep_BT, self.reverse)

    def step(self, x_BND: Array, state: LstmState) -> LstmState:
        """One place of every beam."""
        weights = self.weights(x_BND.dtype)
        gates = x_BND @ weights.input_DG + state.h @ weights.state_HG
        return cell(gates + jnp.broadcast_to(weights.bias_G, gates.shape), state)[0]


class RecurrentModel(TextModel):
    """Encoder and decoder of LSTM layers."""

    def __init__(self, config: ModelConfig, vocab_size: int, rngs: nnx.Rngs):
        super().__init__(config, vocab_size, rngs)
        width, above = config.emb_dim, config.num_layers - 1
        self.forward = Lstm(width, width // 2, rngs)
        self.backward = Lstm(width, width // 2, rngs, reverse=True)
        self.encoder = nnx.List([Lstm(width, width, rngs) for _ in range(above)])
        self.lowest = Lstm(width, width, rngs)
        self.attention = SourceAttention(width, config.attention_score, rngs)
        self.decoder = nnx.List([Lstm(2 * width, width, rngs) for _ in range(above)])
        self.out = make_param(rngs, glorot(), (2 * width, width), ("hidden", "gates"))

    def encode(self, source_BS: Array, key: Key = None, packed: bool = False) -> Array:
        """As `TextModel.encode`."""
        keys, embed_key = self._layer_keys(key)
        # Padding must not reach a sentence from behind; rows of one sentence begin anew in that direction alone.
        segments_BS = segments(source_BS)
        ahead = segments_BS if packed else None
        x_BSD = self._embed("source", source_BS, None, embed_key)
        x_BSD = jnp.concatenate([self.forward(x_BSD, ahead), self.backward(x_BSD, segments_BS)], axis=-1)
        x_BSD = self._dropped(x_BSD, keys, 0)
        for number, layer in enumerate(self.encoder, 1):
            x_BSD = sharding.with_logical_constraint(x_BSD + self._dropped(layer(x_BSD, ahead), keys, number), STATES)
        return x_BSD

    def decode(
        self, encoded_BSD: Array, source_BS: Array, target_BT: Array, key: Key = None, packed: bool = False
    ) -> Array:
        """As `TextModel.decode`."""
        return self._teacher_forced(encoded_BSD, source_BS, target_BT, key, packed)[0]

    def cross_attention(self, source_BS: Array, target_BT: Array) -> Array:
        """As `TextModel.cross_attention`; there is one layer of one head."""
        weights_BTS = self._teacher_forced(self.encode(source_BS), source_BS, target_BT, None, False)[1]
        return weights_BTS[:, None, None]

    def _teacher_forced(
        self, encoded_BSD: Array, source_BS: Array, target_BT: Array, key: Key, packed: bool
    ) -> tuple[Array, Array]:
        """Logits, and the weights of the source, float32 [B, T, S]."""
        keys, embed_key = self._layer_keys(key)
        inside = segments(target_BT) if packed else None
        memory = self._memory(encoded_BSD, source_BS, inside)
        y_BTD = self._embed("target", shift_right(target_BT), None, embed_key)
        x_BTD = self._dropped(self.lowest(y_BTD, inside), keys, 0)
        context_BTD, weights_BTS = self._look(x_BTD, memory)
        for number, layer in enumerate(self.decoder, 1):
            found_BTD = layer(jnp.concatenate([x_BTD, context_BTD], axis=-1), inside)
            x_BTD = sharding.with_logical_constraint(x_BTD + self._dropped(found_BTD, keys, number), STATES)
        return self._output(x_BTD, context_BTD), weights_BTS

    def start(self, source_BS: Array, beams: int, max_length: int, room: int | None = None) -> tuple[Memory, Cache]:
        """As `TextModel.start`; the cache has the same size whatever the length."""
        shape = (source_BS.shape[0], beams, self.config.emb_dim)
        empty = [
            LstmState(jnp.zeros(shape, self.dtype), jnp.zeros(shape, jnp.float32))
            for _ in range(self.config.num_layers)
        ]
        return self._memory(self.encode(source_BS), source_BS, None), Cache(empty)

    def advance(
        self, memory: Memory, cache: Cache, inputs_BN: Array, position: Array, attending: bool
    ) -> tuple[Array, Cache, Any]:
        """As `TextModel.advance`."""
        states = [self.lowest.step(self._embed("target", inputs_BN, None, None), cache.layers[0])]
        x_BND = states[0].h
        context_BND, weights_BNS = self._look(x_BND, memory)
        for layer, before in zip(self.decoder, cache.layers[1:], strict=True):
            states.append(layer.step(jnp.concatenate([x_BND, context_BND], axis=-1), before))
            x_BND = x_BND + states[-1].h
        return self._output(x_BND, context_BND), Cache(states), weights_BNS if attending else None

    def _memory(self, encoded_BSD: Array, source_BS: Array, queries_BT: Array | None) -> Memory:
        return Memory(encoded_BSD, self.attention.keys(encoded_BSD), Visible(queries_BT, segments(source_BS)))

    def _look(self, x_BTD: Array, memory: Memory) -> tuple[Array, Array]:
        """What is found in the source, and the weights by which."""
        weights_BTS = self.attention.weights(x_BTD, memory.keys_BSD, memory.visible)
        return weighted(weights_BTS, memory.encoded_BSD), weights_BTS

    def _output(self, x_BTD: Array, context_BTD: Array) -> Array:
        joined_BTD = jnp.concatenate([x_BTD, context_BTD], axis=-1)
        return self._logits(jnp.einsum("bte,ed->btd", joined_BTD, use(self.out, joined_BTD.dtype)))

    def _dropped(self, x_BTD: Array, keys: Key, layer: int) -> Array:
        return dropout(x_BTD, self.config.dropout_rate, None if keys is None else keys[layer])


def goes_on(segments_BT: Array, reverse: bool) -> Array:
    """Whether a place is in the segment of the one that is read before it, bool [B, T]; of the first it is False."""
    end = ((0, 0), (0, 1)) if reverse else ((0, 0), (1, 0))
    before_BT = jnp.pad(segments_BT[:, 1:] if reverse else segments_BT[:, :-1], end, constant_values=-1)
    return segments_BT == before_BT


def _forget_nothing(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Zeros, but ones for the forget gate (Gers et al. 2000)."""
    width = shape[0] // 4
    return jnp.zeros(shape, dtype).at[width : 2 * width].set(1)
