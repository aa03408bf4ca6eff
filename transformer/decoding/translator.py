"""Sentences → translations: encode, pad, search, detokenize, restore the order.

The device sees a few fixed shapes only: a sentence's shape depends on its own length and wish, and the
number of rows on `decode.batch_rows`, so its translation depends on neither batch size, order nor neighbours.

B rows, S source length, P longest prefix, K phrases of a sentence, L longest phrase.
"""

import collections
import contextlib
import functools
import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from transformer.config import DecodeConfig
from transformer.data import text_inputs
from transformer.data.batching import PAD_EXAMPLE, JaggedArray, eval_batches
from transformer.data.text_files import one_line
from transformer.data.tokenizer import UNK, Tokenizer, truncate
from transformer.decoding import mbr, requests
from transformer.decoding.base import Hypotheses
from transformer.decoding.decode import DecodeInputs, batch_rows, decode
from transformer.decoding.requests import DecodingConstraints
from transformer.distributed import sharding
from transformer.models.registry import ModelDef, Params
from transformer.runtime.errors import UserError
from transformer.runtime.logging import log_info

# Taken to compile a program and, where there are several devices, to start one, so that threads start theirs one by
# one, in the same order on all devices.
_DISPATCH_LOCK = threading.Lock()
MAX_WORKERS = 4  # batches that a CPU computes beside each other, each with a cache of its own
MAX_CONCURRENT_WIDTH = 64  # wider ones have a CPU for themselves: their caches are large, and they keep all cores busy


class Hypothesis(NamedTuple):
    """One translation of a sentence.

    score: log-probability / length penalty, and what coverage adds; with decode.method = mbr the expected chrF.
    finished: whether it came to its end within its limit.
    """

    text: str
    score: float
    finished: bool


class _Decoded(NamedTuple):
    """The fields of a hypothesis, and whether an unknown token is in it."""

    text: str
    score: float
    finished: bool
    has_unknown: bool


