"""Runs a program on given sentence pairs, in a few fixed shapes: the result of a pair depends on no other pair.

B rows.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from transformer.data.batching import PAD_EXAMPLE, JaggedArray, eval_batches, make_batch, select_rows
from transformer.distributed import sharding


def map_pairs(
    program: Callable[[Any, Any], Any],
    mesh: Mesh,
    params: Any,
    sources: Sequence[np.ndarray],
    targets: Sequence[np.ndarray],
    rows_of: Callable[[int], int],
) -> Iterator[tuple[int, Any]]:
    """Yields the index of each pair, and its row of what the program returns, on the host; in the order of batches.

    Args:
      program: (params, batch) → arrays [B, ...], compiled by `sharding.data_parallel_jit`.
      sources, targets: token ids of each pair.
      rows_of: the rows of a batch by its width.
    """
    params = sharding.replicate(mesh, params)
    source, target = JaggedArray.from_sequences(sources), JaggedArray.from_sequences(targets)
    for spec in eval_batches(source.lengths, target.lengths, rows_of):
        local_rows = sharding.local_row_indices(mesh, len(spec.examples_B), rows="decode_batch")
        batch = make_batch(select_rows(spec, local_rows), source, target)
        results = jax.device_get(program(params, sharding.shard_batch(mesh, batch, rows="decode_batch")))
        for row, example in enumerate(spec.examples_B[spec.examples_B != PAD_EXAMPLE]):  # padding comes last
            yield int(example), jax.tree.map(operator.itemgetter(row), results)
