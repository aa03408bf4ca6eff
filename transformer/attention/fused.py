"""Fused attention kernels that come with JAX: cuDNN's on NVIDIA GPUs, splash attention on TPUs; and where they run.

Memory is linear in the length: neither materializes a T × S mask. Neither supports dropout of attention weights, and
each device needs whole rows: a sharded length takes ring attention.

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
from transformer.attention.mask import AttentionMask
from transformer.attention.padding import pad_end
from transformer.config import Config, MeshConfig
from transformer.config.attention_kernels import FUSED_ATTENTION_PLATFORMS, AttentionSpec, unsupported_reason
from transformer.distributed import multihost, sharding
from transformer.distributed import platform as platforms
from transformer.distributed.mesh import make_mesh
from transformer.runtime import environment
from transformer.runtime.errors import UserError
from transformer.runtime.logging import log_info
from transformer.runtime.rounding import round_up

HEADS, ROWS = sharding.HEAD_AXES, sharding.ROW_AXES
NUM_LANES = 128  # splash takes lengths that are multiples of it
BLOCK = 512  # queries and keys of splash's largest block
MIN_COMPUTE_CAPABILITY = 8.0  # compute capability: Ampere
TRIAL_LENGTHS = ((64, 64), (24, 40))  # queries and keys: some versions of cuDNN fail below 64
TRIAL_ERROR = 0.05  # of bfloat16 against float32, relative to the norm: ten times what rounding makes

# Why the trial of cuDNN failed, by the width of a head; empty where it works.
_trials: dict[int, str] = {}


def check_supported(config: Config, mesh: Mesh) -> None:
    """Checks that a forced kernel can run on the mesh's devices, and tries cuDNN where a run may choose it.

    All processes must call it, before anything else is compiled: they agree here on the result of the trial.

    Raises:
      UserError: the kernel is not supported, and why.
    """
    attention = config.model.attention
    # What auto does not choose for training, with dropout or packed rows, it may choose for validation.
    spec = _spec_of_translating(config) if attention == "auto" else AttentionSpec.from_config(config)
    spec = dataclasses.replace(spec, sequence_shards=sharding.num_shards("length", mesh))
    kernel = attention if attention in FUSED_ATTENTION_PLATFORMS else "cudnn"
    reason = _unsupported_reason(kernel, mesh.devices.flat[0], spec)
    # The devices of an ahead-of-time compilation cannot run anything.
    needs_trial = not reason and _is_local(mesh) and _may_choose_cudnn(config)
    failure = _trial(spec.key_width) if needs_trial else ""
    if attention in FUSED_ATTENTION_PLATFORMS and (reason or failure):
        raise UserError(f"config.model.attention = {attention}: {reason or failure}; auto chooses a supported one")
    result = ("works" if cudnn_works(spec.key_width) else "fails") if needs_trial else ""
    environment.set_trials({"cuDNN attention": result} if result else {})


def try_for_translating(config: Config) -> None:
    """Tries cuDNN where translating may choose it. All processes must call it before any of them translates alone."""
    spec = _spec_of_translating(config)
    if _may_choose_cudnn(config) and jax.default_backend() == "gpu" and not unsupported_reason("cudnn", spec):
        cudnn_works(spec.key_width)


def _may_choose_cudnn(config: Config) -> bool:
    return config.model.family == "attention" and config.model.attention in ("auto", "cudnn")


def _spec_of_translating(config: Config) -> AttentionSpec:
    return dataclasses.replace(AttentionSpec.from_config(config), dropout_rate=0.0, packed=False, sequence_shards=1)


def _unsupported_reason(kernel: str, device: Any, spec: AttentionSpec) -> str:
    """Why a kernel cannot compute this attention on a device; empty where it can."""
    if device.platform != FUSED_ATTENTION_PLATFORMS[kernel]:
        kind = f"{device.platform} devices ({device.device_kind})"
        return f"it runs on {FUSED_ATTENTION_PLATFORMS[kernel]} devices, and these are {kind}"
    return (unsupported_gpu_reason(device) if kernel == "cudnn" else "") or unsupported_reason(kernel, spec)


def unsupported_gpu_reason(device: Any) -> str:
    """Why cuDNN's attention cannot run on a GPU; empty where it can, or where the device has no compute capability."""
    capability = str(getattr(device, "compute_capability", MIN_COMPUTE_CAPABILITY))
    # The capability of an AMD GPU is a name, such as gfx942.
    is_supported = capability.replace(".", "", 1).isdecimal() and float(capability) >= MIN_COMPUTE_CAPABILITY
    if is_supported:
        return ""
    return f"it needs an NVIDIA GPU of compute capability {MIN_COMPUTE_CAPABILITY} or more, and these have {capability}"


def _is_local(mesh: Mesh) -> bool:
    """Whether the mesh has devices of this process; false of the devices of an ahead-of-time compilation."""
    return not set(jax.local_devices()).isdisjoint(mesh.devices.flat)


