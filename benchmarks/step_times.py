"""Times an update of a config and of named changes of it, in turn in one process: their speeds relative to the config.

    python -m benchmarks.step_times --config=configs/demo.py --changes=benchmarks/changes/demo.py
        [--only=rms,swiglu] [--rows=64] [--length=32] [--rounds=15] [--config.SECTION.FIELD=VALUE …]

Batches are random tokens: no data is read. Objectives that compute each row twice are compared with the config on twice
the rows. The config itself is timed a second time, as `again`: its difference is noise. The last line of stdout is one
JSON object.
"""

import json
import statistics

import numpy as np

from benchmarks import ablation_plan, timing
from benchmarks.ablation_plan import BASE
from benchmarks.flag_lists import known_names
from transformer import command_line
from transformer.config import Config
from transformer.data.batching import Batch
from transformer.data.tokenizer import NUM_FIXED
from transformer.runtime import environment
from transformer.runtime.logging import log_info

AGAIN = "again"


def main(argv: list[str]) -> None:
    """Compiles all updates, runs them in turn, prints a table."""
    parser = command_line.config_parser("python -m benchmarks.step_times", __doc__, "--changes=FILE")
    parser.add_argument("--changes", required=True, metavar="FILE", help="with get_changes, as of benchmarks.ablation")
    parser.add_argument("--only", default="", help="names to time, commas between (default: all)")
    for name, default in (("rows", 64), ("length", 32), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=command_line.positive_int, default=default, help=f"(default: {default})")
    base, args = command_line.parse_with_config(parser, argv)
    flags = command_line.split_flags(argv[1:], "config")[0]
    configs = ablation_plan.resolve(flags, ablation_plan.load_changes(args.changes, base, flags))
    names = known_names("--only", args.only, configs) if args.only else list(configs)
    environment.enable_compilation_cache()
    named = {name: configs[name] for name in names if name != BASE}
    medians = measure(configs[BASE], named, args.rows, args.length, args.rounds)
    print(format_table(medians))
    print(json.dumps({name: {"step_ms": ms, "relative_speed": speed} for name, (ms, speed) in medians.items()}))


def measure(
    base: Config, changes: dict[str, Config], rows: int, length: int, rounds: int
) -> dict[str, tuple[float, float]]:
    """The median milliseconds of an update, and the speed relative to the base on as many rows as are computed."""
    changes = {AGAIN: base, **changes}
    rows_of = {passes: -(-passes * rows // base.train.passes) for passes in {c.train.passes for c in changes.values()}}
    of_base = {passes: f"base on {count} rows" for passes, count in rows_of.items()}
    updates = {
        name: timing.compile_update(base, base.data.vocab_size, random_batch(base, rows_of[passes], length))
        for passes, name in sorted(of_base.items())
    }
    for name, config in changes.items():
        updates[name] = timing.compile_update(config, config.data.vocab_size, random_batch(config, rows, length))
        log_info(f"{name}: compiled in {updates[name].compile_s:.1f} s")
    seconds: dict[str, list[float]] = {name: [] for name in updates}
    for number in range(rounds):  # there and back, so that no update always follows the same one
        for name in list(updates)[:: 1 if number % 2 else -1]:
            timing.seconds_of(updates[name].run)  # finds memory as another update left it
            seconds[name].append(timing.seconds_of(updates[name].run))
    medians = {name: 1000 * statistics.median(each) for name, each in seconds.items()}
    return {
        name: (ms, medians[of_base[changes[name].train.passes]] / ms if name in changes else 1.0)
        for name, ms in medians.items()
    }


def random_batch(config: Config, rows: int, length: int) -> Batch:
    """A batch without padding."""
    rng = np.random.default_rng(0)
    return Batch(*(rng.integers(NUM_FIXED, config.data.vocab_size, (rows, length), np.int32) for _ in range(2)))


def format_table(medians: dict[str, tuple[float, float]]) -> str:
    """A Markdown table."""
    rows = [(name, f"{ms:.1f}", f"{speed:.2f}") for name, (ms, speed) in medians.items()]
    return "\n".join(command_line.markdown_table(("change", "ms an update", "relative speed"), rows))


if __name__ == "__main__":
    command_line.reexec_with_malloc_settings()
    command_line.run(main)
