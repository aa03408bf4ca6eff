"""What one reading of a prepared data set finds: digests of its pairs, and rows not to train on.

The digests are of the pairs and not of the files: the same pairs are not always written as the same
bytes, as the order of an example's two fields differs between processes.
"""

import array
import dataclasses
import hashlib
import json

import numpy as np
from etils import epath

from transformer.data import prepared
from transformer.data.split import Split
from transformer.runtime.errors import UserError
from transformer.runtime.logging import told

SHARE = 100  # where there is no validation split, one pair in so many is held out of training
MOST = 2000  # pairs held out
RECIPE = 1  # goes up whenever `find` comes to find something else in the same data


@dataclasses.dataclass(frozen=True)
class Facts:
    """Per prepared split: digest, number of pairs, pairs with a line break; of training: rows, ascending."""

    digests: dict[str, str]
    pairs: dict[str, int]
    line_breaks: dict[str, int]
    blank: list[int]
    held_out: list[int]


def find(data: prepared.Prepared, languages: tuple[str, str], keeps_cr: bool = False) -> Facts:
    """Reads a data set in one direction of translation, or what was found in it before and kept beside it.

    `keeps_cr` is as `Split` has it.

    Raises:
      UserError: there is nothing to train on.
    """
    if "train" not in data.names:
        raise UserError(f"{data.folder}: expected a split 'train', got {', '.join(data.names) or 'none'}")
    path = data.folder / f"contents.{'-'.join(languages)}.json"
    if facts := _kept(path, data.digest()):
        return facts
    splits = {name: Split(name, "", languages, data.records(name), None, keeps_cr) for name in data.names}
    keys: dict[str, np.ndarray] = {}
    blank: dict[str, np.ndarray] = {}
    digests, line_breaks = {}, {}
    for name, split in splits.items():
        digests[name], keys[name], blank[name], line_breaks[name] = _read(split)
    rows = np.flatnonzero(~blank["train"])
    if not len(rows):
        raise UserError(f"all {len(splits['train']):,} training pairs have a blank side: nothing is left to train on")
    held_out = [] if "validation" in splits else rows[_lowest(keys["train"][rows])].tolist()
    pairs = {name: len(split) for name, split in splits.items()}
    facts = Facts(digests, pairs, line_breaks, np.flatnonzero(blank["train"]).tolist(), held_out)
    _keep(path, data.digest(), facts)
    return facts


def _read(split: Split) -> tuple[str, np.ndarray, np.ndarray, int]:
    """Reads all pairs of a split once.

    Returns:
      The digest of the pairs; a hash of each source sentence, [N] uint64; which pairs are blank, [N] bool: a side has
      nothing but whitespace; and how many are stored with a line break.
    """
    digest, keys, blank, line_breaks = hashlib.sha256(), array.array("Q"), array.array("b"), 0
    for stored in told(split.stored(), lambda count: f"data: looked at {count:,} pairs"):
        line_breaks += any("\n" in text for text in stored)
        source, target = split.lines(stored)
        texts = (source.encode(), target.encode())
        digest.update(b"%d %d " % (len(texts[0]), len(texts[1])) + texts[0] + texts[1])
        keys.append(hash64(texts[0]))
        blank.append(not (source.strip() and target.strip()))
    return digest.hexdigest(), np.array(keys, np.uint64), np.array(blank, bool), line_breaks


def hash64(text: bytes) -> int:
    """A hash of 64 bits, the same everywhere; two of 40 million sentences share one by a chance of 1 in 20,000."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _lowest(keys: np.ndarray) -> np.ndarray:
    """Which of the sentences with these hashes, [N] uint64, to hold out: [N] bool.

    Takes hashes from the lowest up, all rows of one together so that equal sentences fall on the same
    side, while they fit in 1 / SHARE of all rows and in MOST; the rarest sentence if none fits.
    """
    hashes, counts = np.unique(keys, return_counts=True)
    if len(hashes) == 1:
        raise UserError("training has one distinct source sentence: none can be held out; bring validation files")
    room = min(max(len(keys) // SHARE, 1), MOST)
    taken = []
    for key, count in zip(hashes, counts, strict=True):
        if count <= room:
            taken.append(key)
            room -= count
        if not room:
            break
    return np.isin(keys, taken or hashes[np.argmin(counts)])


def _keep(path: epath.Path, files: str, facts: Facts) -> None:
    text = json.dumps([RECIPE, files, dataclasses.asdict(facts)])
    prepared.write_beside(path, f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}\n".encode())


def _kept(path: epath.Path, files: str) -> Facts | None:
    """What `_keep` wrote for the same files by the same recipe, or None."""
    if not path.exists():
        return None
    digest, _, text = path.read_bytes().rstrip(b"\n").partition(b"\n")
    if hashlib.sha256(text).hexdigest().encode() != digest:
        return None
    *made_of, facts = json.loads(text)
    return Facts(**facts) if made_of == [RECIPE, files] else None
