"""Sharding: one table from logical axes to mesh axes, and the placement of params, activations and batches.

Models name the axes of their params and activations `vocab`, `batch`, `heads` and so on; the table says which mesh
axes split them. An axis missing from the table is an error, never silently replicated. Everything runs under `jax.jit`
with these shardings; XLA derives the communication between devices.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from transformer.config.validation import divisibility_error
from transformer.data.batching import Batch, BatchSchedule, Bucket
from transformer.distributed.mesh import MESH_AXES
from transformer.runtime.errors import UserError
from transformer.runtime.rounding import round_up

Axes = tuple[str | None, ...]


# Of an array's logical axes, the first that lists a mesh axis is split over it: `fsdp` splits activations by `batch`,
# which precedes `embed`, and params by `embed`.
LOGICAL_AXIS_RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "decode_batch": MESH_AXES,  # every device searches translations of its own rows
    "length": ("sequence",),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv": (),
    "mlp": ("tensor",),
    "gates": ("fsdp",),  # of recurrent and convolutional layers: a multiple of emb_dim
    "hidden": (),
    "conv_kernel": (),
    "norm": (),  # vectors, too small to be split
    "positions": (),
    "layers": (),
}
ACTIVATION_AXES = ("batch", "length", "embed")  # of what passes from layer to layer
HEAD_AXES = ("batch", "length", "heads", "kv")  # of queries, keys and values
ROW_AXES = ("batch", "length")  # of ids
FSDP_AXIS = "fsdp"  # splits params in memory; they are gathered for use
AXIS_CONFIG_FIELD = {
    "vocab": "data.vocab_size",
    "embed": "model.emb_dim",
    "heads": "model.num_heads",
    "mlp": "model.mlp_dim",
    "gates": "model.emb_dim",
}


def logical_to_mesh(axes: Axes) -> PartitionSpec:
    """The mesh axes of an array with these logical axes; None is an axis that is not split."""
    return PartitionSpec(*_mesh_axes(axes))


def _mesh_axes(axes: Axes) -> list[tuple[str, ...] | None]:
    unknown = [axis for axis in axes if axis is not None and axis not in LOGICAL_AXIS_RULES]
    if unknown:
        raise ValueError(f"no rule for the logical axis {unknown[0]!r}; add it to sharding.LOGICAL_AXIS_RULES")
    used: set[str] = set()
    mesh_axes: list[tuple[str, ...] | None] = []
    for axis in axes:
        free = tuple(name for name in LOGICAL_AXIS_RULES[axis] if name not in used) if axis else ()
        used.update(free)
        mesh_axes.append(free or None)
    return mesh_axes


def param_shardings(mesh: Mesh, abstract_params: nnx.State) -> dict:
    """The sharding of each param, as a nested dict like `nnx.to_pure_dict(abstract_params)`.

    Raises:
      ValueError: a param whose axes have no names, or fewer names than axes.
      UserError: the mesh does not divide one of its dimensions.
    """

    def of(path: tuple, param: nnx.Variable) -> NamedSharding:
        axes, shape = param.get_metadata().get("axes"), param.get_value().shape
        if axes is None or len(axes) != len(shape):
            raise ValueError(f"param {'/'.join(map(str, path))}: expected a name for each axis, got {axes}")
        for axis, names, size in zip(axes, _mesh_axes(axes), shape, strict=True):
            for name in names or ():  # at most one
                if size % mesh.shape[name]:
                    raise UserError(divisibility_error(f"mesh.{name}", mesh.shape[name], AXIS_CONFIG_FIELD[axis], size))
        return NamedSharding(mesh, logical_to_mesh(axes))

    flat = {path: of(path, param) for path, param in nnx.to_flat_state(abstract_params)}
    return nnx.to_pure_dict(nnx.from_flat_state(flat))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of a value that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, rows: str = "batch") -> NamedSharding:
    """The sharding of ids [B, T] by rows; whole rows, as packed sentences are separated along the length."""
    return NamedSharding(mesh, logical_to_mesh((rows,)))


def use_mesh(mesh: Mesh) -> AbstractContextManager:
    """Inside a traced function: the block may split arrays over this mesh."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def _current_mesh() -> AbstractMesh | None:
    """The mesh that XLA may split arrays over; None outside `use_mesh`, on one device, and inside `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types else mesh


def with_logical_constraint(x: jax.Array, axes: Axes) -> jax.Array:
    """Splits an activation by its logical axes; returns `x` itself without a mesh."""
    mesh = _current_mesh()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, logical_to_mesh(axes)))


def all_gather_param(param: jax.Array, axes: Axes) -> jax.Array:
    """All-gathers a param that FSDP splits in memory; its gradient is reduce-scattered."""
    mesh = _current_mesh()
    if mesh is None or mesh.shape[FSDP_AXIS] == 1:
        return param
    others = [tuple(name for name in names or () if name != FSDP_AXIS) for names in _mesh_axes(axes)]
    return _all_gather(param, NamedSharding(mesh, PartitionSpec(*others)), NamedSharding(mesh, logical_to_mesh(axes)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _all_gather(param: jax.Array, used: NamedSharding, stored: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(param, used)


_all_gather.defvjp(
    lambda param, used, stored: (_all_gather(param, used, stored), None),
    lambda used, stored, _, grad: (jax.lax.with_sharding_constraint(grad, stored),),
)


def save_all_but_gathered(*_: Any, **params: Any) -> bool:
    """A policy for `jax.checkpoint`: the backward pass gathers params again; everything else is saved.

    It recognizes `_all_gather`, which the jaxpr shows as

        custom_vjp_call[name=_all_gather call_jaxpr={ lambda ; a:f32[8,8]. let b = sharding_constraint[…] a in (b,) } …]

    A policy by `jax.ad_checkpoint.checkpoint_name` would save the gathered params all the same.
    """
    called = params.get("call_jaxpr")
    return called is None or [equation.primitive.name for equation in called.eqns] != ["sharding_constraint"]


def num_shards(axis: str, mesh: Mesh | None = None) -> int:
    """The number of shards of a logical axis in a mesh, by default the current one."""
    given = _current_mesh() if mesh is None else mesh
    return 1 if given is None else math.prod(given.shape[name] for name in LOGICAL_AXIS_RULES[axis])


def shard_map(function: Callable, arguments: tuple[Axes, ...], result: Axes) -> Callable:
    """`jax.shard_map` of a function over the current mesh, by logical axes; the function itself without a mesh.

    Args:
      arguments: the logical axes of each argument's arrays, or of their first axes.
      result: those of what it returns.
    """
    if _current_mesh() is None:
        return function
    return jax.shard_map(
        function,
        in_specs=tuple(logical_to_mesh(axes) for axes in arguments),
        out_specs=logical_to_mesh(result),
        check_vma=False,
    )


def axis_index(axis: str) -> jax.Array:
    """Inside `shard_map`: the index of this device's shard of a logical axis, int32."""
    return jax.lax.axis_index(LOGICAL_AXIS_RULES[axis])


