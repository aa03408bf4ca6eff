"""Attention by kernels: the plain path's numbers, where they can run, and what they compile to for chips not here."""

import dataclasses
import functools
import os
import re
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from tests.attention.test_blockwise import B, K, draw, segments
from tests.conftest import ROOT, small_config
from transformer import inference
from transformer.attention import dispatch, dot_product, fused
from transformer.attention.mask import AttentionMask
from transformer.config import MeshConfig
from transformer.distributed import multihost, sharding
from transformer.distributed import platform as platforms
from transformer.distributed.mesh import make_mesh
from transformer.models import flops as cost
from transformer.models import registry
from transformer.models.loss import cross_entropy
from transformer.planning import aot, hlo_cost
from transformer.planning.hardware import parse_topology
from transformer.planning.hlo import Program
from transformer.runtime import environment as fingerprint
from transformer.runtime.errors import UserError
from transformer.training import preparation, train_step
from transformer.training.session import prepare


def sees(visible, queries, keys):
    """Where results are used: queries that see something and, in packed rows, are no padding."""
    mask = jnp.broadcast_to(visible.materialize(queries, keys), (B, 1, queries, keys))
    real = True if visible.q_segment_ids_BT is None else visible.q_segment_ids_BT != 0
    return mask, (mask.any(-1)[:, 0] & real)[..., None, None]


def compare(attend, visible, queries, keys, width=K, dtype=jnp.float32, tolerance=1e-5):
    """Values and gradients against the plain path in float32."""
    q, k, v = draw(3, queries), draw(4, keys), draw(5, keys, width)
    mask, used = sees(visible, queries, keys)
    weight = jnp.where(used, draw(6, queries, width), 0.0)

    def total(function):
        def of(*qkv):
            out = jnp.where(used, function(*qkv).astype(jnp.float32), 0.0)
            return (out * weight).sum(), out

        return jax.jit(jax.grad(of, (0, 1, 2), has_aux=True))

    wanted = total(lambda *qkv: dot_product.dot_product_attention(*qkv, mask))(q, k, v)
    result = total(lambda *qkv: attend(*qkv, visible))(*(array.astype(dtype) for array in (q, k, v)))
    for one, other in zip(jax.tree.leaves(result), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one.astype(jnp.float32), other, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("visible", "queries", "keys"),
    [
        (AttentionMask(causal=True), 300, 300),
        (AttentionMask(kv_segment_ids_BS=segments(0, 200, 50)), 140, 200),
        (AttentionMask(segments(1, 300, 20), segments(1, 300, 20), causal=True), 300, 300),
    ],
    ids=["causal", "padding", "causal segments"],
)
def test_splash_has_the_values_and_gradients_of_the_plain_path(visible, queries, keys):
    """In one block and in several, of lengths that blocks do not divide; values are wider than keys."""
    compare(functools.partial(fused.splash_attention, interpret=True), visible, queries, keys, K + 2)


def check_cudnn(dtype, tolerance):
    """With `cudnn` the real one, where a GPU is."""
    compare(fused.cudnn_attention, AttentionMask(causal=True), 24, 24, K, dtype, tolerance)
    compare(fused.cudnn_attention, AttentionMask(kv_segment_ids_BS=segments(0, 32, 9)), 24, 32, K, dtype, tolerance)
    compare(fused.cudnn_attention, AttentionMask(causal=True), 25, 25, K, dtype, tolerance)
    compare(fused.cudnn_attention, AttentionMask(kv_segment_ids_BS=segments(0, 33, 9)), 23, 33, K, dtype, tolerance)
    compare(fused.cudnn_attention, AttentionMask(), 24, 33, K, dtype, tolerance)


def test_cudnn_is_asked_for_what_the_plain_path_computes(monkeypatch):
    """By JAX's own reference in cuDNN's place, from causality and lengths; odd sides of arrays are filled up."""
    asked = stand_in_for_cudnn(monkeypatch)
    check_cudnn(jnp.float32, 1e-5)
    assert set(asked) == {"cudnn"}


def stand_in_for_cudnn(monkeypatch, factor=1.0, shortest=2):
    """JAX's own reference, which refuses what cuDNN's attention refuses in training; returns what was asked for."""
    asked = []

    def reference(*qkv, implementation, **options):
        asked.append(implementation)
        if any(array.shape[1] % 2 or array.shape[1] < shortest for array in qkv):
            raise NotImplementedError(f"Unsupported sequence length Q {qkv[0].shape[1]}, KV {qkv[1].shape[1]}.")
        wide = [factor * array.astype(jnp.float32) for array in qkv]
        return dot_product_attention(*wide, implementation="xla", **options).astype(qkv[0].dtype)

    dot_product_attention = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", reference)
    return asked


