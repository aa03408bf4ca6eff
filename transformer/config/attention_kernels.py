"""What the kernels that `model.attention` names support; imports no JAX, as configs are checked before it is.

`attention.fused` has the kernels, and checks the devices.
"""

import dataclasses

from transformer.config.schema import Config

BLOCKWISE_MIN_LENGTH = 512  # from this length on `auto` chooses attention with memory linear in the length

FUSED_ATTENTION_PLATFORMS = {"cudnn": "gpu", "splash": "tpu"}  # values of model.attention that need a platform


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """The attention that a kernel must support.

    Attributes:
      dtype: of queries, keys and values.
      key_width, value_width: of each head.
      dropout_rate: of attention weights.
      packed: whether rows hold several sentences.
      sequence_shards: the number of devices that share a row.
    """

    dtype: str
    key_width: int
    value_width: int
    dropout_rate: float
    packed: bool
    sequence_shards: int

    @classmethod
    def from_config(cls, config: Config) -> "AttentionSpec":
        """The attention of a config; mesh.sequence = -1 counts as 1."""
        model, heads = config.model, config.model.num_heads
        widths = model.qkv_dim // heads, model.value_dim // heads
        packed, sequence_shards = config.data.batching == "pack", max(config.mesh.sequence, 1)
        return cls(model.dtype, *widths, model.attention_dropout_rate, packed, sequence_shards)


def unsupported_reason(kernel: str, spec: AttentionSpec) -> str:
    """Why a kernel does not support this attention on any device; "" if it does."""
    if spec.dropout_rate:
        return f"it has no dropout: expected model.attention_dropout_rate = 0, got {spec.dropout_rate}"
    if spec.sequence_shards > 1:
        return f"it does not split sentences: expected mesh.sequence = 1, got {spec.sequence_shards}, which needs ring"
    if kernel == "splash":
        return ""
    if spec.dtype != "bfloat16":
        return f"it computes in half precision: expected model.dtype = bfloat16, got {spec.dtype}"
    if spec.key_width != spec.value_width:
        return f"expected keys and values of one width, got {spec.key_width} and {spec.value_width} a head"
    if spec.key_width % 8 or spec.key_width > 128:
        width = f"model.qkv_dim / num_heads = {spec.key_width}"
        return f"expected a width per head divisible by 8 and at most 128, got {width}"
    return "it does not support packed rows: expected data.batching = bucket, got pack" if spec.packed else ""
