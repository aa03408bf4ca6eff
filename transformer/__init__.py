"""The Transformer of "Attention Is All You Need" (Vaswani et al., 2017) in JAX and Flax.

    import transformer

    transformer.train(config, "runs/mine")  # of a config file's get_config(), or default_config()
    model = transformer.load("runs/mine", checkpoint="best")
    model.translate(["Good morning!"], beam_size=8)

Importing this package imports neither JAX nor Flax, so that a config is validated before either is loaded.
"""

import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ml_collections import config_dict

    from transformer.config import Config, default_config
    from transformer.inference import TranslationModel
    from transformer.runtime.errors import UserError
    from transformer.training.session import TrainingResult

__version__ = "0.1.0"
__all__ = ["Config", "TranslationModel", "UserError", "default_config", "load", "train"]

_LAZY = {
    "Config": "transformer.config",
    "TranslationModel": "transformer.inference",
    "UserError": "transformer.runtime.errors",
    "default_config": "transformer.config",
}

_program = os.path.abspath(sys.argv[0]) if sys.argv else ""
_names = {argument.removeprefix("-m").partition(".")[0] for argument in sys.orig_argv}
# As long as Python looks for the module of `python -m transformer.NAME`, and not of another program.
_is_looked_up = sys.argv[:1] == ["-m"] and __name__ in _names
if _is_looked_up or _program in (os.path.join(os.path.dirname(__path__[0]), name) for name in ("train.py", "eval.py")):
    # Until training takes it, Ctrl-C ends a command at once and quietly, while it imports modules too.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
if _is_looked_up:
    from transformer.runtime import commands

    commands.reject_non_commands(sys.orig_argv)


def load(
    workdir: str | os.PathLike, checkpoint: str | int = "latest", ensemble: Sequence[str | os.PathLike] = ()
) -> "TranslationModel":
    """Loads the trained model of a workdir: see `transformer.inference.load`."""
    from transformer import inference

    return inference.load(workdir, checkpoint, ensemble)


def train(config: "Config | config_dict.ConfigDict", workdir: str | os.PathLike) -> "TrainingResult":
    """Trains in a workdir, or resumes the run there: see `transformer.training.session.train`."""
    from transformer.training import session

    return session.train(config, workdir)


def __dir__() -> list[str]:
    """Public names, before their first use too."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Imports a public name at first use."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