@pytest.mark.gpu
@pytest.mark.skipif(not shutil.which("nvidia-smi"), reason="no GPU here")
def test_cudnn_has_the_values_and_gradients_of_the_plain_path():
    program = (
        f"import jax.numpy as jnp; from {__name__} import check_cudnn, fused; check_cudnn(jnp.bfloat16, 0.05)\n"
        "assert not (failure := fused.try_cudnn(64)), failure"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cuda", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, check=True)


def test_lengths_are_of_what_is_no_padding_and_a_row_of_padding_has_one():
    keys_BS = jnp.asarray([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]], jnp.int32)
    np.testing.assert_array_equal(fused.key_lengths(AttentionMask(kv_segment_ids_BS=keys_BS)), [3, 4, 1])
    assert fused.key_lengths(AttentionMask(causal=True)) is None


def config_of(path, sizes=(1, 1, 1), **fields):
    mesh = dict(zip(("data", "tensor", "sequence"), sizes, strict=True))
    return small_config(model={"attention": path, "num_layers": 1, **fields}, mesh=mesh)


def loss_and_gradients(config):
    mesh, model = make_mesh(config.mesh), registry.ModelDef(config.model, 300)
    ids = np.random.default_rng(0).integers(4, 300, (4, 9)).astype(np.int32)
    ids[:, -2:] = [2, 0]
    params = jax.device_put(model.init(0), sharding.param_shardings(mesh, model.abstract_params))

    def objective(params, ids):
        with sharding.use_mesh(mesh):
            return cross_entropy(model.bind(params)(ids, ids), ids, 0.1).smoothed_nll

    return jax.device_get(
        jax.jit(jax.value_and_grad(objective))(params, jax.device_put(ids, sharding.batch_sharding(mesh)))
    )


@pytest.mark.slow
def test_a_model_that_attends_by_splash_has_the_plain_one_s_loss_and_gradients_on_a_mesh(monkeypatch):
    loss, grads = loss_and_gradients(config_of("plain"))
    called = []

    def interpreted(*arguments):
        called.append(jax.sharding.get_abstract_mesh().shape)
        return splash_attention(*arguments, interpret=True)

    splash_attention = fused.splash_attention
    monkeypatch.setitem(dispatch.FUSED, "splash", interpreted)
    monkeypatch.setattr(platforms, "current", lambda: "tpu")
    result, found_grads = loss_and_gradients(config_of("splash", (2, 2, 1)))
    assert len(called) == 3
    np.testing.assert_allclose(result, loss, rtol=1e-5)
    difference = jax.tree.map(np.subtract, found_grads, grads)
    assert optax.tree.norm(difference) < 1e-5 * optax.tree.norm(grads)


def test_auto_takes_cudnn_at_all_lengths_and_splash_where_sentences_are_long(machine, monkeypatch):
    machine("")
    for platform, short, long in (("cpu", "plain", "blockwise"), ("gpu", "cudnn", "cudnn"), ("tpu", "plain", "splash")):
        monkeypatch.setattr(platforms, "current", lambda platform=platform: platform)
        assert [chosen(length) for length in (1, 64, 511, 512)] == [short] * 3 + [long]
        assert chosen(512, implementation="blockwise") == "blockwise"
        assert chosen(64, implementation="plain") == "plain"
    assert dispatch.resolve("splash", 64, 64, "splash") == "splash"
    assert dispatch.resolve("splash", 64, 64) == "plain"  # a checkpoint from a TPU, on a CPU


