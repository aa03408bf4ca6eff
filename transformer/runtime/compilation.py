"""XLA compilation: kept on disk between runs, and counted."""

import os
import pathlib

import jax

from transformer.runtime import fingerprint

_COMPILED = "/jax/core/compile/jaxpr_to_mlir_module_duration"


def enable_cache() -> None:
    """Keeps compiled programs between runs, in JAX_COMPILATION_CACHE_DIR or ~/.cache/transformer-jax."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        caches = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(caches / "transformer-jax" / fingerprint.cpu()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


class CompileCounter:
    """Counts the programs lowered while it is entered, whether compiled or found in the cache on disk."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> "CompileCounter":
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == _COMPILED:
            self.count += 1
