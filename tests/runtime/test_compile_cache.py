"""Compiled programs are kept on disk, apart for each kind of CPU, and counted."""

import os
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp

from tests.helpers.compilation import CompileCounter
from transformer.runtime import environment as fingerprint
from transformer.runtime import progress

PROGRAM = """
import jax, jax.numpy as jnp
from transformer.runtime import environment
environment.enable_compilation_cache()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8))).block_until_ready()
print(jax.config.jax_compilation_cache_dir)
"""


def run(**environment):
    kept = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    command = [sys.executable, "-c", PROGRAM]
    result = subprocess.run(command, env={**kept, **environment}, capture_output=True, text=True, check=True)
    return pathlib.Path(result.stdout.strip())


def test_programs_are_kept_in_a_folder_for_this_kind_of_cpu(tmp_path):
    folder = run(XDG_CACHE_HOME=str(tmp_path))
    assert folder == tmp_path / "transformer-jax" / fingerprint.cpu()
    assert any(folder.iterdir())


def test_a_configured_folder_is_used(tmp_path):
    assert run(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine")) == tmp_path / "mine"
    assert any((tmp_path / "mine").iterdir())


def test_xla_writes_nothing_of_its_own_into_object_storage():
    program = PROGRAM.partition("jax.jit(")[0] + "print(jax.config.jax_persistent_cache_enable_xla_caches)"
    command, folder = [sys.executable, "-c", program], {"JAX_COMPILATION_CACHE_DIR": "gs://bucket/cache"}
    result = subprocess.run(command, env={**os.environ, **folder}, capture_output=True, text=True, check=True)
    assert result.stdout == "none\n"


def test_programs_are_counted_while_it_is_entered():
    function = jax.jit(lambda x: x * 3.0)
    counter = CompileCounter()
    inputs = [jnp.ones(n) for n in (3, 3, 4, 5)]
    with counter:
        function(inputs[0])
        function(inputs[1])
        function(inputs[2])
    function(inputs[3])
    assert counter.count == 2


def test_programs_compiled_at_once_are_left_out_of_the_time_left_once(monkeypatch):
    left_out = []
    fingerprint._leave_out_compilation()
    monkeypatch.setattr(progress, "leave_out", left_out.append)
    time.sleep(0.2)
    for _ in range(4):
        jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 0.2)
    assert 0 < sum(left_out) < 0.3
