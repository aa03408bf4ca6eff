"""Measures preparing data and starting a run by the number of sentence pairs, on generated text like that of WMT.

    python -m benchmarks.data_scale --output=runs/scale [--pairs=1000000,4000000] [--vocabulary=given|bpe|unigram]
        [--batching=bucket|pack] [--workers=N] [--text_only]

For each number of pairs, in a folder of its own: generates the text, prepares it by `transformer.prepare`, then starts
a run of a tiny model three times and ends it where its first update would be. The second start finds everything cached;
before the third, what was known of the digests of files is deleted. Logs a row for each number of pairs; the last line
of stdout is one JSON object with the slope between the smallest and the largest.

The text is the same in every run: words of random syllables with Zipfian frequencies, sentences of log-normal lengths,
targets about as long as their sources, 1 pair in 200 a duplicate of an earlier one.
"""

import argparse
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from transformer.command_line import absolute_path, command_parser, positive_int, run
from transformer.data import tokenizer
from transformer.runtime import progress
from transformer.runtime.files import open_atomic
from transformer.runtime.logging import log_info

LANGUAGES = ("en", "de")
WORDS = 400_000  # different ones of each language
CHUNK_PAIRS = 10_000
DUPLICATES = 200  # one pair in this many occurs before
VOCABULARY_LINES = 400_000  # from which the given vocabulary is trained
MEMORY_INTERVAL_S = 0.2

CONSONANTS = {"en": "b c d f g h l m n p r s t th w st ch sh", "de": "b d f g h k l m n r s t w z sch st"}
VOWELS = {"en": "a e i o u ea ou ai", "de": "a e i o u ei ie au ü ä ö"}

Pair = tuple[str, str]
Row = dict[str, Any]


def make_words(language: str) -> list[str]:
    """WORDS different words, the shortest first, as frequent words are short."""
    rng = np.random.Generator(np.random.PCG64(len(language) + ord(language[0])))
    syllables = [a + b for a in CONSONANTS[language].split() for b in VOWELS[language].split()]
    words: dict[str, None] = {}
    for length in itertools.count(1):
        most = len(words) + (200, 8_000, 120_000, WORDS)[min(length, 4) - 1]
        for row in rng.integers(0, len(syllables), (2 * (most - len(words)), length)):
            words.setdefault("".join(syllables[i] for i in row))
            if len(words) >= min(most, WORDS):
                break
        if len(words) >= WORDS:
            return list(words)
    raise AssertionError


