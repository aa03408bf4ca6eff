"""Tests run stricter than users do: strict dtypes and ranks, 8 simulated devices, warnings as errors."""

import gc
import importlib.metadata
import importlib.util
import os
import pathlib
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
# A collective of 8 devices on few busy cores takes its time: XLA ends the process after 40 s.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_cpu_collective_call_terminate_timeout_seconds=600 --xla_force_host_platform_device_count=8"
    + " --xla_cpu_parallel_codegen_split_count=1"  # a tenth less to compile: another worker has the other cores
)
if importlib.metadata.version("jaxlib").startswith("0.10."):  # a later one refuses the flag
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"  # half the time to compile again
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # half the time to compile, and tests compile most
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parent.parent / ".pytest_cache" / "xla"))

os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")  # shared with the other worker and children
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# The compiler for TPUs, where it is, must not look for one; a program for chips that are not here cannot be read
# back from the cache.
os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
os.environ.update(TPU_LOG_DIR="disabled")
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = str(
    not any(importlib.util.find_spec(package) for package in ("libtpu", "jax_cuda13_plugin", "jax_cuda12_plugin"))
).lower()

import jax
import pytest

ROOT = pathlib.Path(__file__).parent.parent
COMPILERS = {
    "tpu": (["libtpu"], "make test-tpu has it"),
    "gpu": (["jax_cuda13_plugin", "jax_cuda12_plugin"], "make test-gpu has it"),
}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what needs a compiler that is not installed."""
    for kind, (packages, where) in COMPILERS.items():
        if item.get_closest_marker(kind) and not any(map(importlib.util.find_spec, packages)):
            pytest.skip(f"no {kind.upper()} compiler here: {where}")


@pytest.fixture(scope="session")
def root() -> pathlib.Path:
    """The repository."""
    return ROOT


@pytest.fixture(autouse=True, scope="session")
def _temporary_files(tmp_path_factory):
    """Among pytest's own, which it removes: TFDS leaves an empty folder for each data set that is not prepared yet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _shared_programs():
    """Equal configs share their compiled programs; `fresh_programs` is for tests that change what is compiled."""
    from tests.helpers.sharing import share_programs

    with pytest.MonkeyPatch.context() as patch:
        share_programs(patch)
        yield patch


@pytest.fixture(autouse=True, scope="session")
def _kept_programs():
    """After commands in this process, which would keep large programs alone, as many are kept as before."""
    from transformer.runtime import environment

    enable, least = environment.enable_compilation_cache, jax.config.jax_persistent_cache_min_compile_time_secs

    def enable_for_tests():
        folder = enable()
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
        return folder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment, "enable_compilation_cache", enable_for_tests)
        yield


@pytest.fixture(autouse=True, scope="module")
def _few_memory_mappings(_shared_programs):
    """Frees compiled programs before their memory mappings reach the 65,530 of Linux, where XLA ends the process."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        from tests.helpers.sharing import share_programs

        _shared_programs.undo()
        share_programs(_shared_programs)
        jax.clear_caches()
        gc.collect()


@pytest.fixture(params=["cpu", "gpu"])
def program_platform(request, monkeypatch) -> str:
    """The platform for which operations are traced; all compute the same."""
    from transformer.distributed import platform as platforms

    monkeypatch.setattr(platforms, "current", lambda: request.param)
    return request.param


@pytest.fixture
def fresh_programs(_shared_programs):
    """Programs of this test's own, for one that patches what is traced, or counts how often it is."""
    from tests.helpers.sharing import unshare_programs

    with pytest.MonkeyPatch.context() as patch:
        unshare_programs(patch)
        yield


@pytest.fixture
def one_device():
    """A mesh of one device: most tests need no more."""
    from transformer.config import MeshConfig
    from transformer.distributed.mesh import make_mesh

    return make_mesh(MeshConfig(data=1))


@pytest.fixture(autouse=True)
def _strict():
    assert jax.config.jax_numpy_dtype_promotion == "strict"


def slow(*values, id=None):
    """A set of parameters that only `make test-all` tries."""
    return pytest.param(*values, marks=pytest.mark.slow, id=id)


def small_config(**sections):
    """A config of a tiny model, each section's fields overridden by keyword: small_config(train={"seed": 1})."""
    from transformer.config import default_config
    from transformer.config.validation import validate

    config = default_config()
    small = {
        "model": {"num_layers": 2, "emb_dim": 16, "num_heads": 2, "mlp_dim": 32, "dropout_rate": 0.1},
        "data": {"max_length": 32, "vocab_size": 300, "num_buckets": 3},
        "optimizer": {"warmup_steps": 10},
        "train": {"batch_tokens": 256, "num_steps": 20, "log_every_steps": 5, "eval_every_steps": 10},
        "decode": {"beam_size": 2, "batch_rows": 8, "max_extra_length": 10, "max_source_tokens": 64},
        "mesh": {"data": 1},
    }
    for source in (small, sections):
        for section, fields in source.items():
            config[section].update(fields)
    return validate(config)
