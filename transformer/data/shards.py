"""Shards: sentence pairs are stored, scanned and tokenized in blocks, by several processes.

The preparing process cuts the text into blocks, a shard each (`line_parts`, `pair_parts`, `blocks`). A `ShardJob` makes
the files of a shard from its block, in any process: records, token ids, and what is known of each pair. Last it writes
the digests of these files: a shard whose digests are there and right is done and not made again, whatever was killed.
The files depend on the text alone. `token_id_cache` joins the token ids of all shards. Imports no JAX.
"""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from transformer.data import records, text_files
from transformer.data.filters import FilterChain
from transformer.data.text_files import Pair
from transformer.data.tokenizer import Tokenizer
from transformer.runtime import environment
from transformer.runtime.errors import UserError
from transformer.runtime.files import sha256, write_atomic
from transformer.runtime.worker_pool import WorkerPool

SHARD_BYTES = 16 << 20  # of text
PART_BYTES = 1 << 20  # of one side, decoded at a time
PART_PAIRS = 4096
MAX_WORKERS = 16  # by default; each takes 100 to 300 MB

RECORDS, SOURCE_IDS, TARGET_IDS, PAIRS = "records", "source.ids", "target.ids", "pairs.npy"
_DONE = "done.json"
FORMAT_VERSION = 1  # of the files of a shard
_PAIR_FIELDS = [("hash", "<u8"), ("source", "<i4"), ("target", "<i4"), ("blank", "?")]
_FILTER_FIELDS = [("pair_hash", "<u8"), ("filter", "u1")]  # with filters only


class Lines(NamedTuple):
    """Lines of two files, as bytes; `first` is the number of the first, counted from 1."""

    source: bytes
    target: bytes
    first: int
    paths: tuple[str, str]

    @property
    def size(self) -> int:
        """Bytes of text."""
        return len(self.source) + len(self.target)

    def pairs(self) -> list[Pair]:
        """The pairs; a UserError names file and line of invalid text."""
        source = text_files.decode_block(self.source, self.paths[0], self.first)
        target = text_files.decode_block(self.target, self.paths[1], self.first)
        return list(zip(source, target, strict=True))


class Texts(NamedTuple):
    """Pairs that are read already."""

    texts: list[Pair]

    @property
    def size(self) -> int:
        """Characters of text."""
        return sum(len(source) + len(target) for source, target in self.texts)

    def pairs(self) -> list[Pair]:
        """The pairs."""
        return self.texts


class Stored(NamedTuple):
    """Pairs of an ArrayRecord file, first ≤ index < last, by the language codes of source and target."""

    path: str
    first: int
    last: int
    languages: tuple[str, str]

    @property
    def size(self) -> int:
        """0: a file of records is a block, whatever its size."""
        return 0

    def pairs(self) -> list[Pair]:
        """The pairs; a UserError if the file is damaged."""
        try:
            reader = records.RecordReader([self.path], [self.last])
            return [records.parse(record, self.languages) for record in reader.read(self.first, self.last)]
        except Exception as error:  # ArrayRecord and protobuf raise exceptions of their own
            raise UserError(f"{self.path}: the prepared data cannot be read: {error}") from error


Part = Lines | Texts | Stored


class Block(NamedTuple):
    """The text of one shard; `name` begins the names of its files, such as train-00012."""

    name: str
    parts: Sequence[Part]

    @property
    def size(self) -> int:
        """Of the text."""
        return sum(part.size for part in self.parts)


