"""Tokenizer: text ↔ ids by SentencePiece or BPE merges of subword-nmt; defines the ids of pad, bos, eos and unk.

One vocabulary serves both languages. Special ids are always 0 … 3: the ids of a model trained elsewhere are
remapped. PAD is not UNK, so that a loss mask never hides an unknown token.
"""

import collections
import dataclasses
import hashlib
import io
import itertools
import os
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import sentencepiece
from etils import epath

from transformer.config import mixture
from transformer.config.schema import TOKENIZER_ALGORITHMS, Config, DataConfig
from transformer.data import subword_nmt
from transformer.runtime import object_storage
from transformer.runtime.errors import UserError
from transformer.runtime.files import reject_pipe, user_error_on_oserror, write_atomic
from transformer.runtime.logging import log_info

PAD, BOS, EOS, UNK = range(4)
SPACE = "\u2581"  # how SentencePiece writes a space
FILE_NAME = "sentencepiece.model"
CODES_FILE_NAME = "subword_nmt.json"
FILE_NAMES = (FILE_NAME, CODES_FILE_NAME)
FORMAT_VERSION = 2  # increased whenever `train` makes another model from the same lines
NUM_FIXED = 4 + 256  # special ids and bytes
OPTION_HINT = "Increase vocab_size or decrease character_coverage with --character_coverage option."
MIN_COVERAGE = 0.98  # the least that SentencePiece accepts
MAX_COUNTED_LINES = 200_000  # enough to determine the alphabet
# Of a larger corpus, a sample. Lines of unigram take 3 kB each; a vocabulary that is cached already stays in use.
MAX_TRAINING_LINES = {"bpe": 2_000_000, "unigram": 600_000}
# In bytes; SentencePiece skips longer lines. Its default limit is changed only if it would skip some, because the model
# file contains the limit.
DEFAULT_MAX_LINE_BYTES, MAX_LINE_BYTES = 4192, 65_536
RESERVED = "\u2585"  # SentencePiece skips lines that contain it


class BpePiece(NamedTuple):
    """A subword token of a BPE model: its text, with SPACE for spaces, the score of its merge, whether it has one."""

    text: str
    score: float
    is_merged: bool


