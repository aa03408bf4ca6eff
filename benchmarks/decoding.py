"""Benchmarks translation of a file, warm, by this package or by CTranslate2 with exported weights: tokens a second.

    python -m benchmarks.decoding --workdir=DIR --source=FILE [--engine=ours|ctranslate2] [--decode.beam_size=5]

The file is translated once to compile and warm up, then --repeats times; the result is the median. It includes
tokenization but not loading. Tokens are those of the translations, with EOS. The last line of stdout is one JSON
object.
"""

import json
import os
import pathlib
import statistics
import tempfile
from collections.abc import Callable

from benchmarks.timing import seconds_of
from transformer.checkpoints.loading import RestoredModel, load_checkpoint
from transformer.command_line import absolute_path, add_direction_flags, decode_flags, model_parser, positive_int, run
from transformer.config import mixture
from transformer.data import text_files
from transformer.decoding.translator import Translator
from transformer.export import ctranslate2 as export_ctranslate2
from transformer.export import verify
from transformer.runtime.environment import enable_compilation_cache
from transformer.runtime.errors import UserError
from transformer.runtime.logging import log_info

Translate = Callable[[list[str]], list[str]]


def main(argv: list[str]) -> None:
    """Parses the flags, measures and prints."""
    parser = model_parser("python -m benchmarks.decoding", __doc__)
    parser.add_argument("--source", required=True, type=absolute_path, help="file to translate, a sentence a line")
    parser.add_argument("--engine", default="ours", choices=("ours", "ctranslate2"))
    parser.add_argument("--quantization", default="float32", choices=("float32", "int8"), help="of ctranslate2")
    parser.add_argument("--patience", type=positive_int, default=1, help="of ctranslate2: 3 gives the results of ours")
    parser.add_argument("--repeats", type=positive_int, default=3)
    add_direction_flags(parser)
    fields, rest = decode_flags(argv)
    args = parser.parse_args(rest)
    if args.engine == "ours" and (args.quantization, args.patience) != ("float32", 1):
        raise UserError("--quantization and --patience are of --engine=ctranslate2; leave them out")
    if args.engine == "ctranslate2":
        verify.check_installed("ctranslate2", "--engine=ctranslate2")
    enable_compilation_cache()
    lines = list(text_files.read_lines(args.source))
    with tempfile.TemporaryDirectory() as folder:
        trained = load_checkpoint(args.workdir, args.checkpoint).with_decode(fields)
        languages = args.source_language, args.target_language
        trained = trained.with_direction(mixture.find_direction(trained.config.data, *languages))
        if args.engine == "ours":
            translate = ours(trained)
        else:
            translate = ctranslate2(trained, pathlib.Path(folder), args.quantization, args.patience)
        encoded = trained.tokenizer.encode(translate(lines))
        seconds = [seconds_of(translate, lines) for _ in range(args.repeats)]
    tokens, median = sum(map(len, encoded)), statistics.median(seconds)
    log_info(f"{args.engine}: {tokens:,} tokens in {median:.2f} s")
    row = {
        "engine": args.engine,
        "sentences": len(lines),
        "decode": fields,
        "output_tokens": tokens,
        "seconds": [round(value, 3) for value in seconds],
        "sentences_per_s": round(len(lines) / median, 1),
        "output_tokens_per_s": round(tokens / median),
    }
    print(json.dumps(row))


def ours(trained: RestoredModel) -> Translate:
    """Translates with this package."""
    translator = Translator([trained.model], trained.tokenizer, trained.config.decode, trained.mesh)
    return lambda lines: translator.translate([trained.params], lines, tag=trained.source_tag)


def ctranslate2(trained: RestoredModel, folder: pathlib.Path, quantization: str, patience: int) -> Translate:
    """Translates with CTranslate2: a worker for each core, batches of 32 sentences sorted by length."""
    import ctranslate2

    summary = verify.write(trained, folder, "ctranslate2", quantization)
    options = {**summary["translate_batch"], "patience": patience, "max_batch_size": 32}
    tokenizer = trained.tokenizer
    words = export_ctranslate2.vocabulary(tokenizer)
    ids = {word: number for number, word in enumerate(words)}
    program = ctranslate2.Translator(
        str(folder), device="cpu", compute_type=quantization, inter_threads=os.cpu_count() or 1, intra_threads=1
    )

    def translate(lines: list[str]) -> list[str]:
        pieces = [[words[i] for i in line_ids[:-1]] for line_ids in tokenizer.encode(lines, trained.source_tag)]
        results = program.translate_batch(pieces, **options)
        return [tokenizer.decode(ids[word] for word in result.hypotheses[0]) for result in results]

    return translate


if __name__ == "__main__":
    run(main)
