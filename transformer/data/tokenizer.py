"""Text ↔ ids by SentencePiece or by codes of subword-nmt; the only owner of the ids of pad, bos, eos and unk.

The same model serves both languages. Special ids are always 0 … 3: a model trained elsewhere is
renumbered to fit. Padding is an id of its own, so that a loss mask never hides an unknown token.
"""

import collections
import dataclasses
import hashlib
import io
import os
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import sentencepiece
from etils import epath

from transformer.config.schema import TRAINED_TOKENIZERS, Config, DataConfig
from transformer.data import subword_nmt
from transformer.runtime import object_storage
from transformer.runtime.errors import UserError
from transformer.runtime.files import refuse_pipe, reported, write_whole
from transformer.runtime.logging import say

PAD, BOS, EOS, UNK = range(4)
SPACE = "\u2581"  # how SentencePiece writes a space
FILE_NAME = "sentencepiece.model"
CODES_FILE_NAME = "subword_nmt.json"
FILE_NAMES = (FILE_NAME, CODES_FILE_NAME)
RECIPE = 2  # goes up whenever `train` comes to make another model of the same lines
NUM_FIXED = 4 + 256  # special ids and bytes
OPTION_HINT = "Increase vocab_size or decrease character_coverage with --character_coverage option."
LEAST_COVERAGE = 0.98  # SentencePiece takes no less
COUNTED_LINES = 200_000  # enough to know an alphabet by
SAMPLED_LINES = 2_000_000
# SentencePiece leaves longer lines out, in bytes. Its usual limit stays unset where it leaves out none: the model file
# would differ.
USUAL_LINE, LONGEST_LINE = 4192, 65_536
RESERVED = "\u2585"  # SentencePiece leaves out lines with it


