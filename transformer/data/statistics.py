"""Data statistics: counts, lengths, duplicates, and the overlap of other splits with training."""

import array
import dataclasses
import re
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Column, Table

from transformer.config import Config, mixture
from transformer.data.batching import BatchSchedule, JaggedArray
from transformer.data.corpus import Corpus, Split
from transformer.data.input_pipeline import TokenIds
from transformer.data.mixture_corpus import MixtureCorpus
from transformer.data.mixture_schedule import MixtureSchedule
from transformer.data.shards import hash64, pair_hash
from transformer.data.tokenizer import UNK, Tokenizer
from transformer.runtime import progress

PERCENTILES = (50, 95, 99, 100)
TABLE_WIDTH = 110  # if stdout is not a terminal
NUM_EXAMPLES = 3  # of the pairs that each filter dropped
EXAMPLE_LENGTH = 80  # characters of each side of them

_CHUNK_TOKENS = 1 << 24
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclasses.dataclass(frozen=True)
class TextStats:
    """Word counts of each side of a split, and hashes of its pairs and source sentences, [N] uint64."""

    words: tuple[int, int]
    pair_hashes: np.ndarray
    source_hashes: np.ndarray

    @property
    def duplicates(self) -> int:
        """The number of pairs that occur earlier in the split."""
        return len(self.pair_hashes) - len(np.unique(self.pair_hashes))

    def sources_in(self, other: "TextStats") -> int:
        """The number of source sentences that occur verbatim in another split."""
        return int(np.isin(self.source_hashes, other.source_hashes).sum())


def read_texts(split: Split) -> TextStats:
    """Reads a split; words are separated by white space."""
    words = [0, 0]
    pair_hashes, source_hashes = array.array("Q"), array.array("Q")
    for pair in progress.track(split, f"report: reading {split.name}", len(split), "pairs"):
        for side in (0, 1):
            words[side] += len(pair[side].split())
        source_hashes.append(hash64(pair[0].encode()))
        pair_hashes.append(pair_hash(pair))
    return TextStats((words[0], words[1]), np.array(pair_hashes, np.uint64), np.array(source_hashes, np.uint64))


@dataclasses.dataclass(frozen=True)
class TokenStats:
    """Token counts of one side of a split, EOS excluded.

    Attributes:
      total: all tokens.
      unknown: UNK tokens.
      byte_fallback: tokens that are a single byte of a character outside the vocabulary.
      lengths: sentence lengths at PERCENTILES.
    """

    total: int
    unknown: int
    byte_fallback: int
    lengths: tuple[int, ...]


def count_tokens(ids: JaggedArray, tokenizer: Tokenizer) -> TokenStats:
    """Counts tokens, in chunks because the ids may not fit in memory."""
    kinds = np.array([2 if _BYTE.fullmatch(piece) else 0 for piece in tokenizer.pieces(range(tokenizer.vocab_size))])
    kinds[UNK] = 1
    counts = np.zeros(3, np.int64)
    for start in range(0, len(ids.flat), _CHUNK_TOKENS):
        counts += np.bincount(kinds[ids.flat[start : start + _CHUNK_TOKENS]], minlength=3)
    lengths = np.percentile(ids.lengths - 1, PERCENTILES, method="higher") if len(ids) else [0] * len(PERCENTILES)
    return TokenStats(len(ids.flat) - len(ids), int(counts[1]), int(counts[2]), tuple(int(n) for n in lengths))


def print_report(
    config: Config,
    splits: dict[str, Split],
    ids: dict[str, TokenIds],
    schedule: BatchSchedule,
    corpus: Corpus,
    tokenizer: Tokenizer,
) -> None:
    """Prints the report on stdout.

    Args:
      config: of the run.
      splits, ids: by name, including "train".
      schedule: the training batches.
      corpus: of the splits; knows what training left out.
      tokenizer: by which the ids were made.
    """
    console = Console(width=None if Console().is_terminal else TABLE_WIDTH, markup=False, highlight=False, emoji=False)
    order = sorted(splits, key=lambda name: (name != "train", name != "validation", name))
    texts = {name: read_texts(splits[name]) for name in order}
    console.print(_pairs_table(config, texts, ids, schedule, corpus.dropped))
    console.print(_tokens_table(config, texts, ids, tokenizer))
    _print_filters(console, corpus)
    epochs = config.train.num_steps / schedule.steps_per_epoch
    console.print(
        f"{schedule.steps_per_epoch:,} steps an epoch, {schedule.fill:.1%} of their target token positions filled; "
        f"train.num_steps = {config.train.num_steps:,} are {epochs:,.1f} epochs"
    )


