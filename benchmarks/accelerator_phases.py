"""What `benchmarks.accelerator` measures: a function for each kind of phase."""

import contextlib
import functools
import gzip
import importlib.metadata
import itertools
import json
import pathlib
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import kernel_times, parallelism
from benchmarks.findings import Findings, Row
from benchmarks.kernel_times import KernelTime
from benchmarks.timing import compile_update, seconds_of
from transformer import benchmark, command_line
from transformer.attention import blockwise, fused
from transformer.attention.dot_product import dot_product_attention
from transformer.attention.mask import AttentionMask
from transformer.config.schema import Config
from transformer.data import input_pipeline
from transformer.data.batching import Batch, JaggedArray, rows_per_batch
from transformer.data.input_pipeline import TokenIds
from transformer.data.tokenizer import EOS
from transformer.decoding import decode
from transformer.distributed import sharding
from transformer.distributed.mesh import make_mesh
from transformer.models import flops as cost
from transformer.models.registry import ModelDef
from transformer.planning import hlo, hlo_cost
from transformer.planning.hardware import chip_of
from transformer.runtime import environment
from transformer.training import train_step

ROOT = pathlib.Path(__file__).parents[1]
TOKENS = 24_960  # target slots of a step: 25,000 in rows of 40, 624 of them
TOY = {
    "model.num_layers": 1,
    "model.emb_dim": 32,
    "model.mlp_dim": 64,
    "model.num_heads": 2,
    "data.vocab_size": 304,
    "data.max_length": 64,
    "train.batch_tokens": 256,
}
PRODUCTS = [  # m, k, n of a step's matrix products: base, big
    *((TOKENS, 512, 1536), (TOKENS, 512, 2048), (TOKENS, 2048, 512), (TOKENS, 512, 37_000)),
    *((TOKENS, 1024, 1024), (TOKENS, 1024, 3072), (TOKENS, 1024, 4096), (TOKENS, 4096, 1024)),
    *((TOKENS, 1024, 37_000), (TOKENS, 37_000, 1024), (1024, TOKENS, 4096), (37_000, TOKENS, 1024)),
]


