"""What the digests of a checkpoint cost: their share of a save.

    python -m benchmarks.checkpoint_digest [--megabytes=1000] [--rounds=5] [--folder=DIR]

Params and the two moments of Adam make up the size. Each round saves them with `Checkpoints.save`, as training does,
and times the digests within. The last line of stdout is one JSON object; medians.
"""

import argparse
import json
import statistics
import tempfile
import time
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax

from transformer import checkpoint, tokenizer
from transformer.checkpoint import Checkpoints
from transformer.config import Config
from transformer.step import TrainState

LINES = ["the old house", "a new tree", "the cat sees a dog"]
WIDTH = 1024


def make_state(megabytes: int) -> TrainState:
    """Random params, with moments as Adam keeps them, of so many MB (10^6 bytes) in all; matrices of 4 x WIDTH^2."""
    matrices = max(round(megabytes * 1e6 / 3 / (4 * 4 * WIDTH**2)), 1)
    keys = jax.random.split(jax.random.key(0), matrices)
    params = {f"kernel_{i}": jax.random.normal(key, (WIDTH, 4 * WIDTH)) for i, key in enumerate(keys)}
    adam = optax.ScaleByAdamState(
        jnp.zeros((), jnp.int32), jax.tree.map(lambda x: x * x, params), jax.tree.map(jnp.sqrt, params)
    )
    return TrainState(jnp.zeros((), jnp.int32), params, (adam,))


def measure(state: TrainState, folder: str) -> dict[str, float]:
    """Seconds of one save, and of the digests in it."""
    seconds = 0.0
    digests = checkpoint.digests

    def timed(*args: Any) -> Any:
        nonlocal seconds
        begun = time.perf_counter()
        found = digests(*args)
        seconds += time.perf_counter() - begun
        return found

    with mock.patch.object(checkpoint, "digests", timed):
        begun = time.perf_counter()
        Checkpoints(folder).save(state, Config(), tokenizer.train(LINES, 280, "bpe"), "", {})
        return {"save_s": time.perf_counter() - begun, "digest_s": seconds}


def main() -> None:
    """Prints a line a round, and the medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where to save (default: the folder for temporary files)")
    args = parser.parse_args()
    state = make_state(args.megabytes)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6
    rounds = []
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            rounds.append(measure(state, folder))
        print(f"{size:,.0f} MB: save {rounds[-1]['save_s']:.2f} s, of that digests {rounds[-1]['digest_s']:.2f} s")
    medians = {name: statistics.median(found[name] for found in rounds) for name in rounds[0]}
    share = statistics.median(found["digest_s"] / found["save_s"] for found in rounds)
    print(json.dumps({"megabytes": size, **medians, "digest_share": share}))


if __name__ == "__main__":
    main()