def ring_permute(axis: str, values: Any, count: int) -> Any:
    """Inside `shard_map`: sends arrays to the next of the `count` devices that split an axis, in a ring."""
    (name,) = LOGICAL_AXIS_RULES[axis]
    ring = [(i, (i + 1) % count) for i in range(count)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, name, ring), values)


def data_parallel_jit(mesh: Mesh, function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Compiles function(params, rows) → rows so that each device computes its own rows without communication.

    With several processes, each of them gets the results of all rows.
    """
    rows = logical_to_mesh(("decode_batch",))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=rows, check_vma=False)
    return jax.jit(mapped) if jax.process_count() == 1 else jax.jit(mapped, out_shardings=replicated(mesh))


def replicate(mesh: Mesh, params: Any) -> Any:
    """Replicates the params on every device, as `data_parallel_jit` needs them."""
    if jax.process_count() == 1:
        return jax.device_put(params, replicated(mesh))
    return make_all_gather(mesh)(params)


@functools.cache
def make_all_gather(mesh: Mesh) -> Callable[[Any], Any]:
    """A jitted function that replicates arrays; one for each mesh, traced once for equal shapes."""
    return jax.jit(lambda arrays: arrays, out_shardings=replicated(mesh))


def padded_batch_size(mesh: Mesh, count: int, num_micro_batches: int = 1, rows: str = "batch") -> int:
    """The number of rows of a batch of `count` rows once it is padded."""
    return round_up(count, num_shards(rows, mesh) * num_micro_batches)


def padding_warning(mesh: Mesh, schedule: BatchSchedule, num_micro_batches: int) -> str:
    """A warning that padding the rows of training batches costs much; empty if it costs little."""
    padded = schedule.num_token_positions(lambda rows: padded_batch_size(mesh, rows, num_micro_batches))
    ratio = padded / schedule.num_token_positions()
    message = (
        f"mesh.data x mesh.fsdp = {num_shards('batch', mesh)} times train.accumulation_steps = {num_micro_batches} "
        f"must divide the rows: padding makes them {ratio:.1f} times as many; lower one of these, or raise "
        "train.batch_tokens"
    )
    return message if ratio > 1.25 else ""


def local_row_indices(
    mesh: Mesh, count: int, num_micro_batches: int = 1, rows: str = "batch", devices: Iterable[jax.Device] | None = None
) -> np.ndarray:
    """The indices of the rows of a global batch that the devices of this process hold, ascending.

    Args:
      count: rows of the batch. Indices from `count` on are rows of padding.
      num_micro_batches, rows: see `shard_batch`.
      devices: others than those of this process.
    """
    total = padded_batch_size(mesh, count, num_micro_batches, rows)
    slices = batch_sharding(mesh, rows).devices_indices_map((total,))
    local_devices = mesh.local_devices if devices is None else devices
    return np.unique(np.concatenate([np.arange(total)[slices[device]] for device in local_devices]))


def pad_batch(batch: Any, height: int, width: int) -> Any:
    """Pads the arrays [B, T] of a batch with zeros, which are padding ids, to multiples of a height and a width."""

    def pad(array: np.ndarray) -> np.ndarray:
        missing = [(0, -array.shape[0] % height), (0, -array.shape[1] % width)]
        return np.pad(array, missing) if any(after for _, after in missing) else array

    return jax.tree.map(pad, batch)


def shard_batch(mesh: Mesh, batch: Any, num_micro_batches: int = 1, rows: str = "batch") -> Any:
    """Pads a batch until it divides over the mesh, and puts it on the devices as global arrays.

    Only here a batch depends on the mesh: its schedule does not.

    Args:
      batch: all rows; with several processes those of this one, which `local_row_indices` names, padding included.
      num_micro_batches: into how many parts each device's rows must divide.
      rows: logical axis of the rows: `batch`, or `decode_batch`, whose width stays as it is.
    """
    sharding, divisor = batch_sharding(mesh, rows), num_shards(rows, mesh)
    width = num_shards("length", mesh) if rows == "batch" else 1
    if jax.process_count() == 1:
        return jax.device_put(pad_batch(batch, divisor * num_micro_batches, width), sharding)
    num_local = len(local_row_indices(mesh, divisor, rows=rows))  # of `divisor` rows

    def shard(array: np.ndarray) -> jax.Array:
        shape = (len(array) * divisor // num_local, *array.shape[1:])
        with jax.transfer_guard_host_to_device("allow"):
            return jax.make_array_from_process_local_data(sharding, array, shape)

    return jax.tree.map(shard, pad_batch(batch, 1, width))


def abstract_batch(mesh: Mesh, bucket: Bucket, num_micro_batches: int = 1) -> Batch:
    """Shapes, dtypes and shardings of what `shard_batch` makes of a batch of this shape."""
    rows, shards = padded_batch_size(mesh, bucket.rows, num_micro_batches), num_shards("length", mesh)
    sides = [(rows, round_up(width, shards)) for width in (bucket.source, bucket.target)]
    return Batch(*(jax.ShapeDtypeStruct(shape, np.int32, sharding=batch_sharding(mesh)) for shape in sides))


def allgather_to_devices(mesh: Mesh, values_K: np.ndarray) -> jax.Array:
    """Gathers the values of all processes on every device: [devices, K], in the order of the mesh. Asynchronous."""
    shape, sharding = (mesh.size, *values_K.shape), batch_sharding(mesh, "decode_batch")
    return make_all_gather(mesh)(jax.make_array_from_callback(shape, sharding, lambda _: values_K[None]))
