"""The vocabulary of a run: that of its checkpoints, the one that the config names, or one trained on its corpus."""

import itertools
from collections.abc import Collection, Iterator

import numpy as np
from etils import epath

from transformer.config import DataConfig, mixture
from transformer.data import prepared, tfds_builders
from transformer.data import tokenizer as tokenizers
from transformer.data.corpus import Corpus
from transformer.data.mixture_corpus import MixtureCorpus
from transformer.data.tokenizer import MAX_TRAINING_LINES, TOKENIZER_ALGORITHMS, Tokenizer
from transformer.runtime import progress
from transformer.runtime.errors import UserError
from transformer.runtime.files import sha256
from transformer.runtime.logging import log_info


def get_tokenizer(data: DataConfig, corpus: Corpus | MixtureCorpus, stored: epath.Path) -> Tokenizer:
    """The tokenizer of a run without a checkpoint: made from config and corpus, replacing another in `stored`."""
    tokenizer = get_or_train_tokenizer(data, corpus)
    path = stored / tokenizer.file_name
    if path.exists() and sha256(path) == tokenizer.digest:
        return tokenizer
    if tokenizers.exists(stored):
        log_info(f"{stored}: replacing the vocabulary: no checkpoint uses it, and the config specifies another")
    tokenizer.save(stored)
    return tokenizer


def get_or_train_tokenizer(data: DataConfig, corpus: Corpus | MixtureCorpus) -> Tokenizer:
    """The tokenizer that the config names, or else that of the corpus, cached beside the prepared data."""
    if configured := tokenizers.load_configured(data):
        return configured
    digest, languages = corpus.train.digest, (corpus.source_language, corpus.target_language)
    key = tokenizers.cache_key(data)
    folder = prepared.cache_folder(tfds_builders.data_dir(data), "vocabularies", digest, languages, key)
    with prepared.synchronize_cache(folder):
        for path in sorted(folder.glob("*.model")):
            if sha256(path) == path.stem:
                return tokenizers.check_vocab_size(tokenizers.load(path), data)
            log_info(f"{path}: damaged; training the vocabulary again")
            path.unlink()
        training = f"training a {data.tokenizer} vocabulary of {data.vocab_size:,} subword tokens"
        log_info(training)
        with progress.phase(training):
            trained = tokenizers.build(data, VocabularyText(data, corpus))
        trained.save(folder, f"{trained.digest}.model")
    return trained


def check_same_tokenizer(
    data: DataConfig, corpus: Corpus | MixtureCorpus, stored: epath.Path, trained: Tokenizer
) -> Tokenizer:
    """Returns the tokenizer of the checkpoints, which must be that of the workdir and the config.

    Raises:
      UserError: the workdir's tokenizer is missing or another one, or the config names another.
    """
    # A file of merges is applied to the corpus: other merges may give a vocabulary of the same size.
    is_merges = data.tokenizer.endswith(".codes")
    configured = get_or_train_tokenizer(data, corpus) if is_merges else tokenizers.load_configured(data) or trained
    if configured.digest != trained.digest:
        raise UserError(
            f"config.data.tokenizer = {data.tokenizer}: is not the vocabulary of the run in {stored.parent}: expected "
            f"the digest {trained.digest[:16]}, got {configured.digest[:16]}. Name that "
            "vocabulary, or choose another workdir"
        )
    path = stored / trained.file_name
    digest = sha256(path) if path.exists() else "missing"
    if digest == trained.digest:
        return trained
    raise UserError(
        f"{stored}: the vocabulary of this workdir is missing or not the one its checkpoints were trained with: "
        f"expected the digest {trained.digest[:16]}, got {digest[:16]}; copy tokenizer/{trained.file_name} back "
        "from the newest checkpoint"
    )


class VocabularyText(Collection[str]):
    """Sentences of training, source and target in turn: all of them, or a sample for a large corpus, evenly spread.

    Of a mixture each entry has its share: one with a greater share than of pairs is repeated, one with less is thinned
    out evenly. Merges of subword-nmt get all pairs once, as the vocabulary is then all subword tokens of the text.
    """

    def __init__(self, data: DataConfig, corpus: Corpus | MixtureCorpus):
        self._splits = corpus.train.splits if isinstance(corpus, MixtureCorpus) else [corpus.train]
        self._counts = sizes = list(map(len, self._splits))
        if data.tokenizer in TOKENIZER_ALGORITHMS:
            most = min(MAX_TRAINING_LINES[data.tokenizer] // 2, sum(sizes))
            shares = mixture.shares(data, sizes) if data.mixture else [1.0]
            self._counts = [max(round(share * most), 1) for share in shares]
            if most < sum(sizes):
                log_info(f"the vocabulary is trained on {len(self):,} of {2 * sum(sizes):,} lines")

    def __len__(self) -> int:
        return 2 * sum(self._counts)

    def __iter__(self) -> Iterator[str]:
        for split, count in zip(self._splits, self._counts, strict=True):
            size = len(split)
            pairs = split if count == size else split.select(np.arange(count) * size // count)
            yield from itertools.chain.from_iterable(pairs)

    def __contains__(self, line: object) -> bool:
        return any(line == other for other in self)
