"""Measures the time to save a checkpoint: how long training waits for it, and what digests and checks take of it.

    python -m benchmarks.checkpoint_hashing [--megabytes=1000] [--rounds=5] [--folder=DIR]

The size is that of params and the two moments of Adam. Each round saves them twice with `CheckpointManager.save`, with
and without SHA-256, and checks the metadata separately. Then it begins a save and at once an update, which takes the
arrays of the state; the pause is what both take longer than an update alone. The last line of stdout is JSON,
of medians.
"""

import contextlib
import functools
import json
import os
import statistics
import tempfile
import time
from unittest import mock

import jax
import jax.numpy as jnp
import optax

from transformer.checkpoints import manager, manifest
from transformer.checkpoints.manager import CheckpointManager
from transformer.checkpoints.state import TrainState
from transformer.command_line import absolute_path, command_parser, positive_int, run
from transformer.config import Config
from transformer.data import tokenizer

LINES = ["the old house", "a new tree", "the cat sees a dog"]
WIDTH = 1024


def make_state(megabytes: int) -> TrainState:
    """Random params and Adam moments of about `megabytes` * 10^6 bytes in all, in matrices of 4 x WIDTH^2."""
    matrices = max(round(megabytes * 1e6 / 3 / (4 * 4 * WIDTH**2)), 1)
    keys = jax.random.split(jax.random.key(0), matrices)
    params = {f"kernel_{i}": jax.random.normal(key, (WIDTH, 4 * WIDTH)) for i, key in enumerate(keys)}
    adam = optax.ScaleByAdamState(
        jnp.zeros((), jnp.int32), jax.tree.map(lambda x: x * x, params), jax.tree.map(jnp.sqrt, params)
    )
    return TrainState(jnp.zeros((), jnp.int32), params, (adam,))


def seconds_of_save(state: TrainState, folder: str, digests: bool) -> tuple[float, float]:
    """Seconds of one save, and of the check of its arrays; excludes pending writes of earlier saves."""
    vocabulary = tokenizer.train(LINES, 280, "bpe")
    os.sync()
    with contextlib.nullcontext() if digests else mock.patch.object(manifest, "sha256", return_value=""):
        start = time.perf_counter()
        CheckpointManager(folder).save(state, Config(), vocabulary, {}, {})
        saved = time.perf_counter()
    manager.check_arrays(CheckpointManager(folder).folder / "0", state)
    return saved - start, time.perf_counter() - saved


@functools.partial(jax.jit, donate_argnums=0)
def update(state: TrainState) -> TrainState:
    """Writes every array, into the memory of the old one if nobody reads that."""
    return jax.tree.map(lambda leaf: leaf * jnp.asarray(0.999, leaf.dtype), state)


def seconds_of_update(state: TrainState) -> tuple[float, TrainState]:
    """Seconds of one update, and the state after it."""
    start = time.perf_counter()
    state = jax.block_until_ready(update(state))
    return time.perf_counter() - start, state


def pause_of_save(state: TrainState, folder: str) -> tuple[float, TrainState]:
    """Seconds for which a save holds up training, and a later state."""
    vocabulary = tokenizer.train(LINES, 280, "bpe")
    _, state = seconds_of_update(state)  # which compiles
    usual, state = seconds_of_update(state)
    os.sync()
    with CheckpointManager(folder) as checkpoints:
        start = time.perf_counter()
        checkpoints.save_async(state, Config(), vocabulary, {}, {})
        begun = time.perf_counter() - start
        seconds, state = seconds_of_update(state)
    return begun + seconds - usual, state


def main(argv: list[str]) -> None:
    """Prints a line for each round, and the medians."""
    parser = command_parser("python -m benchmarks.checkpoint_hashing", __doc__)
    parser.add_argument("--megabytes", type=positive_int, default=1000)
    parser.add_argument("--rounds", type=positive_int, default=5)
    parser.add_argument("--folder", type=absolute_path, help="where to save (default: the folder for temporary files)")
    args = parser.parse_args(argv[1:])
    state = make_state(args.megabytes)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6
    rounds = []
    for number in range(args.rounds):
        seconds = {}
        for digests in (True, False) if number % 2 else (False, True):
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                seconds[digests] = seconds_of_save(state, folder, digests)
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            pause, state = pause_of_save(state, folder)
        rounds.append((seconds[True][0], seconds[False][0], seconds[True][1], pause))
        print(
            "{:,.0f} MB: save {:.2f} s, without digests {:.2f} s, check {:.3f} s, pause {:.2f} s".format(
                size, *rounds[-1]
            )
        )
    saved, without, check, pause = (statistics.median(column) for column in zip(*rounds, strict=True))
    values = {"megabytes": size, "save_s": saved, "without_s": without, "check_s": check, "pause_s": pause}
    print(
        json.dumps({**values, "share": 1 - without / saved, "check_share": check / saved, "pause_share": pause / saved})
    )


if __name__ == "__main__":
    run(main)