def print_mixture_report(
    config: Config, corpus: MixtureCorpus, schedule: MixtureSchedule, tokenizer: Tokenizer
) -> None:
    """Prints on stdout what training takes of each entry of a mixture, and what filters drop.

    Args:
      config: of the run.
      corpus: of its mixture.
      schedule: the training batches.
      tokenizer: the vocabulary.
    """
    console = Console(width=None if Console().is_terminal else TABLE_WIDTH, markup=False, highlight=False, emoji=False)
    steps = config.train.num_steps
    examples = schedule.examples(steps)
    title = f"Entries of the mixture, in {steps:,} updates; a vocabulary of {tokenizer.vocab_size:,}"
    columns = ("pairs", "blank, left out", f"over {config.data.max_length} tokens", "share of examples", "epochs")
    table = _table(title, ("languages", "tags"), columns)
    for entry, own, kept, count in zip(config.data.mixture, corpus.corpora, schedule.pairs, examples, strict=True):
        pairs = len(own.split("train"))
        table.add_row(
            f"{entry.source_language}-{entry.target_language}",
            " ".join(mixture.tags_of(entry)),
            f"{pairs:,}",
            f"{own.dropped:,}",
            f"{pairs - kept:,} dropped",
            f"{count / sum(examples):.1%}",
            f"{count / kept:.1f}",
        )
    console.print(table)
    for own in corpus.corpora:
        _print_filters(console, own)
    console.print(f"{schedule.fill:.1%} of target token positions filled")


def _pairs_table(
    config: Config, texts: dict[str, TextStats], ids: dict[str, TokenIds], schedule: BatchSchedule, blank: int
) -> Table:
    columns = ("pairs", "blank, left out", f"over {config.data.max_length} tokens", "duplicates", "source in training")
    table = _table("Sentence pairs", ("split",), columns)
    for name, text in texts.items():
        source, target = ids[name]
        train, count = name == "train", len(source)
        long = int(((source.lengths > config.data.max_length) | (target.lengths > config.data.max_length)).sum())
        seen = "" if train else _percent(text.sources_in(texts["train"]), count)
        too_long = f"{schedule.dropped:,} dropped" if train else f"{long:,} kept"
        table.add_row(name, f"{count:,}", f"{blank:,}" * train, too_long, _percent(text.duplicates, count), seen)
    return table


def _print_filters(console: Console, corpus: Corpus) -> None:
    """What each filter dropped, if any is on, with a few examples."""
    if corpus.filters is None:
        return
    total = len(corpus.split("train")) + sum(corpus.filtered.values())
    table = _table(f"Filters of {total:,} training pairs, each after those above it", ("filter", "drops"), ("pairs",))
    for name, rule in corpus.filters.active().items():
        table.add_row(name, rule, _percent(corpus.filtered[name], total))
    console.print(table)
    for name in corpus.filters.active():
        for source, target in corpus.filtered_examples(name, NUM_EXAMPLES):
            console.print(f"{name}: {_shorten(source)} → {_shorten(target)}", soft_wrap=True)


def _shorten(text: str) -> str:
    """The beginning of a text, in which characters that do not print are escaped."""
    begin = text if len(text) <= EXAMPLE_LENGTH else f"{text[:EXAMPLE_LENGTH]}…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in begin)


def _tokens_table(config: Config, texts: dict[str, TextStats], ids: dict[str, TokenIds], tokenizer: Tokenizer) -> Table:
    lengths = [{100: "longest"}.get(percent, f"{percent}%") for percent in PERCENTILES]
    title = f"Tokens of a vocabulary of {tokenizer.vocab_size:,}, without the ends of sentences"
    table = _table(title, ("split", "side"), ("tokens", "per word", "in bytes", "unknown", *lengths))
    for name, text in texts.items():
        languages = (config.data.source_language, config.data.target_language)
        for language, words, side in zip(languages, text.words, ids[name], strict=True):
            tokens = count_tokens(side, tokenizer)
            rates = [f"{n / max(tokens.total, 1):.3%}" for n in (tokens.byte_fallback, tokens.unknown)]
            per_word = f"{tokens.total / max(words, 1):.2f}"
            table.add_row(name, language, f"{tokens.total:,}", per_word, *rates, *(f"{n:,}" for n in tokens.lengths))
    return table


def _table(title: str, names: Sequence[str], numbers: Sequence[str]) -> Table:
    """A table with columns of text, then of numbers."""
    columns = [*(Column(name) for name in names), *(Column(name, justify="right") for name in numbers)]
    return Table(*columns, title=title)


def _percent(count: int, total: int) -> str:
    return f"{count:,} ({count / max(total, 1):.1%})"
