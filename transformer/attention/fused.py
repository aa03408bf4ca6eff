"""Attention by kernels that come with JAX: cuDNN's on NVIDIA GPUs, splash on TPUs; and where they can run.

Both keep memory linear in the length: neither ever sees a mask of queries by keys. They drop no attention
weights, and each device needs whole sentences: a length that the mesh splits takes the ring.

B batch, T query length, S key length, H heads, K width per head.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import Mesh

from transformer.attention.dot_product import dot_product_attention
from transformer.attention.mask import Visible
from transformer.config import Config, MeshConfig
from transformer.config.validation import BLOCKWISE_FROM, KERNELS, AttentionUse, kernel_misfit
from transformer.distributed import multihost, sharding
from transformer.distributed.mesh import make_mesh
from transformer.runtime import environment
from transformer.runtime.errors import UserError
from transformer.runtime.logging import log_info

HEADS, ROWS = ("batch", "length", "heads", "kv"), ("batch", "length")
LANES = 128  # splash counts keys by these
BLOCK = 512  # queries and keys of splash's largest block
OLDEST_GPU = 8.0  # compute capability: Ampere
TRIAL_LENGTH = 64  # tokens on either side
TRIAL_ERROR = 0.05  # of bfloat16 against float32, relative to the norm: ten times what rounding makes

# What trials of cuDNN found, by the width of a head: why it failed, empty where it works.
_trials: dict[int, str] = {}


def require(config: Config, mesh: Mesh) -> None:
    """Checks that a forced kernel can run on the mesh's devices, and tries cuDNN where training may choose it.

    All processes must call it, before anything else is compiled: they agree here on what the trial found.

    Raises:
      UserError: what does not fit.
    """
    path = config.model.attention
    use = dataclasses.replace(AttentionUse.of(config), parts=sharding.batch_divisor(mesh, "length"))
    misfit = _misfit(path if path in KERNELS else "cudnn", mesh.devices.flat[0], use)
    # Of long sequences, buckets have even widths: a longest row of 511 tokens makes one of 512.
    is_long = config.model.family == "attention" and config.data.longest_row + 1 >= BLOCKWISE_FROM
    # Devices that are only described cannot try anything.
    tries = not misfit and _is_here(mesh) and (path == "cudnn" or (path == "auto" and is_long))
    if path in KERNELS and (misfit := misfit or (_trial(use.key_width) if tries else "")):
        raise UserError(f"config.model.attention = {path}: {misfit}; auto takes what fits")
    found = ("works" if cudnn_works(use.key_width) else "fails") if tries else ""
    environment.set_trials({"cuDNN attention": found} if found else {})


def _misfit(path: str, device: Any, use: AttentionUse) -> str:
    """Why a kernel cannot do this on a device, for people; empty where it can."""
    if device.platform != KERNELS[path]:
        kind = f"{device.platform} devices ({device.device_kind})"
        return f"it runs on {KERNELS[path]} devices, and these are {kind}"
    return (unfit_gpu(device) if path == "cudnn" else "") or kernel_misfit(path, use)


def unfit_gpu(device: Any) -> str:
    """Why cuDNN's attention cannot run on a GPU, for people; one that is described and not here tells nothing."""
    capability = str(getattr(device, "compute_capability", OLDEST_GPU))
    # That of an AMD GPU is a name, such as gfx942.
    fits = capability.replace(".", "", 1).isdecimal() and float(capability) >= OLDEST_GPU
    wanted = f"it needs an NVIDIA GPU of compute capability {OLDEST_GPU} or more"
    return "" if fits else f"{wanted}, and these have {capability}"


def _is_here(mesh: Mesh) -> bool:
    """Whether the mesh has devices of this process, and is not of devices that are only described."""
    return not set(jax.local_devices()).isdisjoint(mesh.devices.flat)


def here(q_BTHK: Array, v_BSHK: Array, visible: Visible, dropout_rate: float) -> str:
    """The kernel that can attend so on the devices of the program that is traced; empty where none can."""
    use = AttentionUse(
        str(q_BTHK.dtype),
        q_BTHK.shape[-1],
        v_BSHK.shape[-1],
        dropout_rate,
        packed=visible.queries_BT is not None,
        parts=sharding.num_shards("length"),
    )
    platform = sharding.platform()
    for path, wanted in KERNELS.items():
        if platform == wanted and not kernel_misfit(path, use):
            must_work = path == "cudnn" and jax.default_backend() == "gpu"  # else the GPU is only described
            return path if not must_work or cudnn_works(use.key_width) else ""
    return ""