class Tokenizer:
    """A trained SentencePiece model, or BPE merges with a vocabulary; safe to pickle and to share between threads.

    Attributes:
      vocab_size: ids are 0 … vocab_size - 1.
      digest: SHA-256 of the model; identifies the vocabulary.
      file_name: one of FILE_NAMES, under which it is saved.
    """

    def __init__(self, model: bytes, path: str = FILE_NAME):
        self._model = model
        self._processor: Any
        if model.startswith(b"{"):  # as no SentencePiece model does
            self.file_name, self._processor = CODES_FILE_NAME, subword_nmt.load(model, path)
        else:
            self.file_name, self._processor = FILE_NAME, sentencepiece.SentencePieceProcessor()
            try:
                self._processor.LoadFromSerializedProto(model)
            except (RuntimeError, OSError) as error:
                raise UserError(f"{path}: expected a SentencePiece model, got something else: {error}") from error
        self.digest = hashlib.sha256(model).hexdigest()
        self._from_sp, self._to_sp = _id_tables(self._processor)
        self.vocab_size = len(self._to_sp)

    def __getstate__(self) -> bytes:
        return self._model

    def __setstate__(self, model: bytes) -> None:
        self.__init__(model)  # type: ignore[misc]

    def encode(self, lines: Sequence[str], tag: str = "") -> list[np.ndarray]:
        """Encodes each line as int32 ids ending in EOS, after that of a tag; text never gives special ids or tags.

        Raises:
          UserError: the tag is not in the vocabulary.
        """
        encoded = [np.append(self._from_sp[ids], np.int32(EOS)) for ids in self._processor.encode(list(lines))]
        return [np.insert(ids, 0, self.tag_id(tag)) for ids in encoded] if tag else encoded

    def encode_inside(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encodes texts as they are written inside a line, without the space that begins one, and without EOS."""
        if self.file_name == CODES_FILE_NAME:  # whose tokens are words
            return [ids[:-1] for ids in self.encode(texts)]
        boundary, *encoded = self.encode([RESERVED, *(RESERVED + text for text in texts)])  # which no merge crosses
        return [ids[len(boundary) - 1 : -1] for ids in encoded]

    def encode_truncated(
        self, lines: Sequence[str], max_length: int, tag: str = ""
    ) -> tuple[list[np.ndarray], list[bool]]:
        """As `encode`, at most `max_length` tokens of each line, EOS last; and whether the line was longer."""
        encoded = self.encode(lines, tag)
        is_longer = [len(ids) > max_length for ids in encoded]
        end = np.int32(EOS)
        truncated = [
            np.append(ids[: max_length - 1], end) if longer else ids
            for ids, longer in zip(encoded, is_longer, strict=True)
        ]
        return truncated, is_longer

    def tag_id(self, tag: str) -> int:
        """The id of a tag such as <2de>; a UserError if it is not in the vocabulary."""
        token = int(self._from_sp[self._processor.piece_to_id(tag)])
        if not self.is_tag(token):
            raise UserError(
                f"the tag {tag} is not a control symbol of this vocabulary: expected one trained with the tags of "
                "data.mixture"
            )
        return token

    def is_tag(self, token: int) -> bool:
        """Whether an id is that of a tag, which stands for no text."""
        return token > UNK and bool(self._processor.is_control(int(self._to_sp[token])))

    def encode_flat(self, lines: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all lines one after another, int32, each line ending in EOS; and the length of each, [N] int64.

        Takes one thread and less time than `encode`.
        """
        options = {"num_threads": 1} if self.file_name == FILE_NAME else {}
        encoded = self._processor.encode(list(lines), **options)
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded)) + 1
        ends = np.cumsum(lengths)
        total = int(ends[-1]) if len(ends) else 0
        is_token = np.ones(total, bool)
        is_token[ends - 1] = False
        flat = np.full(total, EOS, np.int32)
        sp_ids = np.fromiter(itertools.chain.from_iterable(encoded), np.int64, total - len(encoded))
        flat[is_token] = self._from_sp[sp_ids]
        return flat, lengths

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes the ids before the first EOS into one line; line breaks in it become spaces.

        A CR at the end is removed: it would be read as part of the line's end.
        """
        sp_ids = []
        for token in ids:
            if token == EOS:
                break
            if token not in (PAD, BOS):
                sp_ids.append(int(self._to_sp[token]))
        return re.sub("\r?\n|\0", " ", self._processor.decode(sp_ids)).rstrip("\r")

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The subword token of each id."""
        return [self._processor.id_to_piece(int(self._to_sp[token])) for token in ids]

    def bpe_pieces(self) -> list[BpePiece]:
        """The subword token of each id if this is a BPE model of SentencePiece; else none.

        The higher the score of a piece, the earlier two pieces are merged into it. Single characters count as merged;
        special tokens, bytes and symbols that a user defined do not.
        """
        if self.file_name != FILE_NAME:
            return []
        from sentencepiece import sentencepiece_model_pb2  # takes 0.1 s, and most processes do not need it

        model = sentencepiece_model_pb2.ModelProto.FromString(self._model)
        if model.trainer_spec.model_type != sentencepiece_model_pb2.TrainerSpec.BPE:
            return []
        pieces, normal = model.pieces, sentencepiece_model_pb2.ModelProto.SentencePiece.NORMAL
        return [BpePiece(pieces[i].piece, pieces[i].score, pieces[i].type == normal) for i in self._to_sp.tolist()]

    def word_ids(self, ids: Sequence[int]) -> list[int]:
        """The index of the word that each id is part of, counted from 0; words are separated by spaces.

        -1 for EOS and tags.
        """
        word_ids, num_words, in_word = [], 0, False
        for token, piece in zip(ids, self.pieces(ids), strict=True):
            if token == EOS or self.is_tag(token):
                word_ids.append(-1)
                continue
            word_id = None
            for character in self._surface(piece):
                num_words += character != " " and not in_word
                in_word = character != " "
                word_id = num_words - 1 if word_id is None and in_word else word_id
            word_ids.append(num_words if word_id is None else word_id)  # a space belongs to the word after it
        return [min(word_id, num_words - 1) for word_id in word_ids]

    def _surface(self, piece: str) -> str:
        """The text of a subword token, with spaces."""
        if self.file_name == CODES_FILE_NAME:
            continues = piece.endswith(subword_nmt.CONTINUATION_MARKER)
            return piece.removesuffix(subword_nmt.CONTINUATION_MARKER) if continues else piece + " "
        return " " if piece == "<0x20>" else piece.replace(SPACE, " ")

    def save(self, folder: epath.PathLike, name: str = "") -> None:
        """Writes the model into `folder` atomically as `name`, or as `file_name` in place of the other kind."""
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / (name or self.file_name), self._model)
        for other in FILE_NAMES if not name else ():
            if other != self.file_name:
                (folder / other).unlink(missing_ok=True)


def load(path: epath.PathLike) -> Tokenizer:
    """Reads a model file, or the one in a folder that `Tokenizer.save` wrote.

    Raises:
      UserError: the file is missing or is not a vocabulary.
    """
    path = epath.Path(path)
    with user_error_on_oserror(str(path)):
        if path.is_dir():
            path = _model_path(path)
        return Tokenizer(_read(path, str(path), "a SentencePiece model"), str(path))


