"""Completes a config by the saved config of the run that `train.init_from` names; imports no JAX."""

import contextlib
import json
from collections.abc import Collection
from typing import Any

from etils import epath

from transformer.config.schema import DEFAULTS_TO_EMB_DIM, ModelConfig, field_default, field_names
from transformer.runtime import object_storage
from transformer.runtime.files import CONFIG_FILE

# Fields of the model that may differ from the base run: they do not change the meaning of trained params.
ALLOWED_MODEL_DIFFS = {
    *("dropout_rate", "attention_dropout_rate", "mlp_dropout_rate"),
    *("attention", "qkv_init_gain", "remat", "dtype"),
}


def inherit_sizes(
    values: dict[str, dict], flags: Collection[tuple[str, str]] = (), workdir: str = ""
) -> dict[str, dict]:
    """Replaces sizes of model and vocabulary that are at their defaults by those of the base run.

    Args:
      values: sections of fields.
      flags: (section, field) set by flags, which are kept even at their defaults.
      workdir: of the run. If it has checkpoints, its own sizes are used, and the base may be missing.
    """
    base = values.get("train", {}).get("init_from")
    saved = isinstance(base, str) and base and ((workdir and _load_saved_config(workdir)) or _load_saved_config(base))
    if not saved:
        return values
    sizes = [("model", name) for name in field_names("model") if name not in ALLOWED_MODEL_DIFFS]
    completed = {**values, "model": {**values.get("model", {})}, "data": {**values.get("data", {})}}
    width = completed["model"].get("emb_dim", ModelConfig.emb_dim)
    for section, name in [*sizes, ("data", "vocab_size")]:
        default = field_default(section, name)
        defaults = (default, width) if name in DEFAULTS_TO_EMB_DIM else (default,)
        if (section, name) not in flags and completed[section].get(name, default) in defaults:
            completed[section][name] = saved.get(section, {}).get(name, default)
    if completed["model"].get("positions") != "learned":  # otherwise unused, but saved by earlier versions
        given = values.get("model", {}).get("max_positions", field_default("model", "max_positions"))
        completed["model"]["max_positions"] = given
    return completed


def _load_saved_config(workdir: str) -> dict[str, dict[str, Any]]:
    """The newest readable config in the checkpoints, without validation; {} if there is none."""
    if object_storage.unsupported_reason(workdir):
        return {}
    folder = epath.Path(workdir).expanduser() / "checkpoints"
    names: list[str] = []
    with contextlib.suppress(OSError):  # reported when the run is loaded
        names = [path.name for path in folder.iterdir() if path.name.isdecimal()]
    for name in sorted(names, key=int, reverse=True):
        with contextlib.suppress(OSError, ValueError):
            config = json.loads((folder / name / CONFIG_FILE).read_text())
            if isinstance(config, dict):
                return config
    return {}
