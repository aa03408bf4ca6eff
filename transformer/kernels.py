"""Attention by kernels that come with JAX: cuDNN's on NVIDIA GPUs, splash on TPUs; and where they can run.

Both keep memory linear in the length: neither ever sees a mask of queries by keys. They drop no attention
weights, and each device needs whole sentences: a length that the mesh splits takes the ring.

B batch, T query length, S key length, H heads, K width per head.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import Mesh

from transformer import sharding
from transformer.attention import Visible
from transformer.config import Config
from transformer.device_limits import KERNELS, AttentionUse, kernel_misfit
from transformer.errors import UserError

Array = jax.Array

HEADS, ROWS = ("batch", "length", "heads", "kv"), ("batch", "length")
LANES = 128  # splash counts keys by these
BLOCK = 512  # queries and keys of splash's largest block
OLDEST_GPU = 8.0  # compute capability: Ampere


def require(config: Config, mesh: Mesh) -> None:
    """Sees to it that a kernel that the config forces can run on the mesh's devices.

    Raises:
      UserError: what does not fit, before anything is compiled.
    """
    path, device = config.model.attention, mesh.devices.flat[0]
    if path not in KERNELS:
        return
    use = dataclasses.replace(AttentionUse.of(config), parts=sharding.row_multiple(mesh, "length"))
    misfit = (
        f"it runs on {KERNELS[path]} devices, and these are {device.platform} devices ({device.device_kind})"
        if device.platform != KERNELS[path]
        else f"it needs a GPU of compute capability {OLDEST_GPU} or more, and these have {device.compute_capability}"
        if path == "cudnn" and too_old(device)
        else kernel_misfit(path, use)
    )
    if misfit:
        raise UserError(f"config.model.attention = {path}: {misfit}; auto takes what fits")


def too_old(device: Any) -> bool:
    """Whether a GPU is from before Ampere; one that is described and not here tells nothing, and is not."""
    return float(getattr(device, "compute_capability", OLDEST_GPU)) < OLDEST_GPU


def here(q_BTHK: Array, v_BSHK: Array, visible: Visible, dropout_rate: float) -> str:
    """The kernel that can attend so on the devices of the program that is traced; empty where none can."""
    use = AttentionUse(
        str(q_BTHK.dtype),
        q_BTHK.shape[-1],
        v_BSHK.shape[-1],
        dropout_rate,
        packed=visible.queries_BT is not None,
        parts=sharding.shards("length"),
    )
    platform = sharding.platform()
    for path, wanted in KERNELS.items():
        if platform == wanted and not kernel_misfit(path, use):
            old = platform == jax.default_backend() == "gpu" and too_old(jax.local_devices()[0])
            return "" if old else path
    return ""


def cudnn_attention(q_BTHK: Array, k_BSHK: Array, v_BSHK: Array, visible: Visible) -> Array:
    """As `attention.dot_product_attention` under `visible`, by cuDNN: [B, T, H, K], bfloat16.

    What is padding it learns from the length of each row, so rows are of one sentence, padded at the end.
    """

    def attend(q_BTHK: Array, k_BSHK: Array, v_BSHK: Array, lengths_B: Array | None) -> Array:
        return jax.nn.dot_product_attention(
            q_BTHK,
            k_BSHK,
            v_BSHK,
            is_causal=visible.causal,
            key_value_seq_lengths=lengths_B,
            implementation="cudnn",
        )

    split = sharding.per_device(attend, (HEADS, HEADS, HEADS, ("batch",)), HEADS)
    return split(q_BTHK, k_BSHK, v_BSHK, key_lengths(visible))


def key_lengths(visible: Visible) -> Array | None:
    """How many keys of each row are no padding, int32 [B]; None: all. A row of padding has one, for a finite mean."""
    if visible.keys_BS is None:
        return None
    return jnp.maximum((visible.keys_BS != 0).sum(axis=1, dtype=jnp.int32), 1)


def splash_attention(q_BTHK: Array, k_BSHK: Array, v_BSHK: Array, visible: Visible, interpret: bool = False) -> Array:
    """As `attention.dot_product_attention` under `visible`, by splash attention: [B, T, H, K].

    Args:
      interpret: computes what the kernel would, slowly, where there is no TPU.
    """
    local = functools.partial(_splash, visible.causal, interpret)
    split = sharding.per_device(local, (HEADS, HEADS, HEADS, ROWS, ROWS), HEADS)
    return split(q_BTHK, k_BSHK, v_BSHK, *segments(visible, q_BTHK.shape, k_BSHK.shape))


def segments(visible: Visible, queries: tuple[int, ...], keys: tuple[int, ...]) -> tuple[Array | None, Array | None]:
    """Numbers of queries [B, T] and keys [B, S] that see each other where they are equal; None: all do."""
    keys_BS = visible.keys_BS
    if keys_BS is None:
        # Keys that fill up the last block come after all queries, where causality hides them.
        if (visible.causal and queries[1] <= keys[1]) or not keys[1] % LANES:
            return None, None
        keys_BS = jnp.ones(keys[:2], jnp.int32)
    if visible.queries_BT is None:
        return jnp.ones(queries[:2], jnp.int32), (keys_BS != 0).astype(jnp.int32)
    return visible.queries_BT, keys_BS


def _splash(
    causal: bool,
    interpret: bool,
    q_BTHK: Array,
    k_BSHK: Array,
    v_BSHK: Array,
    queries_BT: Array | None,
    keys_BS: Array | None,
) -> Array:
    """One device's rows and heads."""
    T, S, H, K = q_BTHK.shape[1], k_BSHK.shape[1], q_BTHK.shape[2], q_BTHK.shape[3]
    filled = -(-T // LANES) * LANES, -(-S // LANES) * LANES
    q_BHTK, k_BHSK, v_BHSK = (
        jnp.swapaxes(_fill(array, size), 1, 2)
        for array, size in zip((q_BTHK * K**-0.5, k_BSHK, v_BSHK), (filled[0], filled[1], filled[1]), strict=True)
    )
    ids = None
    if queries_BT is not None and keys_BS is not None:
        ids = splash.SegmentIds(_fill(queries_BT, filled[0]), _fill(keys_BS, filled[1]))
    with jax.numpy_dtype_promotion("standard"):
        out_BHTK = jax.vmap(_kernel(H, *filled, causal, interpret))(q_BHTK, k_BHSK, v_BHSK, ids)
    return jnp.swapaxes(out_BHTK, 1, 2)[:, :T]


def _fill(array: Array, length: int) -> Array:
    """Zeros at the end, up to this length."""
    return jnp.pad(array, [(0, length - size if axis == 1 else 0) for axis, size in enumerate(array.shape)])


@functools.lru_cache(maxsize=64)
def _kernel(heads: int, queries: int, keys: int, causal: bool, interpret: bool) -> Any:
    """The kernel for arrays [H, T or S, K]. Of long sentences, to find its blocks takes a minute."""
    block_q, block_s = math.gcd(queries, BLOCK), math.gcd(keys, BLOCK)
    sizes = splash.BlockSizes(*(block_q, block_s, block_s), *(block_q, block_s, block_s), *(block_q, block_s))
    one = (splash.CausalMask if causal else splash.FullMask)((queries, keys))
    with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"):
        kernel = splash.make_splash_mha_single_device(
            splash.MultiHeadMask([one] * heads), block_sizes=sizes, interpret=interpret
        )
        return jax.device_get(kernel)
