"""Sentences → sentences: pad, search, detokenize, restore the order. As a command it streams lines.

    python -m transformer.translate --workdir=DIR < source.txt > translations.txt

The device sees a few fixed shapes only: a sentence's width depends on its own length and the number
of rows on `decode.batch_rows`, so its translation depends on neither batch size, order nor neighbours.

B rows, S source length, N beams, T longest translation.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from transformer import alignments, compilation, search, sharding, validation
from transformer.batching import PADDING_ROW, PlannedBatch, Ragged, eval_plan
from transformer.command_line import say
from transformer.config import DecodeConfig
from transformer.errors import UserError
from transformer.model import reorder
from transformer.step import Model, Params
from transformer.tokenizer import BOS, EOS, PAD, Tokenizer, cut


class Translator:
    """Translates with one model and any params of its shape; each shape is compiled once.

    Attributes:
      truncated: sources cut to `decode.max_source_tokens` so far.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer, config: DecodeConfig, mesh: jax.sharding.Mesh):
        self._tokenizer, self._config, self._mesh = tokenizer, config, mesh
        multiple = sharding.row_multiple(mesh)
        self._rows = -(-config.batch_rows // multiple) * multiple
        self._search = jax.jit(sharding.over_rows(mesh, functools.partial(best_translations, model, config)))
        self.truncated = 0

    def translate(
        self, params: Params, sentences: Sequence[str], progress: Callable[[int], None] = lambda done: None
    ) -> list[str]:
        """One translation for each sentence, in order; a blank sentence gives an empty one.

        Args:
          params: of the model, on the mesh.
          sentences: one line of text each.
          progress: called with the number of sentences translated by each batch.
        """
        translations = [""] * len(sentences)
        filled = [i for i, sentence in enumerate(sentences) if sentence.strip()]
        sources = Ragged.from_sequences(self._encode([sentences[i] for i in filled]))
        # Two batches under way: the device works on one while the host turns the other into text.
        running: list[tuple[PlannedBatch, jax.Array]] = []
        for planned in eval_plan(sources.lengths, np.zeros_like(sources.lengths), lambda width: self._rows):
            source_BS = sources.rectangle(planned.examples_B, planned.bucket.source)
            running.append((planned, self._search(params, sharding.place_batch(self._mesh, source_BS))))
            if len(running) > 1:
                progress(self._collect(running.pop(0), filled, translations))
        for batch in running:
            progress(self._collect(batch, filled, translations))
        return translations

    def say_truncated(self) -> None:
        """Warns once of the sources that were cut."""
        if self.truncated:
            limit = self._config.max_source_tokens
            say(f"warning: {self.truncated:,} sources are longer than decode.max_source_tokens = {limit}; cut to it")
            self.truncated = 0

    def _encode(self, sentences: Sequence[str]) -> list[np.ndarray]:
        longest = self._config.max_source_tokens
        encoded = self._tokenizer.encode(sentences)
        self.truncated += sum(len(ids) > longest for ids in encoded)
        return [cut(ids, longest) for ids in encoded]

    def _collect(self, batch: tuple[PlannedBatch, jax.Array], filled: list[int], translations: list[str]) -> int:
        planned, tokens = batch
        real = planned.examples_B[planned.examples_B != PADDING_ROW]
        for example, ids in zip(real, jax.device_get(tokens), strict=False):  # padding rows come last
            translations[filled[example]] = self._tokenizer.decode(ids.tolist())
        return len(real)


def best_translations(model: Model, config: DecodeConfig, params: Params, source_BS: jax.Array) -> jax.Array:
    """Ids int32 [B, T] of the best hypothesis of each row, T = S + max_extra_length; nothing but PAD for padding."""
    module = model.bind(params)
    batch, width = source_BS.shape
    longest = width + config.max_extra_length
    lengths_B = (source_BS != PAD).sum(-1, dtype=jnp.int32)
    memory, cache = module.start(source_BS, config.beam_size, longest)
    hypotheses = search.beam_search(
        functools.partial(module.step, memory),
        cache,
        batch_size=batch,
        beam_size=config.beam_size,
        max_length=longest,
        max_lengths_B=jnp.where(lengths_B > 0, lengths_B + jnp.int32(config.max_extra_length), 0),
        length_penalty=config.length_penalty,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=PAD,
        reorder=reorder,
    )
    return hypotheses.tokens_BNT[:, 0]


def chunks(lines: Iterable[str], size: int) -> Iterator[list[str]]:
    """Lines in groups of `size`, the last one shorter."""
    group: list[str] = []
    try:
        for line in lines:
            group.append(line)
            if len(group) == size:
                yield group
                group = []
    except UserError:  # a line that is no text: those before it still count
        if group:
            yield group
        raise
    if group:
        yield group


def translate_stream(
    translate: Callable[[list[str]], list[str]], lines: Iterable[str], out: BinaryIO, size: int
) -> None:
    """Writes one line for each line read, as soon as its group of `size` is translated."""
    for group in chunks(lines, size):
        out.write("".join(f"{line}\n" for line in translate(group)).encode())
        out.flush()


def main(argv: list[str]) -> None:
    """Reads source lines on stdin and writes their translations to stdout, one for one."""
    import argparse

    from transformer.command_line import positive_int, workdir_path
    from transformer.datasets.text_files import decode_lines

    parser = argparse.ArgumentParser(prog="python -m transformer.translate", description=main.__doc__)
    parser.add_argument("--workdir", required=True, type=workdir_path, help="folder that train.py wrote")
    parser.add_argument(
        "--checkpoint", default="latest", help="latest (default), best, a step, average:N or best-average:N"
    )
    parser.add_argument("--batch_size", type=positive_int, default=256, help="lines read before the first is written")
    parser.add_argument("--beam_size", type=positive_int, help="hypotheses kept (default: the config's)")
    alignments.add_flags(parser)
    args = parser.parse_args(argv[1:])

    from transformer.trained import load_trained

    compilation.enable_cache()
    trained = load_trained(args.workdir, args.checkpoint)
    values = dataclasses.asdict(trained.config)
    if args.beam_size:
        values["decode"]["beam_size"] = args.beam_size
    decode = validation.resolve(values).decode
    translator = Translator(trained.model, trained.tokenizer, decode, trained.mesh)
    lines = decode_lines(sys.stdin.buffer, "stdin")
    try:
        with alignments.recorded(args, trained, functools.partial(translator.translate, trained.params)) as translate:
            translate_stream(translate, lines, sys.stdout.buffer, args.batch_size)
    finally:
        translator.say_truncated()


if __name__ == "__main__":
    from transformer.command_line import run

    run(main)