class _LineReader:
    """Reads whole lines from a stream of bytes.

    Attributes:
      number: of lines read.
    """

    def __init__(self, stream: io.BufferedIOBase, path: str):
        self._stream, self._path, self._rest, self.number = stream, path, b"", 0

    def _more(self, size: int) -> bool:
        """Reads on; returns whether there was anything."""
        with text_files.user_errors(self._path):
            read = self._stream.read(size)
        self._rest += read
        if len(self._rest) > text_files.MAX_LINE_BYTES and self._rest.find(b"\n") < 0:
            raise text_files.overlong_line(self._path, self.number + 1)
        return bool(read)

    def chunk(self, size: int) -> bytes:
        """About `size` bytes, but at least one line; empty at the end."""
        while (end := self._rest.rfind(b"\n") + 1) == 0 and self._more(size):
            pass
        return self._split(end or len(self._rest))

    def take(self, count: int, size: int) -> bytes:
        """The next `count` lines, or all that are left."""
        taken: list[bytes] = []
        while count:
            found = self._rest.count(b"\n")
            if found >= count:
                ends = np.flatnonzero(np.frombuffer(self._rest, np.uint8) == ord("\n"))
                return b"".join([*taken, self._split(int(ends[count - 1]) + 1)])
            end = self._rest.rfind(b"\n") + 1
            taken.append(self._split(end))
            count -= found
            if not self._more(size):
                return b"".join([*taken, self._split(len(self._rest))])
        return b"".join(taken)

    def _split(self, end: int) -> bytes:
        first, self._rest = self._rest[:end], self._rest[end:]
        self.number += count_lines(first)
        return first

    def count_rest(self, size: int) -> int:
        """Reads to the end; returns the number of lines of the file."""
        while self.chunk(size):
            pass
        return self.number


def count_lines(text: bytes) -> int:
    """The number of lines, the last perhaps without its end."""
    return text.count(b"\n") + (text != b"" and not text.endswith(b"\n"))


def line_parts(source: str, target: str) -> Iterator[Lines]:
    """Reads two text files in parts with equally many lines, and decodes none.

    Raises:
      UserError: a file cannot be read, or they have different numbers of lines.
    """
    size = _part_bytes()
    with text_files.open_bytes(source) as source_stream, text_files.open_bytes(target) as target_stream:
        readers = _LineReader(source_stream, source), _LineReader(target_stream, target)
        while True:
            first = readers[0].number + 1
            left = readers[0].chunk(size)
            right = readers[1].take(count_lines(left), size) if left else readers[1].chunk(size)
            if readers[0].number != readers[1].number:
                counts = readers[0].count_rest(size), readers[1].count_rest(size)
                raise text_files.unequal_lines((source, target), counts)
            if not left:
                return
            yield Lines(left, right, first, (source, target))


def pair_parts(pairs: Iterable[Pair]) -> Iterator[Texts]:
    """Collects pairs in parts."""
    iterator, limit = iter(pairs), _part_bytes()
    while True:
        texts, size = [], 0
        for pair in itertools.islice(iterator, PART_PAIRS):
            texts.append(pair)
            size += len(pair[0]) + len(pair[1])
            if size >= limit:
                break
        if not texts:
            return
        yield Texts(texts)