@pytest.mark.parametrize(
    ("platform", "dtype", "width", "packed", "rate", "expected"),
    [
        ("gpu", jnp.bfloat16, 64, False, 0.0, "cudnn"),
        ("gpu", jnp.float32, 64, False, 0.0, ""),
        ("gpu", jnp.bfloat16, 20, False, 0.0, ""),
        ("gpu", jnp.bfloat16, 64, True, 0.0, ""),
        ("gpu", jnp.bfloat16, 64, False, 0.1, ""),
        ("tpu", jnp.float32, 20, True, 0.0, "splash"),
        ("tpu", jnp.float32, 20, True, 0.1, ""),
        ("cpu", jnp.bfloat16, 64, False, 0.0, ""),
    ],
)
def test_where_each_kernel_can_run(monkeypatch, platform, dtype, width, packed, rate, expected):
    monkeypatch.setattr(platforms, "current", lambda: platform)
    q = jnp.zeros((1, 8, 2, width), dtype)
    visible = AttentionMask(jnp.ones((1, 8), jnp.int32)) if packed else AttentionMask()
    assert fused.select_kernel(q, q, visible, rate) == expected
    with sharding.use_mesh(make_mesh(MeshConfig(data=1, sequence=2))):
        assert fused.select_kernel(q, q, visible, rate) == ""


def test_the_platform_is_that_of_the_mesh():
    with sharding.use_mesh(make_mesh(MeshConfig(data=1))):
        assert platforms.current() == "cpu"
    assert platforms.current() == jax.default_backend()


ON_LOCAL_DEVICES = inference.TranslationModel.on_local_devices
CUDNN = {"attention": "cudnn", "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": {"attention": "splash", "attention_dropout_rate": 0.1}}, "attention_dropout_rate = 0, got 0.1"),
        (
            {"model": {"attention": "splash"}, "mesh": {"sequence": 2}},
            r"mesh\.sequence = 1, got 2, which needs ring",
        ),
        ({"model": {"attention": "cudnn"}}, r"model\.dtype = bfloat16, got float32"),
        ({"model": {**CUDNN, "num_heads": 4}}, r"divisible by 8 and at most 128, got model\.qkv_dim / num_heads = 4"),
        ({"model": {**CUDNN, "qkv_dim": 512}}, "keys and values of one width, got 256 and 8 a head"),
        ({"model": {**CUDNN, "qkv_dim": 512, "value_dim": 512}}, r"at most 128, got model\.qkv_dim / num_heads = 256"),
        ({"model": CUDNN, "data": {"batching": "pack", "num_buckets": 8}}, r"data\.batching = bucket, got pack"),
    ],
)
def test_a_kernel_forced_where_no_device_could_run_it_is_refused_with_the_config(fields, message):
    with pytest.raises(UserError, match=rf"config\.model\.attention = (splash|cudnn): .*{message}"):
        small_config(**fields)


@pytest.mark.parametrize(("fields", "platform"), [({"attention": "splash"}, "tpu"), (CUDNN, "gpu")])
def test_a_kernel_forced_on_another_platform_is_refused_before_anything_compiles(fields, platform, monkeypatch):
    config = small_config(model=fields)
    monkeypatch.setattr(jax, "jit", None)
    with pytest.raises(UserError, match=f"it runs on {platform} devices, and these are cpu devices"):
        train_step.make_train_step(registry.ModelDef(config.model, 300), config, make_mesh(config.mesh))


def test_a_run_is_refused_before_its_data_is_prepared(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation.mixture_corpus, "open_sources", None)
    with pytest.raises(UserError, match="it runs on tpu devices"):
        prepare(small_config(model={"attention": "splash"}), epath.Path(tmp_path))


def test_a_mesh_that_fills_up_the_length_is_refused_too():
    config = small_config(model={"attention": "splash"}, mesh={"data": 1, "sequence": -1})
    mesh = make_mesh(config.mesh)
    with pytest.raises(UserError, match=r"it runs on tpu devices"):
        fused.check_supported(config, mesh)
    with pytest.raises(UserError, match=r"expected mesh\.sequence = 1, got 8"):
        fused.check_supported(config, on_platform(mesh, "tpu"))


@dataclasses.dataclass(frozen=True)
class Device:
    platform: str
    compute_capability: str
    device_kind: str = "of a test"


def on_platform(mesh, platform, capability="9.0"):
    """As a mesh of such devices, as far as `check_supported` looks."""
    return dataclasses.make_dataclass("Mesh", ["devices", "shape"])(
        np.array([Device(platform, capability)]), mesh.shape
    )


@pytest.mark.parametrize("capability", ["7.5", "gfx942"])
def test_a_gpu_that_is_too_old_or_of_amd_is_refused(capability):
    config = small_config(model=CUDNN)
    mesh = make_mesh(MeshConfig(data=1))
    fused.check_supported(config, on_platform(mesh, "gpu"))
    with pytest.raises(UserError, match=rf"NVIDIA GPU of compute capability 8\.0 or more, and these have {capability}"):
        fused.check_supported(config, on_platform(mesh, "gpu", capability))


