"""Measures the share of digests, and of the check of the arrays' metadata, in the time to save a checkpoint.

    python -m benchmarks.checkpoint_hashing [--megabytes=1000] [--rounds=5] [--folder=DIR]

The size is that of params and the two moments of Adam. Each round saves them twice with `CheckpointManager.save`, with
and without SHA-256, and checks the metadata separately. The last line of stdout
is one JSON object; medians.
"""

import contextlib
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
from transformer.command_line import absolute_path, command_parser, positive_int, run
from transformer.config import Config
from transformer.data import tokenizer
from transformer.training.train_step import TrainState

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
        rounds.append((seconds[True][0], seconds[False][0], seconds[True][1]))
        saved, without, check = rounds[-1]
        print(f"{size:,.0f} MB: save {saved:.2f} s, without digests {without:.2f} s, check of arrays {check:.3f} s")
    saved, without, check = (statistics.median(column) for column in zip(*rounds, strict=True))
    shares = {"share": 1 - without / saved, "check_share": check / saved}
    print(json.dumps({"megabytes": size, "save_s": saved, "without_s": without, "check_s": check, **shares}))


if __name__ == "__main__":
    run(main)
