"""What is in the data: counts, lengths, duplicates, and how much of the test sentences training has seen."""

import array
import dataclasses
import re

import numpy as np
from rich.console import Console
from rich.table import Table

from transformer.config import Config
from transformer.data.batching import Ragged, TrainPlan
from transformer.data.corpus import Split, hash64
from transformer.data.input_pipeline import TokenIds
from transformer.data.tokenizer import UNK, Tokenizer
from transformer.runtime.logging import told

PERCENTILES = (50, 95, 99, 100)
WIDTH = 110  # of the tables where the terminal does not say

_TOKENS = 1 << 24  # counted at a time
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclasses.dataclass(frozen=True)
class Texts:
    """What one reading of a split finds: words of each side, and hashes of pairs and source sentences, [N] uint64."""

    words: tuple[int, int]
    pair_hashes: np.ndarray
    source_hashes: np.ndarray

    @property
    def duplicates(self) -> int:
        """Pairs that have occurred before."""
        return len(self.pair_hashes) - len(np.unique(self.pair_hashes))

    def sources_in(self, other: "Texts") -> int:
        """How many of the source sentences occur in another split, letter for letter."""
        return int(np.isin(self.source_hashes, other.source_hashes).sum())


def read_texts(split: Split) -> Texts:
    """Reads a split; words are what stands between spaces."""
    words = [0, 0]
    pair_hashes, source_hashes = array.array("Q"), array.array("Q")
    for pair in told(split, lambda count: f"report: read {count:,} of {len(split):,} pairs of {split.name}"):
        for side in (0, 1):
            words[side] += len(pair[side].split())
        source, target = pair[0].encode(), pair[1].encode()
        source_hashes.append(hash64(source))
        pair_hashes.append(hash64(b"%d " % len(source) + source + target))
    return Texts((words[0], words[1]), np.array(pair_hashes, np.uint64), np.array(source_hashes, np.uint64))


@dataclasses.dataclass(frozen=True)
class Tokens:
    """One side of a split in tokens, the end of each sentence not counted.

    Attributes:
      total: all of them.
      unknown, spelled: those that stand for something unknown, and those that are one byte of it.
      lengths: of a sentence at each of PERCENTILES.
    """

    total: int
    unknown: int
    spelled: int
    lengths: tuple[int, ...]


def count_tokens(ids: Ragged, tokenizer: Tokenizer) -> Tokens:
    """Counts, piece by piece so that the ids may be more than memory holds."""
    kinds = np.array([2 if _BYTE.fullmatch(piece) else 0 for piece in tokenizer.pieces(range(tokenizer.vocab_size))])
    kinds[UNK] = 1
    counts = np.zeros(3, np.int64)
    for start in range(0, len(ids.flat), _TOKENS):
        counts += np.bincount(kinds[ids.flat[start : start + _TOKENS]], minlength=3)
    lengths = np.percentile(ids.lengths - 1, PERCENTILES, method="higher") if len(ids) else [0] * len(PERCENTILES)
    return Tokens(len(ids.flat) - len(ids), int(counts[1]), int(counts[2]), tuple(int(n) for n in lengths))


def show(
    config: Config,
    splits: dict[str, Split],
    ids: dict[str, TokenIds],
    plan: TrainPlan,
    blank: int,
    tokenizer: Tokenizer,
) -> None:
    """Prints the report on stdout.

    Args:
      config: of the run.
      splits, ids: by name, "train" among them.
      plan: of the training batches.
      blank: training pairs that are left out because a side is blank.
      tokenizer: the one that made the ids.
    """
    console = Console(width=None if Console().is_terminal else WIDTH, markup=False, highlight=False, emoji=False)
    order = sorted(splits, key=lambda name: (name != "train", name != "validation", name))
    texts = {name: read_texts(splits[name]) for name in order}
    console.print(_pairs_table(config, texts, ids, plan, blank))
    console.print(_tokens_table(config, texts, ids, tokenizer))
    epochs = config.train.num_steps / plan.steps_per_epoch
    console.print(
        f"{plan.steps_per_epoch:,} steps an epoch, {plan.fill:.1%} of their target slots filled; train.num_steps = "
        f"{config.train.num_steps:,} are {epochs:,.1f} epochs"
    )


def _pairs_table(
    config: Config, texts: dict[str, Texts], ids: dict[str, TokenIds], plan: TrainPlan, blank: int
) -> Table:
    table = Table(title="Sentence pairs")
    table.add_column("split")
    columns = ("pairs", "blank, left out", f"over {config.data.max_length} tokens", "duplicates", "source in training")
    for name in columns:
        table.add_column(name, justify="right")
    for name, text in texts.items():
        source, target = ids[name]
        train, count = name == "train", len(source)
        long = int(((source.lengths > config.data.max_length) | (target.lengths > config.data.max_length)).sum())
        seen = "" if train else _share(text.sources_in(texts["train"]), count)
        too_long = f"{plan.dropped:,} dropped" if train else f"{long:,} kept"
        table.add_row(name, f"{count:,}", f"{blank:,}" * train, too_long, _share(text.duplicates, count), seen)
    return table


def _tokens_table(config: Config, texts: dict[str, Texts], ids: dict[str, TokenIds], tokenizer: Tokenizer) -> Table:
    table = Table(title=f"Tokens of a vocabulary of {tokenizer.vocab_size:,}, without the ends of sentences")
    for name in ("split", "side"):
        table.add_column(name)
    lengths = [{50: "median", 100: "longest"}.get(percent, f"{percent}%") for percent in PERCENTILES]
    for name in ("tokens", "per word", "in bytes", "unknown", *lengths):
        table.add_column(name, justify="right")
    for name, text in texts.items():
        languages = (config.data.source_language, config.data.target_language)
        for language, words, side in zip(languages, text.words, ids[name], strict=True):
            tokens = count_tokens(side, tokenizer)
            rates = [f"{n / max(tokens.total, 1):.3%}" for n in (tokens.spelled, tokens.unknown)]
            per_word = f"{tokens.total / max(words, 1):.2f}"
            table.add_row(name, language, f"{tokens.total:,}", per_word, *rates, *(f"{n:,}" for n in tokens.lengths))
    return table


def _share(count: int, of: int) -> str:
    return f"{count:,} ({count / max(of, 1):.1%})"