@pytest.fixture
def machine(monkeypatch):
    """As on a machine with a GPU: takes what a trial of cuDNN finds there, and returns the widths that are tried."""
    monkeypatch.setattr(fused, "_trials", {})
    fused._warn_once.cache_clear()
    monkeypatch.setattr(fingerprint, "_trials", {})
    monkeypatch.setattr(platforms, "current", lambda: "gpu")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def with_gpu(failure, capability="9.0"):
        tried = []
        monkeypatch.setattr(jax, "local_devices", lambda: [Device("gpu", capability)])
        monkeypatch.setattr(fused, "try_cudnn", lambda width: tried.append(width) or failure)
        return tried

    return with_gpu


def required(capability="9.0", **model):
    """What `check_supported` makes of a config on such a GPU."""
    config = small_config(model={**CUDNN, **model})
    fused.check_supported(config, on_platform(make_mesh(config.mesh), "gpu", capability))


def chosen(length, width=8, implementation="auto"):
    """The attention that is taken for self-attention of this length."""
    q = jnp.zeros((1, length, 2, width), jnp.bfloat16)
    return dispatch.choose(implementation, q, q, AttentionMask(), 0.0)


def test_cudnn_is_tried_before_training_that_cannot_take_it_where_validation_can(machine):
    tried = machine("")
    required(attention="auto", attention_dropout_rate=0.1)
    assert tried == [8]
    assert chosen(5) == "cudnn"


@pytest.mark.parametrize(("length", "expected"), [(20, "plain"), (512, "splash")])
def test_a_forced_kernel_of_another_platform_is_auto(length, expected, monkeypatch):
    monkeypatch.setattr(platforms, "current", lambda: "tpu")
    assert chosen(length, implementation="cudnn") == chosen(length) == expected


def test_auto_takes_cudnn_after_a_trial_that_works(machine, capsys):
    tried = machine("")
    required(attention="auto")
    assert [chosen(512), chosen(512), chosen(5)] == ["cudnn"] * 3
    required(attention="auto")
    assert tried == [8]
    assert capsys.readouterr().err == ""
    assert fingerprint.fingerprint()["cuDNN attention"] == "works"
    assert chosen(512, width=16) == "cudnn"
    assert tried == [8, 16]


def test_auto_goes_without_cudnn_after_a_trial_that_fails_and_warns_once(machine, capsys):
    machine("no execution plans")
    required(attention="auto")
    required(attention="auto")
    assert chosen(512) == "blockwise"
    warnings = capsys.readouterr().err
    assert (
        warnings == "warning: attention by cuDNN is off: no execution plans; auto takes plain or blockwise attention\n"
    )
    assert fingerprint.fingerprint()["cuDNN attention"] == "fails"


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"attention": "auto", "attention_dropout_rate": 0.1}, [8]),  # translating drops nothing
        ({"attention": "plain"}, []),
        ({"attention": "auto", "dtype": "float32"}, []),
    ],
)
def test_processes_agree_on_cudnn_before_each_translates_alone(machine, monkeypatch, model, expected):
    """A process without a sentence to translate traces nothing, and the others would wait for it in the trial."""
    tried = machine("")
    config = small_config(model={**CUDNN, **model}, data={"batching": "pack", "num_buckets": 8})
    restored = types.SimpleNamespace(config=config)
    restored.on_local_devices = lambda: restored
    monkeypatch.setattr(inference, "TranslationModel", list)
    assert ON_LOCAL_DEVICES(types.SimpleNamespace(models=[restored])) == [restored]
    assert tried == expected


def test_a_forced_kernel_says_why_its_trial_failed(machine):
    machine("no execution plans")
    with pytest.raises(UserError, match=r"model\.attention = cudnn: no execution plans; auto chooses a supported one"):
        required()
    machine("")
    fused._trials.clear()
    required()
    assert fingerprint.fingerprint()["cuDNN attention"] == "works"


def test_a_trial_that_fails_on_one_process_counts_for_all(machine, monkeypatch, capsys):
    machine("")
    monkeypatch.setattr(multihost, "allgather", lambda what, text: [text, "no execution plans"])
    monkeypatch.setattr(multihost, "process_name", lambda host: f"host {host}")
    required(attention="auto")
    assert chosen(512) == "blockwise"
    assert "no execution plans on host 1; auto" in capsys.readouterr().err