def probe(found: Findings) -> None:
    """The machine, its packages, and its ceilings: matrix products and a copy."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        fields = "name,memory.total,driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu"
        query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"]
        found.put(nvidia_smi=subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.splitlines())
    names = r"jax|nvidia|flax$|optax$|orbax|numpy$|grain$|torch$|triton$"
    packages = {one.metadata["Name"]: one.version for one in importlib.metadata.distributions()}
    found.put(packages={name: packages[name] for name in sorted(packages) if re.match(names, name)})
    found.put(host=environment.fingerprint(), memory=jax.devices()[0].memory_stats())
    draw = functools.partial(jax.jit(jax.random.normal, static_argnums=(1, 2)), dtype=jnp.bfloat16)
    product, size = jax.jit(jnp.matmul), 256 if found.smoke else 8192

    def tflops(m: int, k: int, n: int) -> float:
        keys = jax.random.split(jax.random.key(0))
        seconds = timed(product, draw(keys[0], (m, k)), draw(keys[1], (k, n)), smoke=found.smoke)
        return round(2 * m * k * n / seconds / 1e12, 4)

    found.put(matmul_tflops=tflops(size, size, size), matmul=f"{size}^3, bfloat16, random normal")
    large = jnp.ones(2**16 if found.smoke else 2**29, jnp.float32)
    seconds = timed(jax.jit(lambda x: x + 1), large, smoke=found.smoke)
    found.put(copy_tb_s=round(2 * large.nbytes / seconds / 1e12, 4))
    del large
    for m, k, n in [(64, 32, 48)] if found.smoke else PRODUCTS:
        found.add("products_tflops", f"{m}x{k}x{n}", tflops(m, k, n))


def correct(found: Findings) -> None:
    """An update under the guard that `train.py` sets, the trial of cuDNN, and the same updates on the CPU."""
    config = config_of("en_de_base", {**TOY, "model.num_layers": 2, "model.dtype": "float32"})
    if jax.default_backend() == "gpu":
        found.put(cudnn={width: fused.try_cudnn(width) or "works" for width in (8, 64)})
    try:
        updates(config, jax.devices()[0], 1, "disallow")
        found.put(update_under_transfer_guard="passed")
    except Exception as error:
        found.put(update_under_transfer_guard=f"{type(error).__name__}: {error}"[-600:])
    # Dropout's bits are the same everywhere; products differ by their rounding alone.
    for platform in sorted({"cpu", jax.default_backend()}):
        with jax.default_matmul_precision("highest"):
            metrics = jax.device_get(updates(config, jax.devices(platform)[0], 2))
        figures = {"loss": float(metrics.loss.objective), "grad_norm": float(metrics.grad_norm)}
        found.add("second_update_of_a_small_model", platform, figures)


def updates(config: Config, device: Any, count: int, guard: str = "allow") -> Any:
    """The metrics of the last of so many updates on one device, with this guard of transfers."""
    mesh = make_mesh(config.mesh, [device])
    model = ModelDef(config.model, config.data.vocab_size)
    update, state = train_step.make_train_step(model, config, mesh), train_step.init_state(model, config, mesh)
    ids = random_ids(config, 16, 24).to_padded(np.arange(16), 24)
    with jax.transfer_guard(guard):
        for _ in range(count):
            state, metrics = update(state, sharding.shard_batch(mesh, Batch(ids, ids)))
    return metrics


def attention(found: Findings) -> None:
    """Each way to attend with its gradient: milliseconds for a step's tokens, and errors against float32."""
    cases = [(40, "causal"), (40, "padding"), (39, "causal"), (256, "causal"), (256, "padding"), (1024, "causal")]
    for length, kind in [(8, "causal"), (9, "padding")] if found.smoke else cases:
        rows = 2 if found.smoke else max(TOKENS // length, 1)
        ways = ["plain", "blockwise"] if length >= 256 or found.smoke else ["plain"]
        for way in [*ways, *(["cudnn"] if jax.default_backend() == "gpu" else [])]:
            try:
                row = attend(way, kind, rows, length, found.smoke)
            except Exception as error:
                row = {"error": f"{type(error).__name__}: {error}"[:400]}
            found.add("attention", f"{way} {kind} {rows}x{length}", row)


def attend(way: str, kind: str, rows: int, length: int, smoke: bool) -> Row:
    """One way to attend, in bfloat16: values and gradients of a few rows against plain attention in float32."""
    heads, width, few = (2, 16, 2) if smoke else (16, 64, 8)
    keys = jax.random.split(jax.random.key(length), 4)
    q, k, v, weight = (jax.random.normal(key, (rows, length, heads, width), jnp.bfloat16) for key in keys)
    lengths = jax.random.randint(jax.random.key(1), (rows, 1), length // 2, length + 1)
    keys_BS = (jnp.arange(length, dtype=jnp.int32)[None, :] < lengths).astype(jnp.int32)
    visible = AttentionMask(causal=True) if kind == "causal" else AttentionMask(kv_segment_ids_BS=keys_BS)

    def plain(q: jax.Array, k: jax.Array, v: jax.Array, visible: AttentionMask) -> jax.Array:
        return dot_product_attention(q, k, v, visible.materialize(length, length))

    def total(attend: Callable[..., Any], visible: AttentionMask, weight: jax.Array, *qkv: jax.Array) -> Any:
        out = attend(*qkv, visible)
        return (out.astype(jnp.float32) * weight.astype(jnp.float32)).sum(), out

    def gradient(attend: Callable[..., Any]) -> Callable[..., Any]:
        return jax.jit(jax.grad(functools.partial(total, attend), (2, 3, 4), has_aux=True))

    ways: dict[str, Callable[..., Any]] = {"plain": plain, "blockwise": blockwise.blockwise_attention}
    ways["cudnn"] = fused.cudnn_attention
    run = gradient(ways[way])
    first = AttentionMask(causal=True) if kind == "causal" else AttentionMask(kv_segment_ids_BS=keys_BS[:few])
    with jax.default_matmul_precision("highest"):
        wanted = gradient(plain)(first, weight[:few], *(array[:few].astype(jnp.float32) for array in (q, k, v)))
    errors = [
        float(jnp.linalg.norm(one[:few].astype(jnp.float32) - other) / jnp.linalg.norm(other))
        for one, other in zip(jax.tree.leaves(run(visible, weight, q, k, v)), jax.tree.leaves(wanted), strict=True)
    ]
    seconds = timed(run, visible, weight, q, k, v, smoke=smoke)
    return {"ms": round(1000 * seconds, 3), "worst_relative_error": round(max(errors), 5)}


def training(
    found: Findings,
    variant: str,
    attention: str,
    target: int = 40,
    source: int = 0,
    batch_tokens: int = 25_000,
    keep_program: bool = False,
) -> None:
    """The update of a variant of configs/wmt14.py at one shape: speed, memory, its program, its kernels."""
    if found.smoke:
        target = source = 8
        attention = "auto" if attention == "cudnn" else attention
    fields = {"model.attention": attention, "data.num_buckets": 1, "data.length_multiple": 1}
    fields |= {"data.max_length": max(target, source), "train.batch_tokens": batch_tokens}
    config = config_of(variant, {**fields, **(TOY if found.smoke else {})})
    rows = rows_per_batch(config.train.batch_tokens, target)
    environment.enable_compilation_cache()
    ids = TokenIds(random_ids(config, 4 * rows, source or target), random_ids(config, 4 * rows, target))
    plan = input_pipeline.make_batch_schedule(config, ids)
    (bucket,) = plan.buckets
    found.put(rows=bucket.rows, source=bucket.source, target=bucket.target, attention=attention)
    row = benchmark.measure(config, plan, ids, 1 if found.smoke else 10)
    flops_per_s = float(row["flops_per_s"] or 0)
    found.put(**row, slots_per_s=round(1000 * bucket.rows * bucket.target / float(row["step_ms"] or 1)))
    found.put(**shares(found, flops_per_s, jax.devices()[0].device_kind, jax.device_count()))
    batch = next(input_pipeline.train_iterator(plan, ids, start=0, num_steps=1))
    program, run, _ = compile_update(config, config.data.vocab_size, batch)  # the cache on disk has the program
    found.put(**program_facts(program))
    if keep_program:
        with gzip.open(pathlib.Path(found.options.output, f"hlo_{found.name}.txt.gz"), "wt") as file:
            file.write(program.as_text())
    found.put_kernels(kernel_times.profile(run, 3))


def program_facts(compiled: Any) -> Row:
    """What the compiled program tells of itself; the figures of `transformer.plan` are of the same reading."""
    text = compiled.as_text()
    calls = re.findall(r'custom_call_target="([^"]+)"', text)
    return {
        "custom_calls": {target: calls.count(target) for target in sorted(set(calls))},
        "triton_products": text.count("__triton_gemm") + text.count("__triton_nested_gemm_fusion"),
        "fusions": len(re.findall(r"= [^=]* fusion\(", text)),
        "gb_moved": round(hlo_cost.hbm_bytes(hlo.Program(text)) / 1e9, 3),
        "temporaries_gib": round(compiled.memory_analysis().temp_size_in_bytes / 2**30, 3),
    }


def beam_search(found: Findings) -> None:
    """Beam search of the base model with random params, which ends late: milliseconds a step by batch size."""
    width, extra = (8, 6) if found.smoke else (32, 50)
    fields = {"decode.max_extra_length": extra, "decode.beam_size": 4, **(TOY if found.smoke else {})}
    config = config_of("en_de_base", fields)
    mesh, model = make_mesh(config.mesh), ModelDef(config.model, config.data.vocab_size)
    params = sharding.replicate(mesh, model.in_compute_dtype(model.init(0)))
    for rows in (2, 4) if found.smoke else (16, 256):
        run = sharding.data_parallel_jit(mesh, functools.partial(decode.decode, (model,), config.decode, 1))
        ids = random_ids(config, rows, width).to_padded(np.arange(rows), width)
        request = sharding.shard_batch(mesh, decode.DecodeInputs(ids), rows="decode_batch")
        since = time.perf_counter()
        lengths_B = np.asarray(jax.block_until_ready(run((params,), request)).lengths_BN)[:, 0]
        compile_s = time.perf_counter() - since
        seconds = timed(run, (params,), request, about=2.0, smoke=found.smoke)
        row = {
            "compile_s": round(compile_s, 1),
            "ms": round(1000 * seconds, 2),
            "ms_a_step_at_most": round(1000 * seconds / max(int(lengths_B.max()), 1), 3),
            "sentences_per_s": round(rows / seconds, 1),
            "tokens_per_s": round(int(lengths_B.sum()) / seconds),
        }
        found.add("decode", f"{rows} sentences, beam 4", row)
    found.put_kernels(kernel_times.profile(functools.partial(run, (params,), request), 3))


def families(found: Findings) -> None:
    """Target tokens a second of the three families by length and batch: `benchmarks.parallelism` in bfloat16."""
    width, lengths, tokens = (8, (8,), (32,)) if found.smoke else (512, (32, 128, 512, 2048), (65_536, 8_192))
    found.put(width=width)
    configs = {name: parallelism.equal_config(name, width, "bfloat16", "auto") for name in parallelism.FAMILIES}
    for count, length in itertools.product(tokens, lengths):
        for row in parallelism.measure_families(configs, length, count):
            found.add("training", f"{row['family']}, {count} tokens, length {length}", row)


def torch_training(found: Findings, variant: str) -> None:
    """The training step of the same size by PyTorch."""
    config = config_of(variant, TOY if found.smoke else {})
    model, length = config.model, 8 if found.smoke else 40
    rows = rows_per_batch(config.train.batch_tokens, length)
    sizes = {name: getattr(model, name) for name in ("num_layers", "emb_dim", "mlp_dim", "num_heads", "dropout_rate")}
    sizes |= {"vocab_size": config.data.vocab_size, "rows": rows, "length": length}
    command = [found.options.torch, str(ROOT / "benchmarks" / "torch_transformer.py")]
    flags = [f"--{name}={value}" for name, value in sizes.items()]
    if subprocess.run([command[0], "-c", "import torch"], stderr=subprocess.DEVNULL).returncode:
        found.put(skipped=f"no PyTorch in {command[0]}")
        return
    row = json.loads(output_of([*command, *flags, *(["--num_steps=2"] if found.smoke else [])])[-1])
    found.put(rows=rows, source=length, target=length, **{key: row[key] for key in row if key != "kernels"})
    flops = cost.training_flops(model, config.data.vocab_size, rows, length, length)
    found.put(**shares(found, 1000 * flops / row["step_ms"], row["device"], 1))
    if row["kernels"]:
        found.put_kernels([KernelTime(*kernel) for kernel in row["kernels"]])


def multi30k(found: Findings) -> None:
    """Trains configs/multi30k_tok.py to its end, and scores the mean of its last 10 checkpoints.

    Its schedule does not depend on the number of updates: most of them save nothing, the last 600 save every 60th.
    """
    last, every, count = (8, 2, 2) if found.smoke else (8000, 60, 10)
    workdir = pathlib.Path(found.options.scratch, f"multi30k_tok_{last}")
    fields = {
        "data.data_dir": f"{found.options.scratch}/prepared",
        "data.num_buckets": 4,  # each is a program to compile
        "train.log_every_steps": 4 if found.smoke else 200,
        "train.eval_every_steps": last,
        **({**TOY, "data.num_buckets": 1, "data.tokenizer": "bpe", "decode.beam_size": 1} if found.smoke else {}),
    }
    given = [f"--config=configs/multi30k_tok.py:{found.options.data}", f"--workdir={workdir}"]
    given += [f"--config.{name}={value}" for name, value in fields.items()]
    for steps, saves in ((last - count * every, last - count * every), (last, every)):
        flags = [f"--config.train.num_steps={steps}", f"--config.train.checkpoint_every_steps={saves}"]
        since = time.perf_counter()
        output_of([sys.executable, "train.py", *given, *flags])
        found.add("train_s", str(steps), round(time.perf_counter() - since, 1))
        found.put(**run_facts((workdir / "metrics.jsonl").read_text()))
    chosen = [f"--workdir={workdir}", f"--checkpoint=average:{count}", "--split=test_2016_flickr"]
    found.put(scores=json.loads(output_of([sys.executable, "eval.py", *chosen])[-1]))
    found.put(bleu=found.row["scores"]["bleu"])


def run_facts(metrics: str) -> Row:
    """What the lines of metrics.jsonl say of speed and validation."""
    lines = [json.loads(line) for line in metrics.splitlines()]

    def values(key: str) -> list[float]:
        return [line[key] for line in lines if key in line]

    return {
        "target_tokens_per_s": round(statistics.median(values("train/target_tokens_per_s"))),
        "step_ms": round(statistics.median(values("train/step_ms")), 3),
        "valid_bleu": [round(bleu, 2) for bleu in values("valid/bleu")],
    }


def config_of(variant: str, fields: Row) -> Config:
    """A variant of configs/wmt14.py with fields set; bfloat16 unless they say otherwise."""
    flags = [f"--config.{name}={value}" for name, value in {"model.dtype": "bfloat16", **fields}.items()]
    return command_line.config_flags(["accelerator", f"--config={ROOT}/configs/wmt14.py:{variant}", *flags])[0]


def random_ids(config: Config, count: int, width: int) -> JaggedArray:
    """Sentences of three quarters of a width to all of it; the first has all."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(max(3 * width // 4, 2), width + 1, count)
    lengths[0] = width
    return JaggedArray.from_sequences([np.append(rng.integers(4, config.data.vocab_size, n - 1), EOS) for n in lengths])


def timed(function: Callable[..., Any], *arguments: Any, about: float = 0.5, smoke: bool = False) -> float:
    """Seconds of a call, warm: the median of three rounds, of about so many seconds together."""
    seconds_of(function, *arguments)
    count = 1 if smoke else min(max(int(about / 3 / max(seconds_of(function, *arguments), 1e-6)), 3), 200)
    return statistics.median(seconds_of(function, *arguments, count=count) for _ in range(3))


def shares(found: Findings, flops_per_s: float, device: str, devices: int) -> Row:
    """FLOPs a second as shares of what the data sheet says and of what phase `probe` has measured."""
    chip = chip_of(device)
    sheet = chip.flops if chip else 0.0
    row: Row = {"tflops": round(flops_per_s / 1e12, 4)}
    for key, ceiling in (("mfu", sheet), ("mfu_of_measured", found.ceiling)):
        row |= {key: round(flops_per_s / ceiling / devices, 4)} if ceiling else {}
    return row


def output_of(command: list[str]) -> list[str]:
    """The lines that a command prints, from the repository's root; its messages go to the log."""
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
