"""Chains whose probabilities are given, to hold a search against all there is to find.

A chain is a table of logits [B, T, V, V]: sentence, position, last token, next token. PAD and BOS get as
much probability as other tokens, so that a search which generates them is found out.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from transformer.decoding.base import NEG_INF, Hypotheses, SpecialIds
from transformer.decoding.beam_search import SearchConfig, beam_search

PAD, BOS, EOS, A, B = range(5)


def chain_step(logits_BTVV: jax.Array) -> Callable:
    def step(cache, tokens_BN, position):
        now_BVV = jax.lax.dynamic_index_in_dim(logits_BTVV, position, axis=1, keepdims=False)
        return jax.vmap(lambda now_VV, tokens_N: now_VV[tokens_N])(now_BVV, tokens_BN), cache

    return step


def attending_step(logits_BTVV: np.ndarray, attention_VS: np.ndarray) -> Callable:
    """A chain that also pays attention to S sources, according to the last token alone."""
    step = chain_step(jnp.asarray(logits_BTVV))
    return lambda cache, tokens_BN, position: (*step(cache, tokens_BN, position), jnp.asarray(attention_VS)[tokens_BN])


def covered(attention_VS: np.ndarray, inputs: list[int], weight: float) -> float:
    """The coverage penalty of a hypothesis with these last tokens, by the formula of Wu et al. (2016)."""
    return weight * float(np.log(np.minimum(attention_VS[inputs].sum(0), 1)).sum())


def search_with(step, cache, shape, limits_B, alpha=0.0, bos_id=BOS, pad_id=PAD, **options) -> Hypotheses:
    """`beam_search` with shape (B, N, T) and the ids of these chains."""
    batch_size, beam_size, max_length = shape
    assert len(limits_B) == batch_size
    fields = {
        field.name: options.pop(field.name) for field in dataclasses.fields(SearchConfig) if field.name in options
    }
    config = SearchConfig(beam_size, max_length, SpecialIds(pad_id, bos_id, EOS), length_penalty=alpha, **fields)
    return beam_search(step, cache, jnp.asarray(limits_B, jnp.int32), config, **options)


def random_chains(seed: int, batch_size: int, max_length: int, vocab_size: int, eos_logit: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=2.0, size=(batch_size, max_length, vocab_size, vocab_size)).astype(np.float32)
    logits[..., EOS] += eos_logit
    return logits


def hand_made_chain(rows: dict[tuple[int, int], dict[int, float]], max_length: int = 6) -> np.ndarray:
    """One chain of V = 5 from {(position, last token): {next token: probability}}; other rows are sure of EOS."""
    logits = np.full((1, max_length, 5, 5), -np.inf, np.float32)
    logits[..., EOS] = 0
    for (position, last), probabilities in rows.items():
        logits[0, position, last, EOS] = -np.inf
        for token, probability in probabilities.items():
            logits[0, position, last, token] = np.log(probability)
    return logits


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))


def penalty(length: int, alpha: float, form: str = "gnmt") -> float:
    return ((5 + length) / 6 if form == "gnmt" else length) ** alpha


def texts(result: Hypotheses, sentence: int) -> list[list[int]]:
    """The hypotheses of a sentence, empty slots left out; checks that PAD, and only PAD, follows each."""
    hypotheses = []
    for tokens, length, score in zip(
        result.tokens_BNT[sentence], result.lengths_BN[sentence], result.scores_BN[sentence], strict=True
    ):
        assert (tokens[length:] == PAD).all()
        assert (tokens[:length] != PAD).all()
        if score != NEG_INF:
            hypotheses.append(tokens[:length].tolist())
    return hypotheses


def every_hypothesis(log_probs_TVV: np.ndarray, limit: int, symbols: list[int]) -> dict[tuple, float]:
    """Log-probability of every hypothesis: those that end within the limit, and those that it cuts."""
    finished, open_ones = {}, {(): 0.0}
    for position in range(limit):
        extended = {}
        for tokens, log_prob in open_ones.items():
            row_V = log_probs_TVV[position, tokens[-1] if tokens else BOS]
            finished[(*tokens, EOS)] = log_prob + row_V[EOS]
            extended.update({(*tokens, symbol): log_prob + row_V[symbol] for symbol in symbols})
        open_ones = extended
    return finished | open_ones