def _read(path: epath.Path, where: str, expected: str) -> bytes:
    """The bytes of a file; errors begin with `where`."""
    with user_error_on_oserror(where):
        reject_pipe(path)
        if not path.exists():
            raise UserError(f"{where}: expected {expected}, but the file is missing; restore it or name another")
        return path.read_bytes()


def exists(folder: epath.PathLike) -> bool:
    """Whether the folder holds a saved tokenizer."""
    return _model_path(epath.Path(folder)).exists()


def _model_path(folder: epath.Path) -> epath.Path:
    paths = [folder / name for name in FILE_NAMES]
    return next((path for path in paths if path.exists()), paths[0])


def load_configured(data: DataConfig) -> Tokenizer | None:
    """The model whose path the config names; None if the vocabulary is made from training text.

    Raises:
      UserError: the model or the file of merges is missing or invalid, or the model's size is not that of the config.
    """
    if data.tokenizer in TOKENIZER_ALGORITHMS:
        return None
    if data.tokenizer.endswith(".codes"):
        _read_merges(data)
        return None
    return check_tags(check_vocab_size(load(data.tokenizer), data), data)


def inherit_tokenizer(config: Config) -> DataConfig:
    """The data section, with the tokenizer of the run in `train.init_from`, if that is set.

    Raises:
      UserError: that folder has no tokenizer.
    """
    if not config.train.init_from:
        return config.data
    where = f"config.train.init_from = {config.train.init_from}"
    if reason := object_storage.unsupported_reason(config.train.init_from):
        raise UserError(f"{where}: {reason}")
    path = _model_path(epath.Path(config.train.init_from) / "tokenizer")
    with user_error_on_oserror(where):
        if not path.exists():
            raise UserError(
                f"{where}: expected a workdir that train.py wrote, but tokenizer/{path.name} is missing in it; "
                "name another"
            )
    return dataclasses.replace(config.data, tokenizer=os.fspath(path))


def cache_key(data: DataConfig) -> str:
    """Identifies the vocabulary that a config makes from a given text."""
    mixed = ""
    if data.mixture:  # tags are tokens, weights say how much text of each entry there is
        parts = [[entry.weight, *mixture.tags_of(entry)] for entry in data.mixture]
        mixed = f"-{hashlib.sha256(repr([data.mixture_temperature, parts]).encode()).hexdigest()[:24]}"
    if data.tokenizer.endswith(".codes"):
        return f"codes-{hashlib.sha256(repr(_read_merges(data)).encode()).hexdigest()[:24]}{mixed}"
    return f"{data.tokenizer}-{data.vocab_size}-{FORMAT_VERSION}{mixed}"


def build(data: DataConfig, lines: Collection[str]) -> Tokenizer:
    """Builds the vocabulary from training text: trains it, or applies the merges that the config names.

    Args:
      data: section of the config.
      lines: sentences of training.

    Raises:
      UserError: the size of the config cannot be reached.
    """
    if data.tokenizer.endswith(".codes"):
        model = subword_nmt.build_vocabulary(_read_merges(data), lines, mixture.tags(data))
        return check_vocab_size(Tokenizer(model), data)
    return train(lines, data.vocab_size, data.tokenizer, mixture.tags(data))


