"""The mesh, and the one table from logical axes to mesh axes; no other room names a mesh axis.

The model calls the axes of its params and activations `vocab`, `batch`, `heads` and so on; this table says
which of them a mesh splits. An axis that the table lacks is an error, never silently replicated. Everything
runs under `jax.jit` with these shardings; XLA derives what is sent from device to device.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from transformer.config.validation import divisibility_error
from transformer.data.batching import BatchSchedule
from transformer.distributed.mesh import MESH_AXES
from transformer.runtime.errors import UserError

Axes = tuple[str | None, ...]


# A mesh axis splits the first axis of an array that asks for it: in an activation the rows have `fsdp`, so its
# width stays whole, while a param is split by its width.
LOGICAL_AXIS_RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "decode_batch": MESH_AXES,  # of decoding: every device searches for its own
    "length": ("sequence",),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv": (),
    "mlp": ("tensor",),
    "gates": ("fsdp",),  # of recurrent and convolutional layers: a multiple of emb_dim
    "hidden": (),
    "conv_kernel": (),
    "norm": (),  # vectors: not worth a gather
    "positions": (),
    "layers": (),
}
FSDP_AXIS = "fsdp"  # splits params where they are stored, not where they are used
AXIS_CONFIG_FIELD = {
    "vocab": "data.vocab_size",
    "embed": "model.emb_dim",
    "heads": "model.num_heads",
    "mlp": "model.mlp_dim",
    "gates": "model.emb_dim",
}


def logical_to_mesh(axes: Axes) -> PartitionSpec:
    """Mesh axes of an array whose axes have these logical names; None is an axis that nothing splits."""
    return PartitionSpec(*_mesh_axes(axes))


def _mesh_axes(axes: Axes) -> list[tuple[str, ...] | None]:
    unknown = [axis for axis in axes if axis is not None and axis not in LOGICAL_AXIS_RULES]
    if unknown:
        raise ValueError(f"no rule for the logical axis {unknown[0]!r}; add it to sharding.LOGICAL_AXIS_RULES")
    taken: set[str] = set()
    parts: list[tuple[str, ...] | None] = []
    for axis in axes:
        free = tuple(name for name in LOGICAL_AXIS_RULES[axis] if name not in taken) if axis else ()
        taken.update(free)
        parts.append(free or None)
    return parts


def param_shardings(mesh: Mesh, abstract_params: nnx.State) -> dict:
    """A sharding for each param, as a nested dict like `nnx.to_pure_dict(abstract_params)`.

    Raises:
      ValueError: a param whose axes have no names, or fewer names than axes.
      UserError: the mesh does not divide one of its dimensions.
    """

    def of(path: tuple, param: nnx.Variable) -> NamedSharding:
        axes, shape = param.get_metadata().get("axes"), param.get_value().shape
        if axes is None or len(axes) != len(shape):
            raise ValueError(f"param {'/'.join(map(str, path))}: expected a name for each axis, got {axes}")
        for axis, names, size in zip(axes, _mesh_axes(axes), shape, strict=True):
            for name in names or ():  # one at most: no param is split by more
                if size % mesh.shape[name]:
                    raise UserError(divisibility_error(f"mesh.{name}", mesh.shape[name], AXIS_CONFIG_FIELD[axis], size))
        return NamedSharding(mesh, logical_to_mesh(axes))

    flat = {path: of(path, param) for path, param in nnx.to_flat_state(abstract_params)}
    return nnx.to_pure_dict(nnx.from_flat_state(flat))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, rows: str = "batch") -> NamedSharding:
    """Ids [B, T] split by rows; whole rows, so that sentences are told apart without asking other devices."""
    return NamedSharding(mesh, logical_to_mesh((rows,)))


@contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Inside a function that is traced: what follows may be split over this mesh, and runs on its devices."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield


def _current_mesh() -> AbstractMesh | None:
    """The mesh that XLA may split arrays over: none outside `on_mesh`, on one device, and inside `per_device`."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types else mesh


def with_logical_constraint(x: jax.Array, axes: Axes) -> jax.Array:
    """Splits an activation by its logical axes; `x` itself where there is no mesh."""
    mesh = _current_mesh()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, logical_to_mesh(axes)))