def select_kernel(q_BTHK: Array, v_BSHK: Array, mask: AttentionMask, dropout_rate: float) -> str:
    """The kernel that can compute this attention on the devices of the traced program; empty where none can."""
    spec = AttentionSpec(
        str(q_BTHK.dtype),
        q_BTHK.shape[-1],
        v_BSHK.shape[-1],
        dropout_rate,
        packed=mask.q_segment_ids_BT is not None,
        sequence_shards=sharding.num_shards("length"),
    )
    platform = platforms.current()
    for kernel, kernel_platform in FUSED_ATTENTION_PLATFORMS.items():
        if platform == kernel_platform and not unsupported_reason(kernel, spec):
            needs_trial = kernel == "cudnn" and jax.default_backend() == "gpu"  # not when compiling ahead of time
            return kernel if not needs_trial or cudnn_works(spec.key_width) else ""
    return ""


def cudnn_works(width: int) -> bool:
    """Whether cuDNN attends with heads of this width on the GPUs of all processes; the first call tries it.

    All processes must call it with the same width. A failed trial is logged once.
    """
    failure = _trial(width)
    if failure and not unsupported_gpu_reason(jax.local_devices()[0]):
        _warn_once(width, failure)
    return not failure


@functools.cache
def _warn_once(width: int, failure: str) -> None:
    """Logs why heads of this width do without cuDNN."""
    log_info(f"warning: attention by cuDNN is off: {failure}; auto takes plain or blockwise attention")


def _trial(width: int) -> str:
    """Why cuDNN cannot attend with heads of this width on some process's GPUs; empty where it can."""
    if width not in _trials:
        # In another thread, because the trace, the mesh and the transfer guard of the caller are thread-local.
        with ThreadPoolExecutor(1) as pool:
            own_failure = unsupported_gpu_reason(jax.local_devices()[0]) or pool.submit(try_cudnn, width).result()
        by_process = multihost.allgather("cuDNN attention", own_failure)
        failures = [
            f"{text} on {multihost.process_name(i)}" if len(by_process) > 1 else text
            for i, text in enumerate(by_process)
            if text
        ]
        _trials[width] = failures[0] if failures else ""
    return _trials[width]


def try_cudnn(width: int) -> str:
    """Compares cuDNN's attention and its gradient with the reference implementation, on all GPUs of this process.

    Some versions of CUDA and cuDNN find no execution plan (github.com/jax-ml/jax/issues/32430), and several GPUs have
    failed where one works (27599).

    Returns:
      The failure, as a phrase of a message; empty where there is none.
    """
    devices = jax.local_devices()
    mesh = make_mesh(MeshConfig(data=len(devices)), devices)
    rng, longest = np.random.default_rng(0), max(max(lengths) for lengths in TRIAL_LENGTHS)
    shape = (2 * len(devices), longest, 2, width)
    qkvg = [rng.standard_normal(shape).astype(jnp.bfloat16) for _ in "qkvg"]
    kv_ids_BS = (np.arange(longest) < rng.integers(1, longest, (shape[0], 1))).astype(np.int32)

    def gradients(attend: Callable[..., Array], dtype: Any) -> list[np.ndarray]:
        def run(qkvg: list[Array], kv_ids_BS: Array) -> list[Array]:
            q_BTHK, k_BSHK, v_BSHK, grad_BTHK = (array.astype(dtype) for array in qkvg)
            results: list[Array] = []
            with sharding.use_mesh(mesh):
                for T, S in TRIAL_LENGTHS:
                    padded = AttentionMask(kv_segment_ids_BS=kv_ids_BS[:, :S])
                    for mask, keys in ((AttentionMask(causal=True), T), (padded, S)):
                        qkv = q_BTHK[:, :T], k_BSHK[:, :keys], v_BSHK[:, :keys]
                        out_BTHK, pull = jax.vjp(lambda *qkv, mask=mask: attend(*qkv, mask), *qkv)
                        results += [out_BTHK, *pull(grad_BTHK[:, :T])]
            return [array.astype(jnp.float32) for array in results]

        return jax.device_get(jax.jit(run)(*jax.device_put((qkvg, kv_ids_BS), sharding.batch_sharding(mesh))))

    try:
        actual = gradients(cudnn_attention, jnp.bfloat16)
    except Exception as error:
        return f"a trial failed with {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    expected = gradients(dot_product_attention, jnp.float32)
    errors = [np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in zip(actual, expected, strict=True)]
    worst = float(np.max(errors))
    return "" if worst < TRIAL_ERROR else f"in a trial its relative error was {worst:.2g}"


