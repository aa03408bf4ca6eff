"""Sentences within a row: which token belongs to which, at which place, and what the decoder is fed.

Every sentence ends in EOS and padding comes last, so a packed row, in which several sentences follow one
another, needs nothing but its ids to be told apart. Sentence n of a source row is the source of sentence n
of the target row.

B rows, T length.
"""

import jax
import jax.numpy as jnp

from transformer.data.tokenizer import BOS, EOS, PAD

Array = jax.Array


def segments(ids_BT: Array) -> Array:
    """The number of the sentence that each token belongs to, from 1, and 0 for padding: int32 [B, T]."""
    ends_BT = (ids_BT == EOS).astype(jnp.int32)
    return jnp.where(ids_BT == PAD, 0, jnp.cumsum(ends_BT, axis=1) - ends_BT + 1)


def positions(segments_BT: Array) -> Array:
    """The place of each token within its sentence, from 0: int32 [B, T]."""
    here_BT = jax.lax.broadcasted_iota(jnp.int32, segments_BT.shape, 1)
    before_BT = jnp.pad(segments_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    starts_BT = jnp.where(segments_BT != before_BT, here_BT, 0)
    return here_BT - jax.lax.cummax(starts_BT, axis=1)


def shift_right(target_BT: Array) -> Array:
    """The decoder's input: every sentence begins with BOS and lacks its end."""
    before_BT = jnp.pad(target_BT[:, :-1], ((0, 0), (1, 0)), constant_values=EOS)
    return jnp.where(before_BT == EOS, BOS, before_BT)
