"""Minimum Bayes risk decoding: the expected chrF of each of several translations (Kumar and Byrne, 2004).

The utility is the chrF of sacreBLEU (Popović, 2015). Samples of the model serve as pseudo-references, so the mean over
them, each also compared with itself, estimates the expected utility (Eikema and Aziz, 2020).

M translations of one sentence, U different n-grams in them.
"""

from collections.abc import Sequence

import numpy as np

ORDER, BETA = 6, 2  # chrF2, as sacreBLEU by default


def expected_chrf(texts: Sequence[str]) -> np.ndarray:
    """The mean chrF of each text against all of them, float64 [M], 0 to 100."""
    return pairwise_chrf(texts).mean(axis=1)


def pairwise_chrf(texts: Sequence[str]) -> np.ndarray:
    """Sentence chrF of text i as translation against text j as reference, float64 [M, M]."""
    squeezed = ["".join(text.split()) for text in texts]
    distinct = sorted(set(squeezed))
    precision, recall, orders = (np.zeros((len(distinct), len(distinct))) for _ in range(3))
    for order in range(1, ORDER + 1):
        counts_MU = _ngram_counts(distinct, order)
        total_M = counts_MU.sum(axis=1)
        match_MM = np.stack([np.minimum(counts_MU, row_U).sum(axis=1) for row_U in counts_MU], axis=1)
        # An order for which either text is too short is skipped.
        both_MM = (total_M[:, None] > 0) & (total_M[None, :] > 0)
        precision += np.where(both_MM, match_MM / np.maximum(total_M, 1)[:, None], 0.0)
        recall += np.where(both_MM, match_MM / np.maximum(total_M, 1)[None, :], 0.0)
        orders += both_MM
    precision, recall = precision / np.maximum(orders, 1), recall / np.maximum(orders, 1)
    weighted = BETA**2 * precision + recall
    score = np.where(weighted > 0, 100 * (1 + BETA**2) * precision * recall / np.where(weighted > 0, weighted, 1), 0.0)
    indices = [distinct.index(text) for text in squeezed]
    return score[np.ix_(indices, indices)]


def _ngram_counts(texts: Sequence[str], order: int) -> np.ndarray:
    """How often each n-gram occurs in each text, int64 [M, U]."""
    ngrams: dict[str, int] = {}
    ngram_ids = [
        [ngrams.setdefault(text[i : i + order], len(ngrams)) for i in range(len(text) - order + 1)] for text in texts
    ]
    counts_MU = np.zeros((len(texts), len(ngrams)), np.int64)
    for row_U, ids in zip(counts_MU, ngram_ids, strict=True):
        np.add.at(row_U, ids, 1)
    return counts_MU