def cudnn_attention(q_BTHK: Array, k_BSHK: Array, v_BSHK: Array, mask: AttentionMask) -> Array:
    """`dot_product.dot_product_attention` under `mask` by cuDNN: [B, T, H, K], bfloat16.

    Padding is given by the length of each row, so a row is one sentence, padded at the end. JAX rejects odd lengths in
    training: such arrays are padded to even ones.
    """

    def attend(q_BTHK: Array, k_BSHK: Array, v_BSHK: Array, lengths_B: Array | None) -> Array:
        (B, T), S = q_BTHK.shape[:2], k_BSHK.shape[1]
        if lengths_B is None and S % 2 and not (mask.causal and T <= S):
            lengths_B = jnp.full((B,), S, jnp.int32)  # else queries would attend to the padded key
        even = [pad_end(array, 1, round_up(array.shape[1], 2)) for array in (q_BTHK, k_BSHK, v_BSHK)]
        out_BTHK = jax.nn.dot_product_attention(
            *even, is_causal=mask.causal, key_value_seq_lengths=lengths_B, implementation="cudnn"
        )
        return out_BTHK[:, :T]

    sharded = sharding.shard_map(attend, (HEADS, HEADS, HEADS, ("batch",)), HEADS)
    return sharded(q_BTHK, k_BSHK, v_BSHK, key_lengths(mask))


def key_lengths(mask: AttentionMask) -> Array | None:
    """Number of keys of each row before its padding, int32 [B]; None: all. It is at least 1, for a finite mean."""
    if mask.kv_segment_ids_BS is None:
        return None
    return jnp.maximum((mask.kv_segment_ids_BS != 0).sum(axis=1, dtype=jnp.int32), 1)


def splash_attention(
    q_BTHK: Array, k_BSHK: Array, v_BSHK: Array, mask: AttentionMask, interpret: bool = False
) -> Array:
    """`dot_product.dot_product_attention` under `mask` by splash attention: [B, T, H, K].

    Args:
      interpret: emulates the kernel, slowly, where there is no TPU.
    """
    local = functools.partial(_splash, mask.causal, interpret)
    sharded = sharding.shard_map(local, (HEADS, HEADS, HEADS, ROWS, ROWS), HEADS)
    return sharded(q_BTHK, k_BSHK, v_BSHK, *splash_segment_ids(mask, q_BTHK.shape, k_BSHK.shape))


def splash_segment_ids(
    mask: AttentionMask, q_shape: tuple[int, ...], k_shape: tuple[int, ...]
) -> tuple[Array | None, Array | None]:
    """Segment ids of queries [B, T] and keys [B, S], which attend where they are equal; None: everywhere."""
    kv_ids_BS = mask.kv_segment_ids_BS
    if kv_ids_BS is None:
        # Padded keys of the last block come after all queries, where causality hides them.
        if (mask.causal and q_shape[1] <= k_shape[1]) or not k_shape[1] % NUM_LANES:
            return None, None
        kv_ids_BS = jnp.ones(k_shape[:2], jnp.int32)
    if mask.q_segment_ids_BT is None:
        return jnp.ones(q_shape[:2], jnp.int32), (kv_ids_BS != 0).astype(jnp.int32)
    return mask.q_segment_ids_BT, kv_ids_BS


def _splash(
    causal: bool,
    interpret: bool,
    q_BTHK: Array,
    k_BSHK: Array,
    v_BSHK: Array,
    q_ids_BT: Array | None,
    kv_ids_BS: Array | None,
) -> Array:
    """Attention of one device's rows and heads."""
    T, S, H, K = q_BTHK.shape[1], k_BSHK.shape[1], q_BTHK.shape[2], q_BTHK.shape[3]
    padded_T, padded_S = round_up(T, NUM_LANES), round_up(S, NUM_LANES)
    q_BHTK, k_BHSK, v_BHSK = (
        jnp.swapaxes(pad_end(array, 1, length), 1, 2)
        for array, length in zip((q_BTHK * K**-0.5, k_BSHK, v_BSHK), (padded_T, padded_S, padded_S), strict=True)
    )
    ids = None
    if q_ids_BT is not None and kv_ids_BS is not None:
        ids = splash.SegmentIds(pad_end(q_ids_BT, 1, padded_T), pad_end(kv_ids_BS, 1, padded_S))
    with jax.numpy_dtype_promotion("standard"):
        out_BHTK = jax.vmap(_kernel(H, padded_T, padded_S, causal, interpret))(q_BHTK, k_BHSK, v_BHSK, ids)
    return jnp.swapaxes(out_BHTK, 1, 2)[:, :T]


@functools.lru_cache(maxsize=64)
def _kernel(heads: int, queries: int, keys: int, causal: bool, interpret: bool) -> Any:
    """Builds the kernel for arrays [H, T or S, K]; for long sequences that takes a minute."""
    block_q, block_s = math.gcd(queries, BLOCK), math.gcd(keys, BLOCK)
    sizes = splash.BlockSizes(*(block_q, block_s, block_s), *(block_q, block_s, block_s), *(block_q, block_s))
    mask = (splash.CausalMask if causal else splash.FullMask)((queries, keys))
    with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"):
        kernel = splash.make_splash_mha_single_device(
            splash.MultiHeadMask([mask] * heads), block_sizes=sizes, interpret=interpret
        )
        return jax.device_get(kernel)