def _read_merges(data: DataConfig) -> subword_nmt.Merges:
    path = epath.Path(data.tokenizer)
    codes = _read(path, f"config.data.tokenizer = {path}", "codes of subword-nmt")
    try:
        return subword_nmt.parse(codes.decode(), str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected codes of subword-nmt in UTF-8, got other bytes: {error}") from error


def check_vocab_size(tokenizer: Tokenizer, data: DataConfig) -> Tokenizer:
    """Returns the tokenizer, or raises a UserError if its size is not that of the config."""
    if tokenizer.vocab_size != data.vocab_size:
        raise UserError(
            f"config.data.vocab_size = {data.vocab_size}, but {data.tokenizer} has {tokenizer.vocab_size} tokens; "
            f"set data.vocab_size = {tokenizer.vocab_size}"
        )
    return tokenizer


def check_tags(tokenizer: Tokenizer, data: DataConfig) -> Tokenizer:
    """Returns the tokenizer, or raises a UserError if it lacks a tag of the config's mixture."""
    for tag in mixture.tags(data):
        try:
            tokenizer.tag_id(tag)
        except UserError as error:
            raise UserError(f"config.data.tokenizer = {data.tokenizer}: {error}") from error
    return tokenizer


def train(lines: Collection[str], vocab_size: int, model_type: str, tags: Sequence[str] = ()) -> Tokenizer:
    """Trains a SentencePiece model of `vocab_size` tokens with byte fallback.

    Text is not normalized, so that decoding restores what was encoded, up to repeated spaces. The result depends on
    the lines and their order alone.

    Args:
      lines: sentences of both languages of the training split; iterated over twice.
      vocab_size: the number of tokens, including the four special ids and the 256 bytes.
      model_type: bpe or unigram.
      tags: tokens that no text gives.

    Raises:
      UserError: the vocabulary is too large for so little text, or too small for the alphabet.
    """
    info, model = _inspect(lines), io.BytesIO()
    if info.num_skipped:
        log_info(
            f"warning: {info.num_skipped:,} of {len(lines):,} lines of training text have over {MAX_LINE_BYTES:,} "
            "bytes: the vocabulary is trained without them"
        )
    if not info.has_text:
        raise UserError(
            f"config.data: cannot train a vocabulary: expected training text, but all {len(lines):,} lines are "
            f"blank or have over {MAX_LINE_BYTES:,} bytes; check the files"
        )
    options: dict[str, Any] = {"max_sentence_length": MAX_LINE_BYTES} if info.longest > DEFAULT_MAX_LINE_BYTES else {}
    if tags:
        options["control_symbols"] = list(tags)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line.replace(RESERVED, " ") for line in lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            byte_fallback=True,
            character_coverage=_coverage(info.characters, vocab_size),
            normalization_rule_name="identity",
            pad_id=PAD,
            bos_id=BOS,
            eos_id=EOS,
            unk_id=UNK,
            input_sentence_size=MAX_TRAINING_LINES[model_type],
            shuffle_input_sentence=True,
            num_threads=1,
            minloglevel=2,
            **options,
        )
    except (RuntimeError, OSError) as error:
        reason = str(error).split("] ")[-1].replace(OPTION_HINT, "Raise data.vocab_size.") or str(error)
        raise UserError(
            f"config.data.vocab_size = {vocab_size}: cannot train a {model_type} vocabulary on this data: {reason}"
        ) from error
    return Tokenizer(model.getvalue())


class _TextInfo(NamedTuple):
    """Facts about training text.

    Attributes:
      longest: bytes of the longest line.
      num_skipped: lines that are too long.
      has_text: whether any other line is not blank.
      characters: counts in MAX_COUNTED_LINES lines, evenly spread, or in all if there are fewer.
    """

    longest: int
    num_skipped: int
    has_text: bool
    characters: collections.Counter[str]


def _inspect(lines: Collection[str]) -> _TextInfo:
    count, longest, num_skipped, has_text = len(lines), 0, 0, False
    characters: collections.Counter[str] = collections.Counter()
    for number, line in enumerate(lines):
        size = len(line) if line.isascii() else len(line.encode())
        longest = max(longest, size)
        num_skipped += size > MAX_LINE_BYTES
        has_text = has_text or (size <= MAX_LINE_BYTES and not line.isspace() and line != "")
        if count <= MAX_COUNTED_LINES or number * MAX_COUNTED_LINES % count < MAX_COUNTED_LINES:
            characters.update(line)
    return _TextInfo(longest, num_skipped, has_text, characters)


def _coverage(counts: collections.Counter[str], vocab_size: int) -> float:
    """The share of text whose characters become tokens: 1 if they take at most 3/4 of the vocabulary.

    Otherwise rare characters are encoded as bytes, so that scripts with thousands of characters fit too.
    """
    max_characters = max(3 * (vocab_size - NUM_FIXED) // 4, 1)
    if len(counts) <= max_characters:
        return 1.0
    return max(sum(count for _, count in counts.most_common(max_characters)) / counts.total(), MIN_COVERAGE)


def _id_tables(processor: sentencepiece.SentencePieceProcessor) -> tuple[np.ndarray, np.ndarray]:
    """Tables from the model's ids to those used here, and back; the latter begin with pad, bos, eos, unk.

    A special token that the model lacks gets its id nevertheless, and decodes as unk.
    Example: a model of <unk> <s> </s> a b, without <pad>, has to_sp = [0 1 2 0 3 4], from_sp = [3 1 2 4 5].
    """
    unk = processor.unk_id()
    specials = [processor.pad_id(), processor.bos_id(), processor.eos_id(), unk]
    others = [i for i in range(processor.vocab_size()) if i not in specials]
    to_sp = np.array([unk if i < 0 else i for i in specials] + others, np.int32)
    from_sp = np.zeros(processor.vocab_size(), np.int32)
    from_sp[to_sp[::-1]] = np.arange(len(to_sp), dtype=np.int32)[::-1]
    from_sp[unk] = UNK
    return from_sp, to_sp
