"""The run that `train.init_from` names, as far as a config is checked against it: without JAX."""

import contextlib
import json
from collections.abc import Collection
from typing import Any

from etils import epath

from transformer.config.schema import FOLLOW_EMB_DIM, ModelConfig, field_default, field_names
from transformer.runtime import object_storage

# Fields of the model in which a run and its base may differ, as trained params mean the same with any value of them.
FREE = {
    *("dropout_rate", "attention_dropout_rate", "mlp_dropout_rate"),
    *("attention", "qkv_init_gain", "remat", "dtype"),
}


def with_sizes(values: dict[str, dict], flags: Collection[tuple[str, str]] = (), workdir: str = "") -> dict[str, dict]:
    """Sections of a config whose open sizes of model and vocabulary are those of the base that it starts from.

    Args:
      values: sections of fields; what is missing or at its default is open.
      flags: (section, field) of what flags set, which is not open whatever its value.
      workdir: where the run goes on if it has begun: then its own sizes count, and the base may be gone.
    """
    base = values.get("train", {}).get("init_from")
    kept = isinstance(base, str) and base and ((workdir and _kept_config(workdir)) or _kept_config(base))
    if not kept:
        return values
    sizes = [("model", name) for name in field_names("model") if name not in FREE] + [("data", "vocab_size")]
    filled = {**values, "model": {**values.get("model", {})}, "data": {**values.get("data", {})}}
    width = filled["model"].get("emb_dim", ModelConfig.emb_dim)
    for section, name in sizes:
        default = width if name in FOLLOW_EMB_DIM else field_default(section, name)
        if (section, name) not in flags and filled[section].get(name, default) == default:
            filled[section][name] = kept.get(section, {}).get(name, field_default(section, name))
    if filled["model"].get("positions") != "learned":  # nothing reads it then, but earlier versions kept one
        own = values.get("model", {}).get("max_positions", field_default("model", "max_positions"))
        filled["model"]["max_positions"] = own
    return filled


def _kept_config(workdir: str) -> dict[str, dict[str, Any]]:
    """The config in the newest checkpoint that has a readable one, not checked; empty where there is none."""
    if object_storage.unsupported_reason(workdir):
        return {}
    folder = epath.Path(workdir).expanduser() / "checkpoints"
    names: list[str] = []
    with contextlib.suppress(OSError):  # who reads the run says what is wrong with it
        names = [path.name for path in folder.iterdir() if path.name.isdecimal()]
    for name in sorted(names, key=int, reverse=True):
        with contextlib.suppress(OSError, ValueError):
            kept = json.loads((folder / name / "config.json").read_text())
            if isinstance(kept, dict):
                return kept
    return {}
