"""Sentences → translations: encode, batch, search, detokenize, restore the order.

The device sees a few fixed shapes only: the shape of a sentence depends on its own length and constraints, and the
number of rows on that shape and `decode.batch_rows`. So a translation does not depend on batch size, order or the other
sentences.

B rows, S source length, P longest prefix, K phrases of a sentence, L longest phrase.
"""

import collections
import contextlib
import functools
import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from transformer.config import DecodeConfig
from transformer.data import text_inputs
from transformer.data.batching import PAD_EXAMPLE, JaggedArray, eval_batches
from transformer.data.text_files import one_line
from transformer.data.tokenizer import UNK, Tokenizer
from transformer.decoding import mbr
from transformer.decoding.base import Hypotheses
from transformer.decoding.constraints import DecodingConstraints, PaddedSizes, encode_constraints, pad_constraints
from transformer.decoding.decode import DecodeInputs, batch_rows, decode
from transformer.decoding.warning_counts import WarningCounts
from transformer.distributed import platform, sharding
from transformer.models.registry import ModelDef, Params
from transformer.runtime.errors import UserError
from transformer.runtime.progress import phase

# Held to compile a program and, on several devices, to start one: threads start programs one by one, so that all
# devices see them in the same order.
_DISPATCH_LOCK = threading.Lock()
MAX_SOURCE_TOKENS = (
    1 << 15
)  # of a batch on a device: 256 rows of 128; wider batches have fewer rows, so that caches fit
MAX_CONCURRENT_WIDTH = 64  # wider batches run alone on a CPU: their caches are large, and they keep all cores busy

Item = TypeVar("Item")
Result = TypeVar("Result")


class Hypothesis(NamedTuple):
    """One translation of a sentence.

    score: log-probability / length penalty, and what coverage adds; with decode.method = mbr the expected chrF.
    finished: whether it reached EOS within its limit.
    """

    text: str
    score: float
    finished: bool


class _Requests(NamedTuple):
    """Everything asked of a list of sentences, encoded; blank sentences are left out.

    indices: numbers of the sentences in the list.
    keys_N2: data of their random keys; None for beam search.
    """

    indices: np.ndarray
    sources: JaggedArray
    constraints: list[DecodingConstraints]
    keys_N2: np.ndarray | None


class _Batch(NamedTuple):
    """Numbers of a batch's sentences in the list, padding rows left out, and the rows of this process."""

    indices: np.ndarray
    inputs: DecodeInputs