def test_an_amd_gpu_takes_no_kernel_and_tries_none(machine, capsys):
    tried = machine("", "gfx942")
    required("gfx942", attention="auto")
    assert chosen(512) == "blockwise"
    assert tried == []
    assert capsys.readouterr().err == ""


def test_nothing_is_tried_where_a_run_would_not_choose_it(machine):
    tried = machine("")
    required(attention="blockwise")
    required(attention="auto", dtype="float32")
    assert tried == []
    assert "cuDNN attention" not in fingerprint.fingerprint()


def test_a_trial_runs_forward_and_backward_on_all_devices_within_a_trace(monkeypatch):
    """Also where a transfer guard forbids to read anything back."""
    asked, result = stand_in_for_cudnn(monkeypatch), []
    monkeypatch.setattr(fused, "_trials", {})

    def traced(x):
        result.append(fused._trial(8))
        return x + 1

    with jax.transfer_guard("disallow"):
        jax.jit(traced).lower(jax.ShapeDtypeStruct((), jnp.float32))
    assert result == [""]
    assert asked == ["cudnn"] * 4


def test_a_trial_notices_errors_and_wrong_numbers(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no execution plans\nmore of it")

    with monkeypatch.context() as patch:
        patch.setattr(jax.nn, "dot_product_attention", fails)
        assert fused.try_cudnn(8) == "a trial failed with RuntimeError: no execution plans"
    with monkeypatch.context() as patch:
        stand_in_for_cudnn(patch, shortest=64)
        assert "NotImplementedError: Unsupported sequence length Q 24" in fused.try_cudnn(8)
    stand_in_for_cudnn(monkeypatch, 1.1)
    assert re.fullmatch(r"in a trial its relative error was 0\.\d+", fused.try_cudnn(8))


def compiled(topology, **fields):
    """The training step of a small model and 640 tokens a side, which both kernels fill up, compiled for chips."""
    model = {"num_layers": 1, "emb_dim": 32, "num_heads": 2, "mlp_dim": 32, **fields}
    config = small_config(
        model=model, data={"max_length": 640}, train={"batch_tokens": 640}, mesh={"data": 2, "tensor": 2}
    )
    mesh = make_mesh(config.mesh, aot.topology_devices(parse_topology(topology)))
    text = aot.compile_step(config, mesh, 4, 640, -1.0).text
    return text, hlo_cost.count_flops(Program(text)) * 4, cost.training_flops(config.model, 300, 4, 640, 640)


@pytest.mark.tpu
def test_splash_compiles_for_a_tpu_forward_and_backward():
    text, flops, closed = compiled("v5e:2x2")
    for kernel in ("splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"):
        assert text.count(f"%{kernel}") >= 3  # three attentions, each chosen by auto
    assert "640,640]" not in text
    # Of scores and values, it computes nine products where the closed form counts six.
    scores = 3 * 3 * 4 * 2 * 2 * 640 * 640 * 16 * 2
    assert flops == pytest.approx(closed + scores / 2, rel=0.02)


@pytest.mark.tpu
def test_translation_on_tpus_encodes_by_splash_too():
    """Each device on its own, where nothing is left to split."""
    config = config_of("splash")
    mesh = make_mesh(MeshConfig(), aot.topology_devices(parse_topology("v5e:2x2")))
    model = registry.ModelDef(config.model, 300)
    encode = jax.jit(sharding.data_parallel_jit(mesh, lambda params, ids: model.bind(params).encode(ids)))
    rows = jax.ShapeDtypeStruct((8, 512), jnp.int32, sharding=sharding.batch_sharding(mesh, "decode_batch"))
    lowered = encode.trace(registry.sharded_param_shapes(model, mesh), rows).lower(lowering_platforms=("tpu",))
    assert "%splash_mha_fwd" in lowered.compile().as_text()


@pytest.mark.gpu
def test_cudnn_compiles_for_a_gpu_forward_and_backward():
    text, flops, closed = compiled("h100:8", dtype="bfloat16")
    assert text.count('"__cudnn$fmhaSoftmax"') == text.count('"__cudnn$fmhaSoftmaxBackward"') == 3
    assert "640,640]" not in text
    scores = 3 * 3 * 4 * 2 * 2 * 640 * 640 * 16 * 2
    assert flops == pytest.approx(closed + scores / 6, rel=0.02)
