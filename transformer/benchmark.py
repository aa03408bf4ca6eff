"""Benchmarks training of a config on this machine: target tokens per second on its own data.

    python -m transformer.benchmark --config=configs/NAME.py [--input] [--num_steps=N]

Every batch shape is compiled and run once before timing. Tokens are real target tokens, without padding.
`--input` measures the input pipeline alone. The last line of stdout is one JSON object.
"""

import itertools
import json
import time
from collections.abc import Iterator

import jax
import numpy as np

from transformer import command_line
from transformer.command_line import positive_int
from transformer.config import Config, schema
from transformer.data import input_pipeline, mixture_corpus, vocabulary
from transformer.data import tokenizer as tokenizers
from transformer.data.batching import Batch, BatchSchedule
from transformer.data.input_pipeline import TokenIds
from transformer.data.tokenizer import PAD
from transformer.distributed import sharding
from transformer.distributed.mesh import make_mesh
from transformer.models import flops as cost
from transformer.models import registry
from transformer.runtime import environment
from transformer.runtime.logging import log_info
from transformer.training import train_step
from transformer.training.metrics import peak_memory_mb

ROUNDS = 5  # timed separately: the median is robust against other load on the machine

Row = dict[str, float | str | None]


def main(argv: list[str]) -> None:
    """Parses the flags, measures and prints."""
    parser = command_line.config_parser("python -m transformer.benchmark", __doc__)
    parser.add_argument("--input", action="store_true", help="measure the input pipeline alone")
    steps_help = f"updates to time, in {ROUNDS} rounds (default: 50)"
    parser.add_argument("--num_steps", type=positive_int, default=50, help=steps_help)
    config, args = command_line.parse_with_config(parser, argv)
    config = schema.with_absolute_paths(config)
    mixture_corpus.validate_sources(config.data)
    environment.enable_compilation_cache()
    corpus = mixture_corpus.open_sources(config.data)
    tokenizer = vocabulary.get_or_train_tokenizer(tokenizers.inherit_tokenizer(config), corpus)
    ids = input_pipeline.training_ids(config, corpus, tokenizer)
    schedule = input_pipeline.make_batch_schedule(config, ids)
    steps = max(args.num_steps // ROUNDS, 1)
    row = measure_input(schedule, ids, steps) if args.input else measure(config, schedule, ids, steps)
    print(json.dumps({**row, **sizes(config, tokenizer.vocab_size)}))


def sizes(config: Config, vocab_size: int) -> Row:
    """The sizes of model and batch."""
    model = config.model
    attends = model.family == "attention"
    return {
        "family": model.family,
        "dtype": model.dtype,
        "emb_dim": model.emb_dim,
        "mlp_dim": model.mlp_dim if attends else None,
        "num_layers": model.num_layers,
        "encoder_layers": model.num_encoder_layers,
        "decoder_layers": model.num_decoder_layers,
        "num_heads": model.num_heads if attends else None,
        "vocab_size": vocab_size,
        "batch_tokens": config.train.batch_tokens,
    }


def measure_input(schedule: BatchSchedule, ids: TokenIds, steps_per_round: int) -> Row:
    """Real target tokens per second of the input pipeline, median of rounds."""
    rates = []
    for start in range(0, ROUNDS * steps_per_round, steps_per_round):
        batches = input_pipeline.train_iterator(schedule, ids, start=start, num_steps=start + steps_per_round)
        since = time.perf_counter()
        tokens = sum(real_tokens(batch) for batch in batches)
        rates.append(tokens / (time.perf_counter() - since))
    row: Row = {"input_target_tokens_per_s": round(float(np.median(rates)))}
    if ids.dropout:
        row["subword_dropout_fallback_share"] = ids.dropout.fallback_share
    return row


def measure(config: Config, schedule: BatchSchedule, ids: TokenIds, steps_per_round: int) -> Row:
    """Speed of training steps with input, median of rounds."""
    mesh = make_mesh(config.mesh)
    model = registry.ModelDef(config.model, config.data.vocab_size)
    update = train_step.make_train_step(model, config, mesh)
    state = train_step.init_state(model, config, mesh)
    parts = config.train.accumulation_steps
    compile_since = time.perf_counter()
    for batch in batches_of_all_shapes(schedule, ids):
        state, metrics = update(state, sharding.shard_batch(mesh, batch, parts))
    jax.block_until_ready(metrics)
    compile_s = time.perf_counter() - compile_since
    log_info(f"{len(schedule.buckets)} shapes compiled or loaded from the cache, and run once: {compile_s:.1f} s")
    batches = input_pipeline.train_iterator(schedule, ids, start=0, num_steps=ROUNDS * steps_per_round)
    rounds = []
    for number in range(1, ROUNDS + 1):
        tokens, flops, since = 0, 0, time.perf_counter()
        for batch in itertools.islice(batches, steps_per_round):
            sharded = sharding.shard_batch(mesh, batch, parts)
            tokens += real_tokens(batch)
            flops += cost.batch_flops(config.model, config.data.vocab_size, sharded, config.train.passes)
            state, metrics = update(state, sharded)
        jax.block_until_ready(metrics)
        rounds.append((time.perf_counter() - since, tokens, flops))
        log_info(f"round {number} of {ROUNDS}: {tokens / rounds[-1][0]:,.0f} target tokens/s")
    seconds, tokens, flops = np.array(rounds).T
    return {
        "params": model.num_params(),
        "target_tokens_per_s": round(float(np.median(tokens / seconds))),
        "step_ms": round(1000 * float(np.median(seconds)) / steps_per_round, 2),
        "flops_per_step": round(float(flops.mean()) / steps_per_round),
        "flops_per_s": round(float(np.median(flops / seconds))),
        "compile_s": round(compile_s, 2),
        "peak_memory_mb": round(peak_memory_mb()),
        "device": f"{mesh.size} x {jax.devices()[0].device_kind}",
    }


def batches_of_all_shapes(schedule: BatchSchedule, ids: TokenIds) -> Iterator[Batch]:
    """Yields one batch of each bucket."""
    seen = set()
    for number in range(schedule.steps_per_epoch):
        bucket = schedule.batch(number).bucket
        if bucket not in seen:
            seen.add(bucket)
            yield next(input_pipeline.train_iterator(schedule, ids, start=number, num_steps=number + 1))
        if len(seen) == len(schedule.buckets):
            return


def real_tokens(batch: Batch) -> int:
    """The number of target tokens without padding."""
    return int(np.count_nonzero(batch.target_BT != PAD))


if __name__ == "__main__":
    command_line.reexec_with_malloc_settings()
    command_line.run(main)