def _part_bytes() -> int:
    return max(min(PART_BYTES, SHARD_BYTES // 16), 1)


def blocks(split: str, parts: Iterable[Part]) -> Iterator[Block]:
    """Collects parts in blocks of about SHARD_BYTES."""
    collected: list[Part] = []
    size = number = 0
    for part in parts:
        collected.append(part)
        size += part.size
        if size >= SHARD_BYTES:
            yield Block(f"{split}-{number:05}", collected)
            collected, size, number = [], 0, number + 1
    if collected:
        yield Block(f"{split}-{number:05}", collected)


class Shard(NamedTuple):
    """A shard that is done.

    Attributes:
      name: begins the names of its files.
      pairs: their number.
      line_breaks: the number of pairs that hold a line break.
      digests: SHA-256 of its files by the ends of their names.
      text: SHA-256 of its sentences, or of the name of the file that they are stored in.
      is_new: it was made now and not earlier.
    """

    name: str
    pairs: int
    line_breaks: int
    digests: dict[str, str]
    text: str
    is_new: bool = True


class Result(NamedTuple):
    """A shard, its part of what the digest of the split is of (see `digest_input`), and the size of its text."""

    shard: Shard
    digest_input: bytes
    size: int


@dataclasses.dataclass(frozen=True)
class ShardJob:
    """Makes the files of a shard in a folder; picklable.

    Attributes:
      folder: holds the files.
      languages: of the first and second text of the pairs in a block.
      store: whether to write records.
      scan: whether to write what is known of each pair.
      reverse: whether the second text is the source.
      strip_cr: as in `to_lines`.
      tokenizer: by which to write token ids, or None.
      filters: which to apply to each pair, or None.
    """

    folder: str
    languages: tuple[str, str]
    store: bool = False
    scan: bool = False
    reverse: bool = False
    strip_cr: bool = False
    tokenizer: Tokenizer | None = None
    filters: FilterChain | None = None

    def __call__(self, block: Block) -> Result:
        """Makes the shard, unless it is done.

        Raises:
          UserError: invalid text.
          OSError: the files cannot be written.
        """
        if done := self._load(block.name):
            inputs, digest = [], self._new_digest()
            for part in block.parts:
                inputs.append(self._digest_input(part, []))
                digest.update(inputs[-1])
            if digest.hexdigest() == done.text:
                return Result(done, b"".join(inputs), block.size)
        return self._make(block)

    def _new_digest(self) -> Any:
        """Of all that the files depend on: this job now, the text later."""
        tokenizer = self.tokenizer.digest if self.tokenizer else ""
        parts = [FORMAT_VERSION, self.languages, self.store, self.scan, self.reverse, self.strip_cr, tokenizer]
        if self.filters:
            parts.append(self.filters.digest)
        return hashlib.sha256(json.dumps(parts).encode())

    def _digest_input(self, part: Part, lines: list[Pair]) -> bytes:
        """The part's share of what the digest of the split is of; if nobody asks for that, the name of its file."""
        if isinstance(part, Stored) and not self.scan:
            return json.dumps([os.path.basename(part.path), *part[1:]]).encode()
        return digest_input(lines or self._lines(part.pairs()))

    def _lines(self, pairs: list[Pair]) -> list[Pair]:
        """Source and target lines."""
        ordered = [(target, source) for source, target in pairs] if self.reverse else pairs
        return [to_lines(pair, self.strip_cr) for pair in ordered]

    def path(self, name: str, end: str) -> pathlib.Path:
        """A file of a shard."""
        return pathlib.Path(self.folder, f"{name}.{end}")

    def _load(self, name: str) -> Shard | None:
        """The shard if its files are there and whole."""
        try:
            pairs, line_breaks, digests, text = json.loads(self.path(name, _DONE).read_bytes())
            if all(sha256(self.path(name, end)) == digest for end, digest in digests.items()):
                return Shard(name, int(pairs), int(line_breaks), digests, text, is_new=False)
        except (OSError, ValueError, TypeError, AttributeError):
            pass
        return None

    def _make(self, block: Block) -> Result:
        """Makes the files under other names, then renames them, then writes their digests."""
        ends = [RECORDS] * self.store + [SOURCE_IDS, TARGET_IDS] * (self.tokenizer is not None)
        partial = {end: self.path(block.name, f"{end}.partial") for end in [*ends, PAIRS]}
        self.path(block.name, _DONE).unlink(missing_ok=True)
        inputs, known, line_breaks, digest = [], [], 0, self._new_digest()
        with contextlib.ExitStack() as stack:
            writer = stack.enter_context(records.open_writer(partial[RECORDS])) if self.store else None
            ids = [stack.enter_context(partial[end].open("wb")) for end in (SOURCE_IDS, TARGET_IDS) if end in partial]
            for part in block.parts:
                pairs = part.pairs()
                lines = self._lines(pairs)
                inputs.append(self._digest_input(part, lines))
                digest.update(inputs[-1])
                if writer is not None:
                    for pair in pairs:
                        writer.write(records.serialize(pair, self.languages))
                line_breaks += sum("\n" in source or "\n" in target for source, target in pairs)
                known.append(self._know(lines, ids))
        with partial[PAIRS].open("wb") as file:
            np.save(file, np.concatenate(known))
        count = sum(map(len, known))
        if self.store and records.count_records(os.fspath(partial[RECORDS])) != count:
            raise OSError(f"{partial[RECORDS]}: not all of {count:,} records were written; is the disk full?")
        digests = {}
        for end, path in partial.items():
            digests[end] = sha256(path)
            path.replace(self.path(block.name, end))
        shard = Shard(block.name, count, line_breaks, digests, digest.hexdigest())
        write_atomic(self.path(block.name, _DONE), json.dumps(shard[1:5]))
        return Result(shard, b"".join(inputs), block.size)

    def _know(self, lines: list[Pair], files: Sequence[Any]) -> np.ndarray:
        """What is known of each pair; writes the token ids."""
        known = np.zeros(len(lines), _PAIR_FIELDS + _FILTER_FIELDS * (self.filters is not None))
        if self.filters:
            known["filter"] = self.filters.find(lines)
            if self.filters.duplicates:
                known["pair_hash"] = [pair_hash(pair) for pair in lines]
        if self.scan:
            known["hash"] = [hash64(source.encode()) for source, _ in lines]
            known["blank"] = [not (source.strip() and target.strip()) for source, target in lines]
        if self.tokenizer is not None and lines:
            dtype = id_dtype(self.tokenizer)
            for side, file, texts in zip(("source", "target"), files, zip(*lines, strict=True), strict=True):
                flat, known[side] = self.tokenizer.encode_flat(texts)
                file.write(flat.astype(dtype).tobytes())
        return known


def id_dtype(tokenizer: Tokenizer) -> np.dtype:
    """The type in which token ids are kept."""
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32)


def to_lines(raw: Pair, strip_cr: bool) -> Pair:
    """The pair as two lines of text, without line breaks; `strip_cr` removes a CR at the end of each."""
    source, target = raw
    if strip_cr:
        source, target = source.removesuffix("\r"), target.removesuffix("\r")
    return text_files.one_line(source), text_files.one_line(target)


def digest_input(lines: Iterable[Pair]) -> bytes:
    """What the digest of a split is of: both lengths in bytes and both texts of each pair, one after another."""
    texts = ((source.encode(), target.encode()) for source, target in lines)
    return b"".join([b"%d %d %b%b" % (len(source), len(target), source, target) for source, target in texts])


def hash64(text: bytes) -> int:
    """A 64-bit hash, the same everywhere; 40 million sentences have a collision with a probability of 1 in 20,000."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def pair_hash(pair: Pair) -> int:
    """A 64-bit hash of both sides."""
    source, target = pair[0].encode(), pair[1].encode()
    return hash64(b"%d " % len(source) + source + target)


class ShardedSplit(NamedTuple):
    """All shards of a split.

    Attributes:
      job: made them.
      digest: of all pairs, in hexadecimal; empty if they were stored before.
    """

    job: ShardJob
    shards: list[Shard]
    digest: str

    def pairs(self) -> int:
        """The number of pairs."""
        return sum(shard.pairs for shard in self.shards)

    def known(self, field: str) -> np.ndarray:
        """A field of what is known of all pairs: hash, blank, source, target; with filters, filter and pair_hash."""
        parts = [part.copy() for part in self.known_by_shard(field)]
        return np.concatenate([np.zeros(0, dict(_PAIR_FIELDS + _FILTER_FIELDS)[field]), *parts])

    def known_by_shard(self, field: str) -> Iterator[np.ndarray]:
        """The same, one shard after another, mapped into memory."""
        for shard in self.shards:
            yield np.asarray(np.load(self.job.path(shard.name, PAIRS), mmap_mode="r")[field])


def run(
    job: ShardJob, split: str, work: Iterable[Block], workers: int, advance: Callable[[Result], None]
) -> ShardedSplit:
    """Makes the shards of a split by worker processes.

    Args:
      advance: called with each shard that is done.
    """
    iterator = iter(work)
    first = list(itertools.islice(iterator, 2))  # one block is not worth a process
    digest, shards = hashlib.sha256(), []
    with WorkerPool(job, workers if len(first) == 2 else 1) as pool:
        for result in pool.map(itertools.chain(first, iterator)):
            digest.update(result.digest_input)
            shards.append(result.shard)
            advance(result)
    return ShardedSplit(job, shards, digest.hexdigest())


def default_workers() -> int:
    """One a core, up to MAX_WORKERS."""
    return max(min(environment.available_cpus(), MAX_WORKERS), 1)


def stored_blocks(split: str, files: Iterable[tuple[str, int]], languages: tuple[str, str]) -> Iterator[Block]:
    """A block for each file of records."""
    for number, (path, count) in enumerate(files):
        starts = range(0, count, PART_PAIRS)
        parts = [Stored(path, start, min(start + PART_PAIRS, count), languages) for start in starts]
        yield Block(f"{split}-{number:05}", parts)