def generate_pairs(count: int, seed: int = 0) -> Iterator[Pair]:
    """Yields `count` pairs of sentences; the first n are the same for every `count`."""
    words = [make_words(language) for language in LANGUAGES]
    frequencies = 1 / (np.arange(WORDS) + 2.7)
    cumulative = np.cumsum(frequencies / frequencies.sum())
    earlier: list[Pair] = []
    for number in range(-(-count // CHUNK_PAIRS)):
        rng = np.random.Generator(np.random.PCG64([seed, number]))
        sources = np.clip(rng.lognormal(2.98, 0.6, CHUNK_PAIRS), 1, 250).astype(int)
        targets = np.clip(sources * rng.lognormal(-0.05, 0.18, CHUNK_PAIRS), 1, 250).astype(int)
        sides = []
        for side, lengths in zip(words, (sources, targets), strict=True):
            drawn = np.searchsorted(cumulative, rng.random(int(lengths.sum())))
            starts = np.concatenate([[0], np.cumsum(lengths)]).tolist()
            chosen = [side[i] for i in drawn.tolist()]
            sides.append([_sentence(chosen[a:b]) for a, b in itertools.pairwise(starts)])
        pairs = list(zip(*sides, strict=True))
        for row in range(0, CHUNK_PAIRS, DUPLICATES) if earlier else ():
            pairs[row] = earlier[int(rng.integers(len(earlier)))]
        earlier = pairs
        yield from pairs[: count - number * CHUNK_PAIRS]


def _sentence(words: list[str]) -> str:
    """The words with a capital, commas and a full stop."""
    for comma in range(8, len(words) - 2, 9):
        words[comma] += ","
    text = " ".join(words)
    return f"{text[0].upper()}{text[1:]}."


def write_text(folder: pathlib.Path, count: int) -> None:
    """Writes train, val and test files, unless they exist."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem, size, seed in (("train", count, 0), ("val", 2_000, 1), ("test", 2_000, 2)):
        paths = [folder / f"{stem}.{language}" for language in LANGUAGES]
        if all(path.exists() for path in paths):
            continue
        with open_atomic(paths[0]) as source, open_atomic(paths[1]) as target:
            for pair in progress.track(generate_pairs(size, seed), f"generating {stem}", size, "pairs"):
                source.write(f"{pair[0]}\n".encode())
                target.write(f"{pair[1]}\n".encode())


def given_vocabulary(folder: pathlib.Path, vocab_size: int) -> pathlib.Path:
    """A vocabulary trained on the first pairs, unless it exists."""
    path = folder / f"{vocab_size}.model"
    if not path.exists():
        log_info(f"training the given vocabulary of {vocab_size:,} tokens")
        lines = list(itertools.chain.from_iterable(generate_pairs(VOCABULARY_LINES // 2)))
        tokenizer.train(lines, vocab_size, "bpe").save(folder, path.name)
    return path


class Usage(NamedTuple):
    """What a command and all its processes took: wall time, CPU time, and the largest sum of their memory."""

    seconds: float
    cpu_s: float
    peak_mb: float
    stdout: str


def measure(command: Sequence[str]) -> Usage:
    """Runs a command; shared pages count once (PSS).

    Raises:
      RuntimeError: it fails.
    """
    since = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    peak, done = 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(MEMORY_INTERVAL_S):
            peak = max(peak, session_memory_mb(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert process.stdout
    with process.stdout as stream:
        stdout = stream.read()
    _, status, usage = os.wait4(process.pid, 0)
    done.set()
    watcher.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}")
    return Usage(time.perf_counter() - since, usage.ru_utime + usage.ru_stime, peak, stdout)


def session_memory_mb(session: int) -> float:
    """The memory of all processes of a session, in 10^6 bytes."""
    total = 0
    for entry in pathlib.Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if int((entry / "stat").read_text().rpartition(")")[2].split()[3]) != session:
                continue
            rollup = (entry / "smaps_rollup").read_text()
        except (OSError, IndexError):  # it has ended
            continue
        total += next((int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")), 0)
    return total * 1024 / 1e6


# Starts a run and ends it where it would make its first update; prints what that took.
START = """
import json, os, resource, sys
from transformer import command_line
from transformer.runtime import file_digests
hashed, hash_file = [0], file_digests.hash_file
def counted(path, phase):
    hashed[0] += os.path.getsize(path)
    return hash_file(path, phase)
file_digests.hash_file = counted
config, _ = command_line.config_flags(sys.argv[1:])
from transformer.training import session, train_step
def update(*arguments, **options):
    usage = resource.getrusage(resource.RUSAGE_SELF)
    with open("/proc/self/smaps_rollup") as file:
        pss = next(int(line.split()[1]) for line in file if line.startswith("Pss:"))
    cpu_s = usage.ru_utime + usage.ru_stime
    print(json.dumps({"cpu_s": cpu_s, "hashed": hashed[0], "pss_mb": pss * 1024 / 1e6}), flush=True)
    os._exit(0)
update.lower = update
train_step.make_train_step = lambda *arguments, **options: update
session.train(config, sys.argv[1])
"""


def prepare_flags(folder: pathlib.Path, args: argparse.Namespace, given: pathlib.Path | None) -> list[str]:
    """The flags of a config of a tiny model on the text of a folder."""
    fields = {
        "data.dir": folder / "text",
        "data.data_dir": folder / "data",
        "data.vocab_size": args.vocab_size,
        "data.tokenizer": given or args.vocabulary,
        "data.batching": args.batching,
        "data.max_length": 256,
        "model.emb_dim": 8,
        "model.mlp_dim": 8,
        "model.num_layers": 1,
        "model.num_heads": 1,
        "train.batch_tokens": 2048,
        "train.num_steps": 1,
        "mesh.data": 1,
    }
    root = pathlib.Path(__file__).parent.parent
    return [f"--config={root}/configs/text.py", *(f"--config.{field}={value}" for field, value in fields.items())]


def folder_bytes(folder: pathlib.Path, pattern: str) -> int:
    """The size of the files below a folder that match."""
    return sum(path.stat().st_size for path in folder.glob(pattern) if path.is_file())


def measure_pairs(count: int, args: argparse.Namespace) -> Row:
    """A row of the table."""
    output = pathlib.Path(args.output)
    folder = output / f"{count}-{args.vocabulary}-{args.batching}"
    write_text(folder / "text", count)
    if args.text_only:
        return {"pairs": count, "text_bytes": folder_bytes(folder, "text/train.*") / count}
    given = given_vocabulary(output, args.vocab_size) if args.vocabulary == "given" else None
    flags = prepare_flags(folder, args, given)
    workers = [f"--workers={args.workers}"] if args.workers else []
    row: Row = {"pairs": count, "text_bytes": folder_bytes(folder, "text/train.*") / count}
    shutil.rmtree(folder / "data", ignore_errors=True)
    log_info(f"preparing {count:,} pairs")
    usage = measure([sys.executable, "-m", "transformer.prepare", *flags, *workers])
    row |= {
        "prepare_s": usage.seconds,
        "pairs_per_s": count / usage.seconds,
        "prepare_cpu_us": usage.cpu_s / count * 1e6,
        "prepare_peak_mb": usage.peak_mb,
        "shard_bytes": folder_bytes(folder, "data/*/*/*/*-train.array_record*") / count,
        "id_bytes": folder_bytes(folder, "data/token_ids/*/*.ids") / count,
    }
    for name in ("first", "cached", "forgetful"):
        if name == "forgetful":
            for path in folder.glob("data/**/.digests*.json"):
                path.unlink()
        log_info(f"{name} start with {count:,} pairs")
        run_folder = folder / f"run-{name}-{time.time_ns()}"
        usage = measure([sys.executable, "-c", START, str(run_folder), *flags])
        start = json.loads(usage.stdout.splitlines()[-1])
        row |= {
            f"{name}_start_s": usage.seconds,
            f"{name}_start_cpu_s": start["cpu_s"],
            f"{name}_start_hashed": start["hashed"] / count,
            f"{name}_start_pss_mb": start["pss_mb"],
        }
    offsets = folder_bytes(folder, "data/token_ids/*/*.offsets.npy")
    row["plan_bytes"] = (offsets + folder_bytes(folder, "data/schedules/*/*/*")) / count
    return row


def slopes(rows: Sequence[Row]) -> Row:
    """Costs of a further pair between the smallest and the largest corpus."""
    least, most = rows[0], rows[-1]
    more = most["pairs"] - least["pairs"]
    if not more or "prepare_s" not in least:
        return {}
    return {
        "prepare_us_slope": (most["prepare_s"] - least["prepare_s"]) / more * 1e6,
        "start_cpu_us_slope": (most["cached_start_cpu_s"] - least["cached_start_cpu_s"]) / more * 1e6,
        "start_bytes_slope": (most["cached_start_pss_mb"] - least["cached_start_pss_mb"]) / more * 1e6,
    }


def main(argv: list[str]) -> None:
    """Prints a row for each number of pairs, and all as JSON."""
    parser = command_parser("python -m benchmarks.data_scale", __doc__)
    parser.add_argument("--output", type=absolute_path, default=absolute_path("runs/scale"))
    parser.add_argument("--pairs", default="1000000,4000000", help="numbers of training pairs")
    parser.add_argument("--vocabulary", choices=("given", "bpe", "unigram"), default="given")
    parser.add_argument("--vocab_size", type=positive_int, default=37_000)
    parser.add_argument("--batching", choices=("bucket", "pack"), default="bucket")
    parser.add_argument("--workers", type=positive_int, help="processes that prepare (default: one a core)")
    parser.add_argument("--text_only", action="store_true", help="generate the text and end")
    args = parser.parse_args(argv[1:])
    rows = []
    for count in sorted({positive_int(text) for text in args.pairs.split(",")}):
        rows.append(measure_pairs(count, args))
        log_info("  ".join(f"{name} {value:,.4g}" for name, value in rows[-1].items()))
    print(json.dumps({"rows": rows, **slopes(rows)}))


if __name__ == "__main__":
    run(main)