class Translator:
    """Translates with one model or several, and any params of their shape; each shape is compiled once.

    Safe to share between threads. It counts what a caller should know of, and `log_warnings` says it.
    """

    def __init__(
        self, model: ModelDef | Sequence[ModelDef], tokenizer: Tokenizer, config: DecodeConfig, mesh: jax.sharding.Mesh
    ):
        self._models = (model,) if isinstance(model, ModelDef) else tuple(model)
        self._is_ensemble = not isinstance(model, ModelDef)
        self._tokenizer, self._config, self._mesh = tokenizer, config, mesh
        self._rows = batch_rows(config, mesh)
        self._workers = _workers(mesh)
        self._programs: dict[int, Callable[[Any, Any], Hypotheses]] = {}
        self._compiled: set[Any] = set()
        self._counts: collections.Counter[str] = collections.Counter()
        self._counting = threading.Lock()

    def translate(
        self,
        params: Params | Sequence[Params],
        sentences: Iterable[str],
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[str]:
        """One translation for each sentence, in order; a blank sentence gives an empty one.

        Args:
          params: of the model, on the mesh; of several models, one of each.
          sentences: one line of text each.
          progress: called with the number of sentences translated by each batch.
        """
        return [first_text(found) for found in self.translate_nbest(params, sentences, progress=progress)]

    def translate_nbest(
        self,
        params: Params | Sequence[Params],
        sentences: Iterable[str],
        *,
        n_best: int = 1,
        prefixes: Iterable[str | None] | None = None,
        constraints: Iterable[Iterable[str] | None] | None = None,
        seed: int | None = None,
        first: int = 1,
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[list[Hypothesis]]:
        """At most `n_best` translations of each sentence, best first; samples in the order drawn.

        Equal texts that beam search finds are one hypothesis, the best of them.

        Args:
          sentences: one line of text each, in any iterable; one line end at the end of a text is left out, and line
            breaks within it are read as spaces.
          prefixes: what each translation begins with; a blank one and None ask nothing.
          constraints: the phrases that each translation holds, or None.
          seed: of the samples, in place of `decode.seed`.
          first: what the first sentence is called in errors.

        Raises:
          UserError: more hypotheses than there are, what is no text, or wishes that cannot be met (see `wishes.make`).
        """
        sentences = self._lines(sentences, first)
        count = self._count(n_best, constraints)
        params = sharding.replicate(self._mesh, params)
        filled = [i for i, sentence in enumerate(sentences) if sentence.strip()]
        sources = JaggedArray.from_sequences(self._encode([sentences[i] for i in filled]))
        limits = np.zeros(len(sentences), np.int64)
        limits[filled] = sources.lengths + self._config.max_extra_length
        asked = requests.encode_constraints(self._tokenizer, prefixes, constraints, limits.tolist(), first)
        keys_N2 = self._keys(sources, self._config.seed if seed is None else seed)
        found: list[list[Hypothesis]] = [[Hypothesis("", 0.0, True)] for _ in sentences]

        def collect(examples_B: np.ndarray, batch: Hypotheses) -> None:
            real = examples_B[examples_B != PAD_EXAMPLE]  # padding rows come last
            for example, row in zip(real, self._decoded(batch), strict=False):
                found[filled[example]] = self._best(row, n_best)
            progress(len(real))

        # One batch more than there are workers is under way: the device works while the host turns one into text.
        running: collections.deque[tuple[np.ndarray, Callable[[], Hypotheses]]] = collections.deque()

        def collect_all_but(most: int) -> None:
            while len(running) > most:
                examples_B, batch = running.popleft()
                collect(examples_B, batch())

        with ThreadPoolExecutor(self._workers) as pool:
            for examples_B, request in self._requests(sources, [asked[i] for i in filled], keys_N2):
                is_wide = request.source_BS.shape[1] > MAX_CONCURRENT_WIDTH
                most = 0 if is_wide and self._workers > 1 else self._workers
                collect_all_but(most)
                running.append((examples_B, self._start(pool, count, params, request)))
                collect_all_but(most)
            collect_all_but(0)
        return found

    def log_warnings(self) -> None:
        """Warns once of sources that were not read as they are, and of translations that are not whole."""
        with self._counting:
            counts, self._counts = self._counts, collections.Counter()
        most, extra = self._config.max_source_tokens, self._config.max_extra_length
        for name, message in (
            ("line break", "sources hold line breaks, read as spaces; pass one line each"),
            ("long", f"sources are longer than decode.max_source_tokens = {most}; cut to it"),
            ("unfinished", f"translations are cut at source tokens + decode.max_extra_length = {extra}"),
            ("unknown", "translations hold the unknown token, unk"),
        ):
            if counts[name]:
                log_info(f"warning: {counts[name]:,} {message}")

    def _lines(self, sentences: Iterable[str], first: int) -> list[str]:
        given = text_inputs.items(sentences, "sentences: expected a list of sentences")
        lines = [text_inputs.line(text, f"sentence {number}") for number, text in enumerate(given, first)]
        self._add("line break", sum("\n" in line for line in lines))
        return [one_line(line) for line in lines]

    def _add(self, name: str, count: int) -> None:
        with self._counting:
            self._counts[name] += count

    def _count(self, n_best: int, constraints: Iterable[Any] | None) -> int:
        """How many hypotheses the device is asked for."""
        config = self._config
        if n_best < 1:
            raise UserError(f"n_best: expected at least 1, got {n_best}")
        if constraints is not None and config.method != "beam":
            raise UserError(f"constraints need decode.method = beam, got {config.method}")
        if constraints is not None and config.no_repeat_ngram:
            raise UserError("constraints and decode.no_repeat_ngram may contradict each other; set it to 0")
        name = {"beam": "beam_size", "mbr": "mbr_samples"}.get(config.method)
        if name and n_best > getattr(config, name):
            raise UserError(f"n_best = {n_best}: expected at most decode.{name} = {getattr(config, name)}; raise that")
        return config.mbr_samples if config.method == "mbr" else n_best

    def _encode(self, sentences: Sequence[str]) -> list[np.ndarray]:
        longest = self._config.max_source_tokens
        encoded = self._tokenizer.encode(sentences)
        self._add("long", sum(len(ids) > longest for ids in encoded))
        return [truncate(ids, longest) for ids in encoded]

    def _keys(self, sources: JaggedArray, seed: int) -> np.ndarray | None:
        """A random key for each sentence from the seed and its own ids, so that its samples depend on nothing else."""
        if self._config.method == "beam":
            return None
        digests = [
            hashlib.blake2b(np.array([seed, *ids], "<u4").tobytes(), digest_size=8).digest()
            for ids in np.split(sources.flat, sources.offsets[1:-1])
        ]
        return np.frombuffer(b"".join(digests), "<u4").astype(np.uint32).reshape(-1, 2)

    def _requests(
        self, sources: JaggedArray, asked: Sequence[DecodingConstraints], keys_N2: np.ndarray | None
    ) -> Iterator[tuple[np.ndarray, DecodeInputs]]:
        """Every sentence once: those of a batch, PAD_EXAMPLE where there is none, and what this host's devices get."""
        groups: dict[requests.PaddedSizes, list[int]] = {}
        for index, wish in enumerate(asked):
            groups.setdefault(wish.shape(), []).append(index)
        # The longest first, so that at the end no worker waits for another.
        for shape, members in sorted(groups.items(), reverse=True):
            lengths = sources.lengths[members]
            for planned in reversed(eval_batches(lengths, np.zeros_like(lengths), lambda width: self._rows)):
                is_real_B = planned.examples_B != PAD_EXAMPLE
                examples_B = np.where(is_real_B, np.array(members)[planned.examples_B], PAD_EXAMPLE)
                here_B = examples_B[sharding.local_row_indices(self._mesh, self._rows, rows="decode_batch")]
                source_BS = sources.to_padded(here_B, planned.bucket.source)
                keys_B2 = None if keys_N2 is None else keys_N2[np.maximum(here_B, 0)]
                yield examples_B, DecodeInputs(source_BS, keys_B2, *requests.to_arrays(asked, here_B, shape))

    def _start(
        self, pool: ThreadPoolExecutor, count: int, params: Params | Sequence[Params], request: DecodeInputs
    ) -> Callable[[], Hypotheses]:
        """Begins with a batch; returns what gives its hypotheses."""
        if self._workers > 1:
            return pool.submit(self._run, count, params, request).result
        # In this thread: where there are several hosts, all must start the same in the same order.
        found = self._run(count, params, request)
        return lambda: found

    def _run(self, count: int, params: Params | Sequence[Params], request: DecodeInputs) -> Hypotheses:
        """Hands a batch to the device; where threads compute their own, waits for it, so that no others get between."""
        placed = sharding.shard_batch(self._mesh, request, rows="decode_batch")
        shapes = count, str(jax.tree.map(np.shape, request))
        with _DISPATCH_LOCK:
            if count not in self._programs:
                run = functools.partial(decode, self._models, self._config, count)
                self._programs[count] = sharding.data_parallel_jit(self._mesh, run)
        with _DISPATCH_LOCK if self._workers == 1 or shapes not in self._compiled else contextlib.nullcontext():
            found = self._programs[count](params if self._is_ensemble else (params,), placed)
            self._compiled.add(shapes)
        return found if self._workers == 1 else jax.block_until_ready(found)

    def _decoded(self, batch: Hypotheses) -> Iterator[list[_Decoded]]:
        """The hypotheses of each row, those of length 0 left out."""
        tokens_BNT, lengths_BN, scores_BN, finished_BN = jax.device_get(batch)
        for rows in zip(tokens_BNT, lengths_BN, scores_BN, finished_BN, strict=True):
            yield [
                _Decoded(self._tokenizer.decode(ids.tolist()), float(score), bool(finished), UNK in ids[:length])
                for ids, length, score, finished in zip(*rows, strict=True)
                if length
            ]

    def _best(self, found: list[_Decoded], n_best: int) -> list[Hypothesis]:
        """The first `n_best` in the order of the method, counted."""
        if self._config.method == "mbr" and found:
            utilities = mbr.expected_chrf([one.text for one in found])
            order = np.argsort(-utilities, kind="stable")
            found = [found[i]._replace(score=float(utilities[i])) for i in order]
        if self._config.method == "beam":
            distinct: dict[str, _Decoded] = {}
            for one in found:
                distinct.setdefault(one.text, one)
            found = list(distinct.values())
        found = found[:n_best]
        self._add("unfinished", sum(not one.finished for one in found))
        self._add("unknown", sum(one.has_unknown for one in found))
        return [Hypothesis(one.text, one.score, one.finished) for one in found]


def _workers(mesh: jax.sharding.Mesh) -> int:
    """How many batches run beside each other: on a CPU a thread computes its own, elsewhere it only hands it over."""
    if mesh.size > 1 or mesh.devices.item().platform != "cpu":
        return 1
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, MAX_WORKERS)


def first_text(found: Sequence[Hypothesis]) -> str:
    """The text of the first hypothesis; empty where there is none."""
    return found[0].text if found else ""
