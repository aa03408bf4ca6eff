"""Tokens a second of translating a file, warm, by this package or by CTranslate2 on weights exported from it.

    python -m benchmarks.decode --workdir=DIR --source=FILE [--engine=ours|ctranslate2] [--beam_size=5]

The whole file is translated once to compile and warm up, and then --repeats times; the median counts. Loading is not
counted, tokenizing is. Tokens are pieces of the translations and the end of each. The last line of stdout is one JSON
object.
"""

import argparse
import json
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import sentencepiece

import transformer
from transformer import export
from transformer.command_line import positive_int, run, say
from transformer.compilation import enable_cache
from transformer.datasets import text_files
from transformer.tokenizer import FILE_NAME
from transformer.trained import load_trained

Translate = Callable[[list[str]], list[str]]


def main(argv: list[str]) -> None:
    """Reads the flags, measures, prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", allow_abbrev=False)
    parser.add_argument("--workdir", required=True, help="folder that train.py wrote")
    parser.add_argument("--checkpoint", default="latest", help="as of eval.py")
    parser.add_argument("--source", required=True, help="file to translate, a sentence a line")
    parser.add_argument("--engine", default="ours", choices=("ours", "ctranslate2"))
    parser.add_argument("--quantization", default="float32", choices=("float32", "int8"), help="of ctranslate2")
    parser.add_argument("--beam_size", type=positive_int, default=5)
    parser.add_argument("--repeats", type=positive_int, default=3)
    args = parser.parse_args(argv[1:])
    enable_cache()
    lines = list(text_files.read_lines(args.source))
    with tempfile.TemporaryDirectory() as folder:
        translate = ours(args) if args.engine == "ours" else ctranslate2(args, pathlib.Path(folder))
        count = load_trained(args.workdir, args.checkpoint).tokenizer.encode(translate(lines))
        seconds = []
        for _ in range(args.repeats):
            start = time.perf_counter()
            translate(lines)
            seconds.append(time.perf_counter() - start)
    tokens, median = sum(map(len, count)), statistics.median(seconds)
    say(f"{args.engine}: {tokens:,} tokens in {median:.2f} s")
    row = {
        "engine": args.engine,
        "sentences": len(lines),
        "beam_size": args.beam_size,
        "output_tokens": tokens,
        "seconds": [round(value, 3) for value in seconds],
        "sentences_per_s": round(len(lines) / median, 1),
        "output_tokens_per_s": round(tokens / median),
    }
    print(json.dumps(row))


def ours(args: argparse.Namespace) -> Translate:
    """This package, with the decoding of the checkpoint."""
    model = transformer.load(args.workdir, args.checkpoint)
    return lambda lines: model.translate(lines, beam_size=args.beam_size)


def ctranslate2(args: argparse.Namespace, folder: pathlib.Path) -> Translate:
    """CTranslate2 with its usual search, a worker for each core, on batches of 32 sentences sorted by length."""
    import ctranslate2

    trained = load_trained(args.workdir, args.checkpoint)
    export.write(trained, folder, "ctranslate2", args.quantization)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / FILE_NAME))
    cores = len(os.sched_getaffinity(0))
    program = ctranslate2.Translator(
        str(folder), device="cpu", compute_type=args.quantization, inter_threads=cores, intra_threads=1
    )
    longest = trained.config.decode.max_source_tokens + trained.config.decode.max_extra_length

    def translate(lines: list[str]) -> list[str]:
        found = program.translate_batch(
            pieces.encode(lines, out_type=str),
            beam_size=args.beam_size,
            length_penalty=trained.config.decode.length_penalty,
            max_batch_size=32,
            max_decoding_length=longest,
        )
        return pieces.decode([one.hypotheses[0] for one in found])

    return translate


if __name__ == "__main__":
    run(main)