class Translator:
    """Translates with a model, or several as an ensemble, and any params of their shape; each shape is compiled once.

    Safe to share between threads. It counts what callers should be warned of; `log_warnings` reports it.
    """

    def __init__(self, models: Sequence[ModelDef], tokenizer: Tokenizer, config: DecodeConfig, mesh: jax.sharding.Mesh):
        self._models = tuple(models)
        self._tokenizer, self._config, self._mesh = tokenizer, config, mesh
        self.rows = batch_rows(config, mesh)
        self._workers = platform.decode_threads(mesh)
        self._programs: dict[int, Callable[[Any, Any], Hypotheses]] = {}
        self._compiled: set[Any] = set()
        self._warnings = WarningCounts()

    def translate(
        self,
        params: Sequence[Params],
        sentences: Iterable[str],
        progress: Callable[[int], None] = lambda count: None,
        tag: str = "",
        seed: int | None = None,
    ) -> list[str]:
        """Returns one translation for each sentence, in order; that of a blank sentence is empty.

        Args:
          params: of each model, on the mesh.
          sentences: one line of text each.
          progress: called with the number of sentences of each finished batch.
          tag: of the target language, put before each sentence; empty for none.
          seed: of the samples, in place of `decode.seed`.
        """
        translations = self.translate_nbest(params, sentences, progress=progress, tag=tag, seed=seed)
        return [first_text(hypotheses) for hypotheses in translations]

    def translate_nbest(
        self,
        params: Sequence[Params],
        sentences: Iterable[str],
        *,
        n_best: int = 1,
        prefixes: Iterable[str | None] | None = None,
        constraints: Iterable[Iterable[str] | None] | None = None,
        seed: int | None = None,
        first: int = 1,
        progress: Callable[[int], None] = lambda count: None,
        tag: str = "",
    ) -> list[list[Hypothesis]]:
        """Returns at most `n_best` translations of each sentence, best first; samples in the order drawn.

        Hypotheses of beam search with equal texts are merged into the best of them.

        Args:
          sentences: any iterable of lines of text; one line end at the end of a text is stripped, and line breaks
            within it are read as spaces.
          prefixes: what each translation begins with; blank or None for no constraint.
          constraints: the phrases that each translation holds, or None.
          seed: of the samples, in place of `decode.seed`.
          first: number of the first sentence in errors.
          tag: of the target language, put before each sentence; empty for none.

        Raises:
          UserError: n_best is too large, an item is not text, or a constraint cannot be met (see
            `constraints.encode_constraints`).
        """
        lines = self._lines(sentences, first)
        count = self._num_hypotheses(n_best, constraints)
        params = sharding.replicate(self._mesh, tuple(params))
        request = self._encode_requests(
            lines, prefixes, constraints, self._config.seed if seed is None else seed, first, tag
        )
        translations: list[list[Hypothesis]] = [[Hypothesis("", 0.0, True)] for _ in lines]
        with ThreadPoolExecutor(self._workers) as pool:
            submit = functools.partial(self._submit, pool, count, params)
            for batch, hypotheses in map_ordered(submit, self._batches(request), self._max_in_flight):
                for index, row in zip(batch.indices, self._detokenize(hypotheses), strict=False):  # padding comes last
                    translations[index] = self._rank(row, n_best)
                progress(len(batch.indices))
        return translations

    def log_warnings(self, name: str = "") -> None:
        """Logs, once, sources that were changed to be read, and translations that are truncated or hold unk.

        Args:
          name: of the model, where there are several.
        """
        max_length, extra = self._config.max_source_tokens, self._config.max_extra_length
        messages = {
            "line break": "sources hold line breaks, read as spaces; pass one line each",
            "long": f"sources are longer than decode.max_source_tokens = {max_length}; cut to it",
            "unfinished": f"translations are cut at source tokens + decode.max_extra_length = {extra}",
            "unknown": "translations hold the unknown token, unk",
        }
        self._warnings.log(messages, name)

    def _lines(self, sentences: Iterable[str], first: int) -> list[str]:
        texts = text_inputs.items(sentences, "sentences: expected a list of sentences")
        lines = [text_inputs.line(text, f"sentence {number}") for number, text in enumerate(texts, first)]
        self._warnings.add("line break", sum("\n" in line for line in lines))
        return [one_line(line) for line in lines]

    def _num_hypotheses(self, n_best: int, constraints: Iterable[Any] | None) -> int:
        """How many hypotheses of each sentence the device returns."""
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

    def _encode_requests(
        self,
        lines: Sequence[str],
        prefixes: Iterable[str | None] | None,
        constraints: Iterable[Iterable[str] | None] | None,
        seed: int,
        first: int,
        tag: str,
    ) -> _Requests:
        indices = [i for i, line in enumerate(lines) if line.strip()]
        max_length = self._config.max_source_tokens
        encoded, is_truncated = self._tokenizer.encode_truncated([lines[i] for i in indices], max_length, tag)
        self._warnings.add("long", sum(is_truncated))
        sources = JaggedArray.from_sequences(encoded)
        limits = np.zeros(len(lines), np.int64)
        limits[indices] = sources.lengths + self._config.max_extra_length
        all_constraints = encode_constraints(self._tokenizer, prefixes, constraints, limits.tolist(), first)
        keys_N2 = None if self._config.method == "beam" else sentence_keys(sources, seed)
        return _Requests(np.array(indices, np.int64), sources, [all_constraints[i] for i in indices], keys_N2)

    def _batches(self, request: _Requests) -> Iterator[_Batch]:
        """Every sentence once, grouped by the sizes of its constraints and by length, the longest first.

        So no worker is left with a long batch at the end.
        """
        groups: dict[PaddedSizes, list[int]] = {}
        for example, constraints in enumerate(request.constraints):
            groups.setdefault(constraints.padded_sizes(), []).append(example)
        for sizes, members in sorted(groups.items(), reverse=True):
            lengths = request.sources.lengths[members]
            for spec in reversed(eval_batches(lengths, np.zeros_like(lengths), self._rows_of)):
                is_real_B = spec.examples_B != PAD_EXAMPLE
                examples_B = np.where(is_real_B, np.array(members)[spec.examples_B], PAD_EXAMPLE)
                local_B = examples_B[sharding.local_row_indices(self._mesh, len(examples_B), rows="decode_batch")]
                source_BS = request.sources.to_padded(local_B, spec.bucket.source)
                keys_B2 = None if request.keys_N2 is None else request.keys_N2[np.maximum(local_B, 0)]
                inputs = DecodeInputs(source_BS, keys_B2, *pad_constraints(request.constraints, local_B, sizes))
                yield _Batch(request.indices[examples_B[is_real_B]], inputs)

    def _rows_of(self, width: int) -> int:
        return batch_rows(self._config, self._mesh, MAX_SOURCE_TOKENS * self._mesh.size // width)

    def _max_in_flight(self, batch: _Batch) -> int:
        """Batches that may run while the next one is prepared or the last one detokenized."""
        is_wide = batch.inputs.source_BS.shape[1] > MAX_CONCURRENT_WIDTH
        return 0 if is_wide and self._workers > 1 else self._workers

    def _submit(
        self, pool: ThreadPoolExecutor, count: int, params: Sequence[Params], batch: _Batch
    ) -> Callable[[], Hypotheses]:
        """Starts a batch; returns a function that waits for its hypotheses."""
        if self._workers > 1:
            return pool.submit(self._execute, count, params, batch.inputs).result
        # In this thread: all processes must start the same programs in the same order.
        hypotheses = self._execute(count, params, batch.inputs)
        return lambda: hypotheses

    def _execute(self, count: int, params: Sequence[Params], inputs: DecodeInputs) -> Hypotheses:
        """Runs a batch; concurrent threads also wait for the result, so that no more batches than threads run."""
        on_device = sharding.shard_batch(self._mesh, inputs, rows="decode_batch")
        shapes = count, str(jax.tree.map(np.shape, inputs))
        with _DISPATCH_LOCK:
            if count not in self._programs:
                program = functools.partial(decode, self._models, self._config, count)
                self._programs[count] = sharding.data_parallel_jit(self._mesh, program)
        with _DISPATCH_LOCK if self._workers == 1 or shapes not in self._compiled else contextlib.nullcontext():
            is_new = shapes not in self._compiled  # unless another thread has compiled it meanwhile
            width = inputs.source_BS.shape[1]
            with phase(f"compiling, sources of {width} tokens") if is_new else contextlib.nullcontext():
                hypotheses = self._programs[count](params, on_device)
            self._compiled.add(shapes)
        return hypotheses if self._workers == 1 else jax.block_until_ready(hypotheses)

    def _detokenize(self, hypotheses: Hypotheses) -> Iterator[list[tuple[Hypothesis, bool]]]:
        """The hypotheses of each row, without empty ones, each with whether it contains an unknown token."""
        tokens_BNT, lengths_BN, scores_BN, finished_BN = jax.device_get(hypotheses)
        for row in zip(tokens_BNT, lengths_BN, scores_BN, finished_BN, strict=True):
            yield [
                (Hypothesis(self._tokenizer.decode(ids.tolist()), float(score), bool(finished)), UNK in ids[:length])
                for ids, length, score, finished in zip(*row, strict=True)
                if length
            ]

    def _rank(self, hypotheses: list[tuple[Hypothesis, bool]], n_best: int) -> list[Hypothesis]:
        """The first `n_best` in the order of the method; counts those to warn of."""
        if self._config.method == "mbr" and hypotheses:
            utilities = mbr.expected_chrf([hypothesis.text for hypothesis, _ in hypotheses])
            scored = [
                (hypothesis._replace(score=float(utility)), has_unknown)
                for (hypothesis, has_unknown), utility in zip(hypotheses, utilities, strict=True)
            ]
            hypotheses = [scored[i] for i in np.argsort(-utilities, kind="stable")]
        if self._config.method == "beam":
            distinct: dict[str, tuple[Hypothesis, bool]] = {}
            for item in hypotheses:
                distinct.setdefault(item[0].text, item)
            hypotheses = list(distinct.values())
        hypotheses = hypotheses[:n_best]
        self._warnings.add("unfinished", sum(not hypothesis.finished for hypothesis, _ in hypotheses))
        self._warnings.add("unknown", sum(has_unknown for _, has_unknown in hypotheses))
        return [hypothesis for hypothesis, _ in hypotheses]


def map_ordered(
    submit: Callable[[Item], Callable[[], Result]], items: Iterable[Item], max_in_flight: Callable[[Item], int]
) -> Iterator[tuple[Item, Result]]:
    """Yields each item with its result, in order, while later items already run.

    Args:
      submit: starts an item; returns a function that waits for its result.
      max_in_flight: how many items may be under way besides this one when it starts, and in all when the next is read.
    """
    in_flight: collections.deque[tuple[Item, Callable[[], Result]]] = collections.deque()

    def finish(limit: int) -> Iterator[tuple[Item, Result]]:
        while len(in_flight) > limit:
            item, wait = in_flight.popleft()
            yield item, wait()

    for item in items:
        yield from finish(max_in_flight(item))
        in_flight.append((item, submit(item)))
        yield from finish(max_in_flight(item))
    yield from finish(0)


def sentence_keys(sources: JaggedArray, seed: int) -> np.ndarray:
    """A random key for each sentence, uint32 [N, 2], from the seed and its ids: its samples depend on nothing else."""
    digests = [
        hashlib.blake2b(np.array([seed, *ids], "<u4").tobytes(), digest_size=8).digest()
        for ids in np.split(sources.flat, sources.offsets[1:-1])
    ]
    return np.frombuffer(b"".join(digests), "<u4").astype(np.uint32).reshape(-1, 2)


def first_text(hypotheses: Sequence[Hypothesis]) -> str:
    """The text of the first hypothesis; empty if there is none."""
    return hypotheses[0].text if hypotheses else ""
