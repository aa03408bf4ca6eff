"""The attention mask: which query attends to which key, kept as vectors and compared where it is used."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

MASK_VALUE = float(jnp.finfo(jnp.float32).min)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """A query attends to the keys of its own segment and, if causal, to none after its own position.

    Attributes:
      q_segment_ids_BT: int32 segment of each query; None: it attends to every key that is not padding.
      kv_segment_ids_BS: int32 segment of each key, 0 for padding; None: no key is padding.
      q_offset, kv_offset: position in the row of the first query and key, int32 [], where the arrays are a shard of
        the row; None: 0.
      causal: position t attends to positions ≤ t only (paper, section 3.2.3).
    """

    q_segment_ids_BT: Array | None = None
    kv_segment_ids_BS: Array | None = None
    q_offset: Array | None = None
    kv_offset: Array | None = None
    causal: bool = dataclasses.field(default=False, metadata={"static": True})

    def materialize(
        self, num_queries: int, num_keys: int, q_start: Array | int = 0, kv_start: Array | int = 0
    ) -> Array:
        """The boolean mask [B or 1, 1, T or 1, S or 1], of all queries and keys or of the block that starts there."""
        mask = jnp.ones((1, 1, 1, 1), bool)
        if self.kv_segment_ids_BS is not None:
            kv_ids_BS = jax.lax.dynamic_slice_in_dim(self.kv_segment_ids_BS, kv_start, num_keys, axis=1)
            kv_ids_B11S = kv_ids_BS[:, None, None, :]
            if self.q_segment_ids_BT is None:
                mask = kv_ids_B11S != 0
            else:
                q_ids_BT = jax.lax.dynamic_slice_in_dim(self.q_segment_ids_BT, q_start, num_queries, axis=1)
                mask = q_ids_BT[:, None, :, None] == kv_ids_B11S
        if self.causal:
            q_position_T1 = jax.lax.broadcasted_iota(jnp.int32, (num_queries, 1), 0) + self.q_position(q_start)
            kv_position_1S = jax.lax.broadcasted_iota(jnp.int32, (1, num_keys), 1) + self.kv_position(kv_start)
            mask = mask & (kv_position_1S <= q_position_T1)[None, None]
        return mask

    def q_position(self, index: Array | int) -> Array:
        """Position in the row of the query with this index."""
        return jnp.int32(index) + (jnp.int32(0) if self.q_offset is None else self.q_offset)

    def kv_position(self, index: Array | int) -> Array:
        """Position in the row of the key with this index."""
        return jnp.int32(index) + (jnp.int32(0) if self.kv_offset is None else self.kv_offset)
