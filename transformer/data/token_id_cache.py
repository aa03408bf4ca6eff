"""The cache of token ids: a folder beside the prepared data for each split, direction of translation and vocabulary.

SIDE.ids holds the ids of all sentences of a side, one after another, in the smallest integers. SIDE.offsets.npy says
where each sentence begins, [N + 1] int64. about.json has the type of the ids and the digests of these files. A folder
is made whole or not at all. Imports no JAX.

N pairs.
"""

import glob
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from transformer.data import prepared, shards
from transformer.data.batching import JaggedArray
from transformer.data.shards import ShardedSplit
from transformer.data.tokenizer import Tokenizer
from transformer.runtime.file_digests import FileDigests
from transformer.runtime.files import atomic_directory, sha256

METADATA_FILE = "about.json"
SIDES = ("source", "target")
FILES = ("source.ids", "source.offsets.npy", "target.ids", "target.offsets.npy")

Mask = Callable[[int, int], np.ndarray | None]  # which of the pairs first ≤ index < last are taken, bool; None: all


def cache_folder(data_dir: str, digest: str, languages: tuple[str, str], tokenizer: Tokenizer) -> epath.Path:
    """The folder for the ids of the split with this digest."""
    return prepared.cache_folder(data_dir, "token_ids", digest, languages, tokenizer.digest[:24])


def store(folder: epath.PathLike, split: ShardedSplit, mask: Mask | None = None) -> None:
    """Joins the ids of all shards of a split as a folder, unless it exists."""
    final = pathlib.Path(folder)
    for partial in final.parent.glob(f"{glob.escape(final.name)}.*.partial"):  # of processes that were killed
        shutil.rmtree(partial, ignore_errors=True)
    if final.exists():
        return
    assert split.job.tokenizer is not None
    dtype = shards.id_dtype(split.job.tokenizer)
    digests: dict[str, str] = {}
    with atomic_directory(final) as partial:
        for side in SIDES:
            digests |= _join_side(split, side, dtype, mask, partial)
        (partial / METADATA_FILE).write_text(json.dumps({"dtype": dtype.name, "sha256": digests}))
    FileDigests.beside(final).record({os.path.join(final, name): digest for name, digest in digests.items()})


def _join_side(
    split: ShardedSplit, side: str, dtype: np.dtype, mask: Mask | None, folder: pathlib.Path
) -> dict[str, str]:
    """Writes the ids and offsets of a side; returns the digests of the two files by name."""
    ids_path, offsets_path = folder / f"{side}.ids", folder / f"{side}.offsets.npy"
    lengths_by_shard, digest, first = [], hashlib.sha256(), 0
    with ids_path.open("wb") as file:
        for shard in split.shards:
            lengths = np.load(split.job.path(shard.name, shards.PAIRS))[side].copy()
            ids: Any = np.fromfile(split.job.path(shard.name, f"{side}.ids"), dtype)
            taken = mask(first, first + shard.pairs) if mask is not None else None
            if taken is not None:
                ids, lengths = ids[np.repeat(taken, lengths)], lengths[taken]
            file.write(ids)
            digest.update(ids)
            lengths_by_shard.append(lengths)
            first += shard.pairs
    count = sum(map(len, lengths_by_shard))
    offsets = np.lib.format.open_memmap(offsets_path, "w+", np.int64, (count + 1,))
    start, total = 0, 0
    for lengths in lengths_by_shard:
        offsets[start + 1 : start + 1 + len(lengths)] = total + np.cumsum(lengths, dtype=np.int64)
        start, total = start + len(lengths), total + int(lengths.sum())
    offsets.flush()
    return {ids_path.name: digest.hexdigest(), offsets_path.name: sha256(offsets_path)}


def load(folder: epath.Path) -> tuple[JaggedArray, JaggedArray]:
    """Maps the ids of both sides into memory after verifying their digests.

    Raises:
      OSError, ValueError, KeyError, TypeError: the folder is damaged.
    """
    metadata = json.loads((folder / METADATA_FILE).read_text())
    digests = FileDigests.beside(folder).compute([folder / name for name in FILES], "verifying the token ids")
    for name in FILES:
        if digests[os.fspath(folder / name)] != metadata["sha256"][name]:
            raise ValueError(f"{name} has changed since it was written")
    source, target = (_load_side(folder, side, np.dtype(metadata["dtype"])) for side in SIDES)
    return source, target


def _load_side(folder: epath.Path, side: str, dtype: np.dtype) -> JaggedArray:
    offsets = np.load(folder / f"{side}.offsets.npy", mmap_mode="r", allow_pickle=False)
    flat = np.memmap(folder / f"{side}.ids", dtype, mode="r") if offsets[-1] else np.zeros(0, dtype)
    return JaggedArray(flat, offsets)