def cudnn_works(width: int) -> bool:
    """Whether cuDNN attends with heads of this width on the GPUs of all processes; the first call tries it.

    All processes must call it alike. A failure of the trial is one warning.
    """
    is_first = width not in _trials
    failure = _trial(width)
    if failure and is_first and not unfit_gpu(jax.local_devices()[0]):
        log_info(f"warning: no attention by cuDNN: {failure}; auto attends by blocks instead")
    return not failure


def _trial(width: int) -> str:
    """Why cuDNN cannot attend with heads of this width on some process's GPUs; empty where it can."""
    if width not in _trials:
        # A thread of its own knows nothing of the trace, the mesh and the transfer guard in which this is asked.
        with ThreadPoolExecutor(1) as pool:
            mine = unfit_gpu(jax.local_devices()[0]) or pool.submit(try_cudnn, width).result()
        found = multihost.allgather("cuDNN attention", mine)
        failures = [
            f"{text} on {multihost.process_name(i)}" if len(found) > 1 else text for i, text in enumerate(found) if text
        ]
        _trials[width] = failures[0] if failures else ""
    return _trials[width]


def try_cudnn(width: int) -> str:
    """Runs cuDNN's attention and its gradient once, on all GPUs of this process together, against the plain path.

    On some versions of CUDA and cuDNN it finds no execution plan (github.com/jax-ml/jax/issues/32430), and on several
    GPUs it has failed where on one it works (27599).

    Returns:
      What went wrong, for people; empty where nothing did.
    """
    devices = jax.local_devices()
    mesh = make_mesh(MeshConfig(data=len(devices)), devices)
    rng, shape = np.random.default_rng(0), (2 * len(devices), TRIAL_LENGTH, 2, width)
    qkvg = [rng.standard_normal(shape).astype(jnp.bfloat16) for _ in "qkvg"]
    lengths_B1 = rng.integers(1, TRIAL_LENGTH, (shape[0], 1))
    keys_BS = (np.arange(TRIAL_LENGTH) < lengths_B1).astype(np.int32)

    def gradients(attend: Callable[..., Array], dtype: Any) -> list[np.ndarray]:
        def of(qkvg: list[Array], keys_BS: Array) -> list[Array]:
            *qkv, grad_BTHK = (array.astype(dtype) for array in qkvg)
            found: list[Array] = []
            with sharding.use_mesh(mesh):
                for visible in (Visible(causal=True), Visible(keys_BS=keys_BS)):
                    out_BTHK, pull = jax.vjp(lambda *qkv, visible=visible: attend(*qkv, visible), *qkv)
                    found += [out_BTHK, *pull(grad_BTHK)]
            return [array.astype(jnp.float32) for array in found]

        return jax.device_get(jax.jit(of)(*jax.device_put((qkvg, keys_BS), sharding.batch_sharding(mesh))))

    def plain(q_BTHK: Array, k_BSHK: Array, v_BSHK: Array, visible: Visible) -> Array:
        return dot_product_attention(q_BTHK, k_BSHK, v_BSHK, visible.mask(TRIAL_LENGTH, TRIAL_LENGTH))

    try:
        found = gradients(cudnn_attention, jnp.bfloat16)
    except Exception as error:
        return f"a trial failed with {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    wanted = gradients(plain, jnp.float32)
    errors = [np.linalg.norm(one - two) / np.linalg.norm(two) for one, two in zip(found, wanted, strict=True)]
    worst = float(np.max(errors))
    return "" if worst < TRIAL_ERROR else f"in a trial its numbers were off by {worst:.2g} of their norm"


def cudnn_attention(q_BTHK: Array, k_BSHK: Array, v_BSHK: Array, visible: Visible) -> Array:
    """As `attention.dot_product_attention` under `visible`, by cuDNN: [B, T, H, K], bfloat16.

    What is padding it learns from the length of each row, so rows are of one sentence, padded at the end. JAX refuses
    it odd lengths in training: such arrays are filled up to even ones.
    """

    def attend(q_BTHK: Array, k_BSHK: Array, v_BSHK: Array, lengths_B: Array | None) -> Array:
        (B, T), S = q_BTHK.shape[:2], k_BSHK.shape[1]
        if lengths_B is None and S % 2 and not (visible.causal and T <= S):
            lengths_B = jnp.full((B,), S, jnp.int32)  # else queries would see the key that is filled in
        even = [_fill(array, array.shape[1] + array.shape[1] % 2) for array in (q_BTHK, k_BSHK, v_BSHK)]
        out_BTHK = jax.nn.dot_product_attention(
            *even, is_causal=visible.causal, key_value_seq_lengths=lengths_B, implementation="cudnn"
        )
        return out_BTHK[:, :T]

    split = sharding.shard_map(attend, (HEADS, HEADS, HEADS, ("batch",)), HEADS)
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
    split = sharding.shard_map(local, (HEADS, HEADS, HEADS, ROWS, ROWS), HEADS)
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
