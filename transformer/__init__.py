"""The Transformer of "Attention Is All You Need" (Vaswani et al., 2017) in JAX and Flax.

    import transformer

    model = transformer.load("runs/mine", checkpoint="best")
    model.translate(["Good morning!"], beam_size=8)

Importing this package imports neither JAX nor Flax: a config is checked before either is paid for.
"""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformer.inference import TranslationModel

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"]:  # as long as Python looks for the module of `python -m transformer.NAME`
    from transformer.runtime import commands

    commands.reject_non_commands(sys.orig_argv)


def load(
    workdir: str | os.PathLike, checkpoint: str | int = "latest", ensemble: Sequence[str | os.PathLike] = ()
) -> "TranslationModel":
    """Reads the trained model of a workdir once, to translate often: see `transformer.inference.load`."""
    from transformer import inference

    return inference.load(workdir, checkpoint, ensemble)
