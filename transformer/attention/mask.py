"""The attention mask: which query may see which key, kept as vectors and compared where it is used."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

LOWEST = float(jnp.finfo(jnp.float32).min)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visible:
    """Where queries may look: at keys of their own segment and, if causal, at none after their own place.

    Attributes:
      queries_BT: int32 segment of each query; None: it looks at every key that is not padding.
      keys_BS: int32 segment of each key, 0 for padding; None: no key is padding.
      first_query, first_key: place in the row of the first query and key, int32 [], where these are a part of it;
        None: 0.
      causal: position t looks at positions ≤ t only (paper, section 3.2.3).
    """

    queries_BT: Array | None = None
    keys_BS: Array | None = None
    first_query: Array | None = None
    first_key: Array | None = None
    causal: bool = dataclasses.field(default=False, metadata={"static": True})

    def mask(self, queries: int, keys: int, query: Array | int = 0, key: Array | int = 0) -> Array:
        """As a mask, over all queries and keys or over the block that begins at these."""
        mask = jnp.ones((1, 1, 1, 1), bool)
        if self.keys_BS is not None:
            keys_BS = jax.lax.dynamic_slice_in_dim(self.keys_BS, key, keys, axis=1)[:, None, None, :]
            if self.queries_BT is None:
                mask = keys_BS != 0
            else:
                queries_BT = jax.lax.dynamic_slice_in_dim(self.queries_BT, query, queries, axis=1)
                mask = queries_BT[:, None, :, None] == keys_BS
        if self.causal:
            query_T1 = jax.lax.broadcasted_iota(jnp.int32, (queries, 1), 0) + self.query_place(query)
            key_1S = jax.lax.broadcasted_iota(jnp.int32, (1, keys), 1) + self.key_place(key)
            mask = mask & (key_1S <= query_T1)[None, None]
        return mask

    def query_place(self, index: Array | int) -> Array:
        """The place in the row of a query."""
        return jnp.int32(index) + (jnp.int32(0) if self.first_query is None else self.first_query)

    def key_place(self, index: Array | int) -> Array:
        """The place in the row of a key."""
        return jnp.int32(index) + (jnp.int32(0) if self.first_key is None else self.first_key)