def all_gather_param(param: jax.Array, axes: Axes) -> jax.Array:
    """A param to compute with: whole along what only its storage is split by, and its gradient split again."""
    mesh = _current_mesh()
    if mesh is None or mesh.shape[FSDP_AXIS] == 1:
        return param
    kept = [tuple(name for name in names or () if name != FSDP_AXIS) for names in _mesh_axes(axes)]
    return _all_gather(param, NamedSharding(mesh, PartitionSpec(*kept)), NamedSharding(mesh, logical_to_mesh(axes)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _all_gather(param: jax.Array, used: NamedSharding, stored: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(param, used)


_all_gather.defvjp(
    lambda param, used, stored: (_all_gather(param, used, stored), None),
    lambda used, stored, _, grad: (jax.lax.with_sharding_constraint(grad, stored),),
)


def save_all_but_gathered(*_: Any, **params: Any) -> bool:
    """A policy for `jax.checkpoint`: the backward pass gathers params again, and keeps everything else."""
    called = params.get("call_jaxpr")
    return called is None or [equation.primitive.name for equation in called.eqns] != ["sharding_constraint"]


def num_shards(axis: str) -> int:
    """Into how many parts the current mesh splits a logical axis."""
    mesh = _current_mesh()
    return 1 if mesh is None else math.prod(mesh.shape[name] for name in LOGICAL_AXIS_RULES[axis])


def shard_map(function: Callable, arguments: tuple[Axes, ...], result: Axes) -> Callable:
    """The function run by each device of the current mesh on its own part of the arguments; itself without a mesh.

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
    """Inside `per_device`: which part of a logical axis this device has, int32."""
    return jax.lax.axis_index(LOGICAL_AXIS_RULES[axis])


def ring_permute(axis: str, values: Any, count: int) -> Any:
    """Inside `per_device`: gives arrays to the next of the `count` devices that split an axis, in a ring."""
    (name,) = LOGICAL_AXIS_RULES[axis]
    ring = [(i, (i + 1) % count) for i in range(count)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, name, ring), values)


def data_parallel_jit(mesh: Mesh, function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """function(params, sentences) → sentences, compiled, run by each device on its own, with nothing sent meanwhile.

    Where there are several hosts, each of them gets all sentences in the end.
    """
    rows = logical_to_mesh(("decode_batch",))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=rows, check_vma=False)
    return jax.jit(mapped) if jax.process_count() == 1 else jax.jit(mapped, out_shardings=replicated(mesh))


def replicate(mesh: Mesh, params: Any) -> Any:
    """The params whole on every device, as `over_rows` needs them."""
    if jax.process_count() == 1:
        return jax.device_put(params, replicated(mesh))
    return make_all_gather(mesh)(params)


@functools.cache
def make_all_gather(mesh: Mesh) -> Callable[[Any], Any]:
    """A compiled function that gives the same arrays, whole on every device; one for each mesh, traced once."""
    return jax.jit(lambda arrays: arrays, out_shardings=replicated(mesh))


def batch_divisor(mesh: Mesh, rows: str = "batch") -> int:
    """Rows of a batch, or of `sentences`, must divide by this."""
    return math.prod(mesh.shape[name] for name in LOGICAL_AXIS_RULES[rows])


def padded_batch_size(mesh: Mesh, count: int, parts: int = 1, rows: str = "batch") -> int:
    """How many rows `place_batch` makes of so many."""
    return count + -count % (batch_divisor(mesh, rows) * parts)


def padding_warning(mesh: Mesh, plan: BatchSchedule, parts: int) -> str:
    """What filling up the rows of training batches costs, for people; empty where it is little."""
    more = plan.num_token_slots(lambda rows: padded_batch_size(mesh, rows, parts)) / plan.num_token_slots()
    message = (
        f"mesh.data x mesh.fsdp = {batch_divisor(mesh)} times train.accumulation_steps = {parts} must divide the rows: "
        f"padding makes them {more:.1f} times as many; lower one of these, or raise train.batch_tokens"
    )
    return message if more > 1.25 else ""


def local_row_indices(
    mesh: Mesh, count: int, parts: int = 1, rows: str = "batch", devices: Iterable[jax.Device] | None = None
) -> np.ndarray:
    """The numbers of the rows of a global batch that the devices of this process hold, ascending.

    Args:
      count: rows of the batch. Where they do not divide, numbers past its end stand for rows of padding.
      parts, rows: as in `place_batch`.
      devices: others than those of this process.
    """
    total = padded_batch_size(mesh, count, parts, rows)
    places = batch_sharding(mesh, rows).devices_indices_map((total,))
    held = mesh.local_devices if devices is None else devices
    return np.unique(np.concatenate([np.arange(total)[places[device]] for device in held]))


def shard_batch(mesh: Mesh, batch: Any, parts: int = 1, rows: str = "batch") -> Any:
    """A batch → global arrays, filled up with zeros, which are padding, to divide.

    Rows divide by the devices that split them and by `parts`, the width of a training batch by those that
    split its length. Only here a batch depends on the mesh: its plan does not.

    Args:
      batch: all rows, or of several processes those that `rows_here` names.
      parts: into how many each device's rows must divide further.
      rows: logical axis of the rows: `batch`, or `sentences` to translate.
    """
    multiple = batch_divisor(mesh, rows)
    width = batch_divisor(mesh, "length") if rows == "batch" else 1
    where = batch_sharding(mesh, rows)

    def filled(array: np.ndarray, height: int) -> np.ndarray:
        missing = [(0, -array.shape[0] % height), (0, -array.shape[1] % width)]
        return np.pad(array, missing) if any(end for _, end in missing) else array

    def place(array: np.ndarray) -> jax.Array:
        if jax.process_count() == 1:
            return jax.device_put(filled(array, multiple * parts), where)
        array = filled(array, 1)
        count = len(array) * multiple // len(local_row_indices(mesh, multiple, rows=rows))
        numbers = local_row_indices(mesh, count, rows=rows)

        def part(index: Any) -> np.ndarray:
            return array[np.searchsorted(numbers, np.arange(count)[index[0]])]

        with jax.transfer_guard_host_to_device("allow"):
            return jax.make_array_from_callback((count, *array.shape[1:]), where, part)

    return jax.tree.map(place, batch)


def allgather_to_devices(mesh: Mesh, values_K: np.ndarray) -> jax.Array:
    """What each process gives, on every device: [devices, K], in the order of the mesh. Dispatched, not waited for."""
    shape, where = (mesh.size, *values_K.shape), batch_sharding(mesh, "decode_batch")
    return make_all_gather(mesh)(jax.make_array_from_callback(shape, where, lambda _: values_K[None]))
