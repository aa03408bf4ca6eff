"""What meshes and kernels can do with a config, as far as that shows without the devices themselves.

`sharding` and `kernels` check the rest, on the devices that are there.
"""

import dataclasses
import math

from transformer.config import Config
from transformer.runtime.errors import UserError

BLOCKWISE_FROM = 512  # length from which `auto` needs attention whose memory is linear in it
KERNELS = {"cudnn": "gpu", "splash": "tpu"}  # values of model.attention that run on one platform alone


def check(config: Config) -> None:
    """Raises a UserError where the mesh cannot split the model, or the kernel asked for cannot do what is asked."""
    _check_mesh(config)
    _check_kernel(config)


def _check_mesh(config: Config) -> None:
    """What the devices' number is not needed for; `sharding` checks the rest."""
    sizes = dataclasses.asdict(config.mesh)
    for name, size in sizes.items():
        if size == 0:
            raise UserError(f"config.mesh.{name}: expected -1 for all devices that are left, or at least 1, got 0")
    filling = [name for name, size in sizes.items() if size == -1]
    if len(filling) > 1:
        raise UserError(
            f"config.mesh: expected -1 in one field at most, got it in {' and '.join(filling)}; set mesh.{filling[0]} "
            "to a number"
        )
    model, mesh = config.model, config.mesh
    for name, parts, field, size in (
        ("mesh.fsdp", mesh.fsdp, "model.emb_dim", model.emb_dim),
        ("mesh.tensor", mesh.tensor, "model.num_heads", model.num_heads),
        ("mesh.tensor", mesh.tensor, "model.mlp_dim", model.mlp_dim),
        ("mesh.tensor", mesh.tensor, "data.vocab_size", config.data.vocab_size),
    ):
        if parts > 0 and size % parts:
            raise UserError(does_not_divide(name, parts, field, size))


@dataclasses.dataclass(frozen=True)
class AttentionUse:
    """What a kernel is asked for.

    Attributes:
      key_width, value_width: of each head.
      dropout_rate: of attention weights.
      packed: rows hold several sentences.
      parts: devices that share the length of a row.
    """

    dtype: str
    key_width: int
    value_width: int
    dropout_rate: float
    packed: bool
    parts: int

    @classmethod
    def of(cls, config: Config) -> "AttentionUse":
        """By a config; a length that a mesh fills up is taken as whole."""
        model, heads = config.model, config.model.num_heads
        widths = model.qkv_dim // heads, model.value_dim // heads
        packed, parts = config.data.batching == "pack", max(config.mesh.sequence, 1)
        return cls(model.dtype, *widths, model.attention_dropout_rate, packed, parts)


def kernel_misfit(path: str, use: AttentionUse) -> str:
    """Why a kernel cannot do this on any device, for people; empty where it can."""
    if use.dropout_rate:
        return f"it drops no attention weights: expected model.attention_dropout_rate = 0, got {use.dropout_rate}"
    if use.parts > 1:
        return f"it needs whole sentences: expected mesh.sequence = 1, got {use.parts}, for which there is ring"
    if path == "splash":
        return ""
    if use.dtype != "bfloat16":
        return f"it computes in half precision: expected model.dtype = bfloat16, got {use.dtype}"
    if use.key_width != use.value_width:
        return f"expected keys and values of one width, got {use.key_width} and {use.value_width} a head"
    if use.key_width % 8 or use.key_width > 128:
        return f"expected a head's width that 8 divides, at most 128, got model.qkv_dim / num_heads = {use.key_width}"
    return "it takes rows of one sentence: expected data.batching = bucket, got pack" if use.packed else ""


def _check_kernel(config: Config) -> None:
    """What the platform is not needed for; `kernels` checks that."""
    path = config.model.attention
    misfit = kernel_misfit(path, AttentionUse.of(config)) if path in KERNELS else ""
    if misfit:
        raise UserError(f"config.model.attention = {path}: {misfit}; auto takes what fits")


def does_not_divide(mesh_field: str, parts: int, field: str, size: int) -> str:
    """A mesh that cannot split a model's dimension, for people."""
    return (
        f"config.{mesh_field} = {parts} does not divide {field} = {size}; set {mesh_field} to "
        f"{math.gcd(parts, size)}, or {field} to {-(-size // parts) * parts}"
    )
