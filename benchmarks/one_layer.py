"""Sequential depth, FLOPs and path length of one layer of each family, for a sequence length.

Depth and FLOPs are read from the program that XLA compiles, with loops counted by their trip counts; nothing is run for
them. Path lengths are determined by gradients.

T length, D width, H heads, K width per head, G gates of an LSTM.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from transformer.attention.dot_product import dot_product_attention
from transformer.attention.mask import AttentionMask
from transformer.config import Config, validation
from transformer.models import convolutional, transformer
from transformer.models.lstm import Lstm, LstmState, lstm_scan
from transformer.planning import hlo, hlo_cost

Layer = Callable[[Array], Array]

FAMILIES = ("attention", "recurrent", "convolutional")


def family_config(family: str, width: int, dtype: str = "float32", attention: str = "plain") -> Config:
    """1+1 layers without dropout; attention has 4 heads and a feed-forward width of 4 D."""
    fields: dict[str, Any] = {"family": family, "emb_dim": width, "num_layers": 1, "dropout_rate": 0.0, "dtype": dtype}
    if family == "attention":
        fields.update(num_heads=4, mlp_dim=4 * width, attention=attention)
    return validation.validate({"model": fields, "mesh": {"data": 1}})


def make_layer(family: str, width: int) -> Layer:
    """An encoder layer with its params, [1, T, D] → [1, T, D]."""
    config, rngs = family_config(family, width).model, nnx.Rngs(params=0)
    if family == "recurrent":
        lstm = Lstm(width, width, rngs)
        return lambda x_1TD: lstm(x_1TD, None)
    if family == "convolutional":
        gated = convolutional.EncoderLayer(config, rngs)
        return lambda x_1TD: gated(x_1TD, jnp.ones(x_1TD.shape[:2], jnp.int32), None)
    layer = transformer.EncoderLayer(config, rngs)
    return lambda x_1TD: layer(x_1TD, AttentionMask(), None)


def layer_program(family: str, width: int, length: int) -> hlo.Program:
    """The compiled forward pass of one layer."""
    x_1TD = jax.ShapeDtypeStruct((1, length, width), jnp.float32)
    return compiled(make_layer(family, width), x_1TD)


def core_program(family: str, width: int, length: int) -> hlo.Program:
    """Only what mixes positions, without projections: QK^T and weighted values; recurrence; convolution."""
    if family == "attention":
        heads = jax.ShapeDtypeStruct((1, length, 4, width // 4), jnp.float32)
        mask = jnp.ones((1, 1, 1, 1), bool)
        return compiled(lambda q, k, v: dot_product_attention(q, k, v, mask), heads, heads, heads)
    if family == "convolutional":
        return layer_program(family, width, length)
    shapes = (length, 1, 4 * width), (width, 4 * width), (4 * width,)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return compiled(lambda *arrays: lstm_scan(*arrays, None, False), *arrays)


def compiled(function: Callable, *shapes: Any) -> hlo.Program:
    """Compiles a function for the default device."""
    return hlo.Program(jax.jit(function).lower(*shapes).compile().as_text() or "")


def depth(program: hlo.Program) -> int:
    """Sequential steps: the number of runs of the innermost loop; 1 without loops.

    Raises:
      ValueError: the trip count of a loop is unknown.
    """
    steps = max(run.num_runs for run in program.iter_executed())
    if program.unknown_loops:
        raise ValueError(f"unknown trip counts of the loops {program.unknown_loops}")
    return steps


def flops(program: hlo.Program) -> int:
    """FLOPs of matrix products, with loops counted by their trip counts.

    Raises:
      ValueError: there are none, as a GPU's compiler has replaced them by library calls.
    """
    count = hlo_cost.count_flops(program)
    if not count:
        raise ValueError("expected matrix products in the compiled program, found none; compile it for a CPU")
    return count


def one_operation(family: str, width: int, length: int) -> Callable[[Array], Array]:
    """States [T, D] → states [T, D] after one sequential operation at all positions at once.

    This is a whole layer of attention or convolution, but one step of a recurrent layer, in which each position takes
    its input and the state of the previous one.
    """
    if family != "recurrent":
        layer = make_layer(family, width)
        return lambda x_TD: layer(x_TD[None])[0]
    lstm = Lstm(width, width, nnx.Rngs(params=0))
    inputs_TD = jax.random.normal(jax.random.key(1), (length, width))

    def step(h_TD: Array) -> Array:
        previous = LstmState(jnp.pad(h_TD[:-1], ((1, 0), (0, 0))), jnp.zeros_like(h_TD))
        return lstm.step(inputs_TD, previous).h

    return step


def dependencies(operation: Callable[[Array], Array], width: int, length: int) -> np.ndarray:
    """Whether a position depends on another after one operation, by gradient: bool [T to, T from]."""
    x_TD = jax.random.normal(jax.random.key(0), (length, width))
    mix_D = jax.random.normal(jax.random.key(2), (width,))
    gradient = jax.jit(jax.jacrev(lambda x_TD: operation(x_TD) @ mix_D))
    return np.abs(np.asarray(gradient(x_TD))).max(-1) > 0


def path_length(family: str, width: int, length: int) -> int:
    """The maximum over pairs of positions of the least number of operations between them (paper, Table 1).

    Within one layer for attention and recurrence; for convolution, which reaches only neighbours, the number of layers.
    Pairs that a layer never connects, such as later positions to earlier ones, do not count.

    Raises:
      ValueError: the last position does not depend on the first.
    """
    depends = dependencies(one_operation(family, width, length), width, length).astype(np.float32)
    reached = np.eye(length, dtype=bool)  # to, from
    count = 1 if family == "recurrent" else 0  # the first state takes its input
    while (extended := reached | (depends @ reached > 0)).sum() > reached.sum():
        reached, count = extended, count + 1
    if not reached[-1, 0]:
        raise ValueError(f"{family}: the last of {length} positions does not depend on the first")
    return count
