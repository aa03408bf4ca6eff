"""Chooses the implementation of attention for arrays, mask and devices, and calls it.

B batch, T query length, S key length, H heads, K width per head.
"""

from collections.abc import Callable

from jax import Array

from transformer.attention import fused
from transformer.attention.blockwise import blockwise_attention
from transformer.attention.dot_product import dot_product_attention
from transformer.attention.mask import AttentionMask
from transformer.attention.ring import ring_attention
from transformer.config.attention_kernels import BLOCKWISE_MIN_LENGTH, FUSED_ATTENTION_PLATFORMS
from transformer.distributed import platform as platforms
from transformer.distributed import sharding

WITH_DROPOUT: dict[str, Callable[..., Array]] = {
    "plain": dot_product_attention,
    "blockwise": blockwise_attention,
    "ring": ring_attention,
}
FUSED: dict[str, Callable[..., Array]] = {"cudnn": fused.cudnn_attention, "splash": fused.splash_attention}


def attend(
    implementation: str,
    q_BTHK: Array,
    k_BSHK: Array,
    v_BSHK: Array,
    mask: AttentionMask,
    dropout_rate: float = 0.0,
    key: Array | None = None,
) -> Array:
    """softmax(q kᵀ / √K) v under `mask`, by an implementation of `model.attention`.

    Args:
      dropout_rate: of attention weights; without `key` there is no dropout.

    Returns:
      [B, T, H, K] in the dtype of `v_BSHK`.
    """
    name = choose(implementation, q_BTHK, v_BSHK, mask, 0.0 if key is None else dropout_rate)
    if name in FUSED:
        return FUSED[name](q_BTHK, k_BSHK, v_BSHK, mask)
    return WITH_DROPOUT[name](q_BTHK, k_BSHK, v_BSHK, mask, dropout_rate, key)


def choose(implementation: str, q_BTHK: Array, v_BSHK: Array, mask: AttentionMask, dropout_rate: float) -> str:
    """Resolves `model.attention` for these arrays on the devices of the traced program."""
    queries, keys = q_BTHK.shape[1], v_BSHK.shape[1]
    is_forced = FUSED_ATTENTION_PLATFORMS.get(implementation) == platforms.current()
    is_auto = implementation == "auto" or implementation in FUSED
    # Lengths come last: in an exported program, which names its attention, they are symbols and cannot be compared.
    may_fuse = is_forced or (is_auto and queries * keys >= platforms.fused_attention_min_length() ** 2)
    kernel = fused.select_kernel(q_BTHK, v_BSHK, mask, dropout_rate) if may_fuse else ""
    return resolve(implementation, queries, keys, kernel)


def resolve(implementation: str, queries: int, keys: int, kernel: str = "") -> str:
    """Resolves `model.attention` to an implementation; a ring of one device is blockwise.

    Args:
      kernel: the fused kernel to take where auto may choose; a forced one that is another is treated as auto.
    """
    ring = sharding.num_shards("length") > 1
    if implementation == "auto" or (implementation in FUSED and implementation != kernel):
        is_long = queries * keys >= BLOCKWISE_MIN_LENGTH**2  # plain attention would take much memory
        return "ring" if ring else kernel or ("blockwise" if is_long else "plain")
    return "blockwise" if implementation == "ring" and not ring else implementation
