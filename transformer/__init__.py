"""The Transformer of "Attention Is All You Need" (Vaswani et al., 2017) in JAX and Flax.

    import transformer

    transformer.train(config, "runs/mine")  # of a config file's get_config(), or default_config()
    model = transformer.load("runs/mine", checkpoint="best")
    model.translate(["Good morning!"], beam_size=8)

Importing this package imports neither JAX nor Flax, so that a config is validated before either is loaded.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ml_collections import config_dict

    from transformer.config import Config, default_config
    from transformer.inference import TranslationModel
    from transformer.runtime.errors import UserError

__version__ = "0.1.0"
__all__ = ["Config", "TranslationModel", "UserError", "default_config", "load", "train"]

_LAZY = {
    "Config": "transformer.config",
    "TranslationModel": "transformer.inference",
    "UserError": "transformer.runtime.errors",
    "default_config": "transformer.config",
}

if sys.argv[:1] == ["-m"]:  # as long as Python looks for the module of `python -m transformer.NAME`
    from transformer.runtime import commands

    commands.reject_non_commands(sys.orig_argv)


def load(
    workdir: str | os.PathLike, checkpoint: str | int = "latest", ensemble: Sequence[str | os.PathLike] = ()
) -> "TranslationModel":
    """Loads the trained model of a workdir: see `transformer.inference.load`."""
    from transformer import inference

    return inference.load(workdir, checkpoint, ensemble)


def train(config: "Config | config_dict.ConfigDict", workdir: str | os.PathLike) -> None:
    """Trains in a workdir, or resumes the run there: see `transformer.training.session.train`."""
    from transformer.training import session

    session.train(config, workdir)


def __getattr__(name: str) -> Any:
    """Imports a public name at first use."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
