"""The long short-term memory as a pure function of arrays (Hochreiter and Schmidhuber 1997, with forget gates).

Only what depends on the state before is computed within the loop: one product a step. Products with the input are
made before it, all steps at once, and so is, after the loop of the backward pass, the gradient of the weights.

B batch, T length, D input width, H state width, G = 4 H the gates: input, forget, output and candidate.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from transformer.distributed import sharding

Array = jax.Array


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


recur.defvjp(_forward, _backward)


def _weight_gradient(before_TBH: Array, grad_TBG: Array) -> Array:
    """Of the product of each step, over all steps: [H, G]."""
    before, grad = _rows(before_TBH), _rows(grad_TBG)
    leading = list(range(grad.ndim - 1))
    return jnp.tensordot(before, grad, (leading, leading))


def _rows(x_TBD: Array) -> Array:
    """As a matrix, whose products XLA's CPU back end makes faster; as it is where a mesh splits the batch.

    XLA does not see that an axis is split once it is joined to another that comes before it, and gathers it.
    """
    return x_TBD if sharding.shards("batch") > 1 else x_TBD.reshape(-1, x_TBD.shape[-1])


def _kept(value: Array, keep_B1: Array | None) -> Array:
    return value if keep_B1 is None else value * jnp.broadcast_to(keep_B1.astype(value.dtype), value.shape)


def _before(states_TBH: Array, keep_TB1: Array | None, reverse: bool) -> Array:
    """The state from which each step went on."""
    end = ((0, 1), (0, 0), (0, 0)) if reverse else ((1, 0), (0, 0), (0, 0))
    shifted = jnp.pad(states_TBH[1:] if reverse else states_TBH[:-1], end)
    return _kept(shifted, keep_TB1)
