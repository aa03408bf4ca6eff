"""What differs between CPUs and accelerators: the choices by platform, each with what it gains.

Only those of an attention kernel and of connections are made elsewhere, in `attention.fused` and `distributed.mesh`.
Other code is the same on all platforms. Some of it is written for XLA's CPU back end: beam search never slices
what `top_k` returns (1 ms a step instead of 103) and takes it over blocks of tokens (0.8 ms instead of 1.1), and a
random word serves four elements of dropout (7% of a training step). `command_line.reexec_with_malloc_settings`, which
has to come before JAX, saves a CPU up to a third of a step's CPU time. docs/log.md has the measurements.
"""

import jax
from jax.sharding import Mesh

from transformer.config.attention_kernels import BLOCKWISE_MIN_LENGTH
from transformer.runtime import environment

ATTENTION_BLOCK = 128  # queries and keys of a block of blockwise attention; larger ones are slower on a CPU
DECODE_ROWS, DECODE_ROWS_ON_CPU = 256, 16
MAX_COMPILE_THREADS = 8  # each needs a gigabyte or two of host memory
MAX_THREADS = 4  # each has a KV cache of its own


def current() -> str:
    """The platform of the program that is traced: cpu, gpu or tpu."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def is_cpu(mesh: Mesh) -> bool:
    """Whether the devices of a mesh are CPUs."""
    return mesh.devices.flat[0].platform == "cpu"


def norm_saves_normed() -> bool:
    """Whether a norm keeps its normalized input for the gradient, rather than the input's mean and deviation.

    An accelerator waits for memory: mean and deviation save two of five passes over the activations. A CPU would
    have to normalize again.
    """
    return current() == "cpu"


def merges_leading_axes() -> bool:
    """Whether products of activations with a kernel see batch and length as one axis.

    The kernel's gradient sums over both. XLA's CPU back end first copies the other operands of sums over two axes,
    transposed, and may compute them again for it: a feed-forward block takes 1.4 times as long, a gated one without
    biases 2.2 times.
    """
    return current() == "cpu"


def gathers_target_logits() -> bool:
    """Whether the loss gathers the logit of each target token, rather than compare all token ids with it.

    The gradient of a gather is a scatter into all logits, a pass of its own; a comparison is part of the pass that
    writes the gradient: a seventh of the memory traffic of a base step. A CPU has few tokens and compares slowly.
    """
    return current() == "cpu"


def materializes_dropout_masks() -> bool:
    """Whether dropout writes its mask down, rather than hash it again in the backward pass.

    A CPU hashes slowly; an accelerator waits for memory.
    """
    return current() == "cpu"


def fused_attention_min_length() -> int:
    """Queries and keys from which on `auto` takes a fused kernel.

    cuDNN takes arrays as the projections leave them, where plain attention on a GPU transposes each of them: a sixth
    of the traffic of a base step of 40 tokens. Splash fills lengths up to multiples of 128.
    """
    return 1 if current() == "gpu" else BLOCKWISE_MIN_LENGTH


def compile_threads(mesh: Mesh) -> int:
    """Programs that are compiled at once, before the first update; 1: each when it is first needed.

    A TPU's compiler keeps one core busy, and the devices would wait for it again and again. A GPU's times candidates of
    kernels on the GPU, which two at once would disturb (openxla/xla issue 41620), and a CPU's takes all cores: there
    training begins earlier with one shape.
    """
    is_tpu = mesh.devices.flat[0].platform == "tpu"
    return min(environment.available_cpus(), MAX_COMPILE_THREADS) if is_tpu else 1


def copies_state_to_save() -> bool:
    """Whether a checkpoint is written from a copy of the state on the devices.

    On a CPU the writer has views of the arrays, and the next update cannot reuse memory of which there are views. It
    would allocate its own beside a busy writer, which takes three times as long as the copy. From an accelerator the
    arrays are copied to the host.
    """
    return current() == "cpu"


def decode_rows(mesh: Mesh) -> int:
    """Sentences that are decoded at once.

    Each accelerator decodes 256 in about the time of 16; on a CPU they would wait for the slowest of them, and KV
    caches and logits would not fit its cache: 32 at once take 1.26 times the CPU time of 16.
    """
    return DECODE_ROWS_ON_CPU if is_cpu(mesh) else DECODE_ROWS * mesh.size


def decode_threads(mesh: Mesh) -> int:
    """Batches that are decoded concurrently, each by a thread.

    A CPU runs the programs of one thread one after the other, so two threads take 0.55 of the time on two cores. An
    accelerator queues them itself.
    """
    if mesh.size > 1 or not is_cpu(mesh):
        return 1
    return min(environment.available_cpus(), MAX_THREADS)