class Tokenizer:
    """A trained SentencePiece model, or codes with their vocabulary; safe to pickle and to share between threads.

    Attributes:
      vocab_size: ids are 0 … vocab_size - 1.
      digest: sha256 of the model, by which a vocabulary is recognised.
      file_name: of FILE_NAMES, by which it is saved.
    """

    def __init__(self, model: bytes, path: str = FILE_NAME):
        self._model = model
        self._processor: Any
        if model.startswith(b"{"):  # what no SentencePiece model does
            self.file_name, self._processor = CODES_FILE_NAME, subword_nmt.load(model, path)
        else:
            self.file_name, self._processor = FILE_NAME, sentencepiece.SentencePieceProcessor()
            try:
                self._processor.LoadFromSerializedProto(model)
            except (RuntimeError, OSError) as error:
                raise UserError(f"{path}: expected a SentencePiece model, got something else: {error}") from error
        self.digest = hashlib.sha256(model).hexdigest()
        self._to_ours, self._to_theirs = _renumber(self._processor)
        self.vocab_size = len(self._to_theirs)

    def __getstate__(self) -> bytes:
        return self._model

    def __setstate__(self, model: bytes) -> None:
        self.__init__(model)  # type: ignore[misc]

    def encode(self, lines: Sequence[str]) -> list[np.ndarray]:
        """Each line as int32 ids ending in EOS; no line gets special ids otherwise, whatever its text."""
        return [np.append(self._to_ours[ids], np.int32(EOS)) for ids in self._processor.encode(list(lines))]

    def decode(self, ids: Iterable[int]) -> str:
        """One line of text of the ids up to the first EOS; line breaks that the model spelled out become spaces.

        A CR at the end is left out: it would read as part of the line's end.
        """
        theirs = []
        for token in ids:
            if token == EOS:
                break
            if token not in (PAD, BOS):
                theirs.append(int(self._to_theirs[token]))
        return re.sub("\r?\n|\0", " ", self._processor.decode(theirs)).rstrip("\r")

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The written form of each id."""
        return [self._processor.id_to_piece(int(self._to_theirs[token])) for token in ids]

    def words(self, ids: Sequence[int]) -> list[int]:
        """The number of the word that each id is part of, from 0; words are what spaces separate, EOS is none: -1."""
        numbers, count, inside = [], 0, False
        for token, piece in zip(ids, self.pieces(ids), strict=True):
            if token == EOS:
                numbers.append(-1)
                continue
            number = None
            for character in self._spelled(piece):
                count += character != " " and not inside
                inside = character != " "
                number = count - 1 if number is None and inside else number
            numbers.append(count if number is None else number)  # a space belongs to the word after it
        return [min(number, count - 1) for number in numbers]

    def _spelled(self, piece: str) -> str:
        """What a piece adds to the text, with spaces as such."""
        if self.file_name == CODES_FILE_NAME:
            joined = piece.endswith(subword_nmt.JOINER)
            return piece.removesuffix(subword_nmt.JOINER) if joined else piece + " "
        return " " if piece == "<0x20>" else piece.replace(SPACE, " ")

    def save(self, folder: epath.PathLike, name: str = "") -> None:
        """Writes the model into `folder`, whole or not at all; under its `file_name` in place of any other kind."""
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / (name or self.file_name), self._model)
        for other in FILE_NAMES if not name else ():
            if other != self.file_name:
                (folder / other).unlink(missing_ok=True)


def cut(ids: np.ndarray, longest: int) -> np.ndarray:
    """The first `longest` tokens of a sentence, EOS last."""
    return ids if len(ids) <= longest else np.append(ids[: longest - 1], np.int32(EOS))


def load(path: epath.PathLike) -> Tokenizer:
    """Reads a model file, or the one in a folder that `Tokenizer.save` wrote.

    Raises:
      UserError: there is none, or it is no vocabulary. It is never trained anew here.
    """
    path = epath.Path(path)
    with reported(str(path)):
        if path.is_dir():
            path = _stored(path)
        refuse_pipe(path)
        if not path.exists():
            raise UserError(f"{path}: expected a SentencePiece model, found no file; restore it or name another")
        model = path.read_bytes()
    return Tokenizer(model, str(path))


def is_in(folder: epath.PathLike) -> bool:
    """Whether `Tokenizer.save` wrote into this folder."""
    return _stored(epath.Path(folder)).exists()


def _stored(folder: epath.Path) -> epath.Path:
    paths = [folder / name for name in FILE_NAMES]
    return next((path for path in paths if path.exists()), paths[0])


def named_by(data: DataConfig) -> Tokenizer | None:
    """The model whose path the config names; None if one is to be trained, or codes want a vocabulary.

    Raises:
      UserError: it is missing, is no model, or has another size than the config says; no codes.
    """
    if data.tokenizer in TRAINED_TOKENIZERS:
        return None
    if data.tokenizer.endswith(".codes"):
        _merges(data)
        return None
    return of_size(load(data.tokenizer), data)


def with_origin(config: Config) -> DataConfig:
    """The data section, which names the vocabulary of the run that `train.init_from` starts from, if it does.

    Raises:
      UserError: there is no vocabulary in that folder.
    """
    if not config.train.init_from:
        return config.data
    where = f"config.train.init_from = {config.train.init_from}"
    if reason := object_storage.missing(config.train.init_from):
        raise UserError(f"{where}: {reason}")
    path = _stored(epath.Path(config.train.init_from) / "tokenizer")
    with reported(where):
        if not path.exists():
            raise UserError(
                f"{where}: expected a workdir that train.py wrote, found no tokenizer/{path.name} in it; name another"
            )
    return dataclasses.replace(config.data, tokenizer=os.fspath(path))


def recipe(data: DataConfig) -> str:
    """What tells apart the vocabularies that configs make of the same text."""
    if data.tokenizer.endswith(".codes"):
        return f"codes-{hashlib.sha256(repr(_merges(data)).encode()).hexdigest()[:24]}"
    return f"{data.tokenizer}-{data.vocab_size}-{RECIPE}"


def make(data: DataConfig, lines: Collection[str]) -> Tokenizer:
    """The vocabulary of training text: trained on it, or what the codes that the config names make of it.

    Raises:
      UserError: it cannot have the size that the config says.
    """
    if data.tokenizer.endswith(".codes"):
        return of_size(Tokenizer(subword_nmt.learn_vocabulary(_merges(data), lines)), data)
    return train(lines, data.vocab_size, data.tokenizer)


def _merges(data: DataConfig) -> subword_nmt.Merges:
    path = epath.Path(data.tokenizer)
    where = f"config.data.tokenizer = {path}"
    with reported(where):
        refuse_pipe(path)
        if not path.exists():
            raise UserError(f"{where}: expected codes of subword-nmt, found no file; name another")
        codes = path.read_bytes()
    try:
        return subword_nmt.parse(codes.decode(), str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected codes of subword-nmt in UTF-8, got other bytes: {error}") from error


def of_size(tokenizer: Tokenizer, data: DataConfig) -> Tokenizer:
    """The same tokenizer, or a UserError if the config says another size."""
    if tokenizer.vocab_size != data.vocab_size:
        raise UserError(
            f"config.data.vocab_size = {data.vocab_size}, but {data.tokenizer} has {tokenizer.vocab_size} pieces; "
            f"set data.vocab_size = {tokenizer.vocab_size}"
        )
    return tokenizer


def train(lines: Collection[str], vocab_size: int, model_type: str) -> Tokenizer:
    """Trains a model of `vocab_size` pieces, bytes as fallback for what it has not seen.

    Text is taken as it is, without Unicode normalisation, so that decoding gives back what was
    encoded up to repeated spaces. The result depends on the lines and their order alone.

    Args:
      lines: sentences of both languages of the training split; gone through twice.
      vocab_size: pieces, the four special ids and the 256 bytes included.
      model_type: bpe or unigram.

    Raises:
      UserError: there is too little text, or too much of an alphabet, for such a vocabulary.
    """
    survey, model = _survey(lines), io.BytesIO()
    if survey.left_out:
        say(
            f"warning: {survey.left_out:,} of {len(lines):,} lines of training text have over {LONGEST_LINE:,} bytes: "
            "left out of the text that the vocabulary is trained on"
        )
    if len(lines) > SAMPLED_LINES:
        say(f"the vocabulary is trained on {SAMPLED_LINES:,} of {len(lines):,} lines, drawn at random")
    if not survey.has_text:
        raise UserError(
            f"config.data: cannot train a vocabulary: expected training text, got {len(lines):,} lines, none of them "
            f"with text and at most {LONGEST_LINE:,} bytes; check the files"
        )
    longer: dict[str, Any] = {"max_sentence_length": LONGEST_LINE} if survey.longest > USUAL_LINE else {}
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line.replace(RESERVED, " ") for line in lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            byte_fallback=True,
            character_coverage=_coverage(survey.characters, vocab_size),
            normalization_rule_name="identity",
            pad_id=PAD,
            bos_id=BOS,
            eos_id=EOS,
            unk_id=UNK,
            input_sentence_size=SAMPLED_LINES,
            shuffle_input_sentence=True,
            num_threads=1,
            minloglevel=2,
            **longer,
        )
    except (RuntimeError, OSError) as error:
        reason = str(error).split("] ")[-1].replace(OPTION_HINT, "Raise data.vocab_size.") or str(error)
        raise UserError(
            f"config.data.vocab_size = {vocab_size}: cannot train a {model_type} vocabulary on this data: {reason}"
        ) from error
    return Tokenizer(model.getvalue())


class _Survey(NamedTuple):
    """What lines a vocabulary is to be trained on.

    Attributes:
      longest: bytes of the longest line.
      left_out: how many are too long.
      has_text: whether any other line is not blank.
      characters: how often each occurs in COUNTED_LINES lines, evenly spread, or in all if there are fewer.
    """

    longest: int
    left_out: int
    has_text: bool
    characters: collections.Counter[str]


def _survey(lines: Collection[str]) -> _Survey:
    count, longest, left_out, has_text = len(lines), 0, 0, False
    characters: collections.Counter[str] = collections.Counter()
    for number, line in enumerate(lines):
        size = len(line) if line.isascii() else len(line.encode())
        longest = max(longest, size)
        left_out += size > LONGEST_LINE
        has_text = has_text or (size <= LONGEST_LINE and not line.isspace() and line != "")
        if count <= COUNTED_LINES or number * COUNTED_LINES % count < COUNTED_LINES:
            characters.update(line)
    return _Survey(longest, left_out, has_text, characters)


def _coverage(counts: collections.Counter[str], vocab_size: int) -> float:
    """The share of text whose characters get pieces of their own: all of it, if they fill under 3/4 of the vocabulary.

    Else rare ones are spelled in bytes, so that scripts of thousands of characters fit too.
    """
    room = max(3 * (vocab_size - NUM_FIXED) // 4, 1)
    if len(counts) <= room:
        return 1.0
    return max(sum(count for _, count in counts.most_common(room)) / counts.total(), LEAST_COVERAGE)


def _renumber(processor: sentencepiece.SentencePieceProcessor) -> tuple[np.ndarray, np.ndarray]:
    """Tables from the model's ids to ours and back; ours begin with pad, bos, eos, unk.

    A special piece that the model lacks gets our id all the same, and stands for unk in its text.
    """
    unk = processor.unk_id()
    specials = [processor.pad_id(), processor.bos_id(), processor.eos_id(), unk]
    others = [i for i in range(processor.vocab_size()) if i not in specials]
    to_theirs = np.array([unk if i < 0 else i for i in specials] + others, np.int32)
    to_ours = np.zeros(processor.vocab_size(), np.int32)
    to_ours[to_theirs[::-1]] = np.arange(len(to_theirs), dtype=np.int32)[::-1]
    to_ours[unk] = UNK
    return to_ours, to_theirs
