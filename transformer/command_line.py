"""What every command shares: flags into a checked config, errors into a message and an exit code.

Exit codes: 0 done, 1 a failure inside, 2 bad usage, config or input, 3 the run diverged,
4 the workdir is held by another run or no checkpoint in it is valid, 143 / 130 / 129 saved and stopped
on SIGTERM / SIGINT / SIGHUP, 141 whoever read the results has gone, as `head` does.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ml_collections import config_dict

from transformer.config import config_files, schema, validation, warm_start
from transformer.runtime import files, object_storage, streams
from transformer.runtime.errors import StoppedError, UserError
from transformer.runtime.logging import log_info, report_error, report_unraisable


def run(command: Callable[[list[str]], object]) -> None:
    """Runs a command on sys.argv; errors that a user can fix become one message and an exit code."""
    streams.prepare()
    sys.unraisablehook = report_unraisable
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as the package does when it is imported by a command
    code: int | str | None = 0
    try:
        command(sys.argv)
    except SystemExit as error:  # of argparse, which has printed why
        code = error.code
    except (Exception, StoppedError) as error:
        if object_storage.is_storage_error(error):
            error = UserError(f"object storage: {error}; check the address, the credentials and the network")
        code = report_error(error)
    try:
        sys.stdout.flush()
    except (OSError, UserError, StoppedError) as error:
        streams.discard_results()
        code = code or report_error(error)
    if code:
        sys.exit(code)


HUGE_PAGES = "glibc.malloc.hugetlb=1"
KEEP_MEMORY = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1073741824:glibc.malloc.arena_max=1"


def reexec_with_malloc_settings() -> None:
    """The first thing a training command does: restarts with settings that glibc reads at the start of a process alone.

    XLA's CPU back end takes its buffers from malloc at every step and gives them back. With small pages a third of a
    training step's CPU time went into page faults; with huge pages a sixth into zeroing memory that the process had
    just given back to the system, unless malloc keeps it (docs/log.md, 2026-11-20 and 2026-11-30).
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = HUGE_PAGES if _may_have_accelerator() else f"{HUGE_PAGES}:{KEEP_MEMORY}"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _may_have_accelerator() -> bool:
    """Whether JAX may find a GPU or TPU: its plugin is installed, and not only the CPU is asked for."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return False
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return bool(plugins) or importlib.util.find_spec("libtpu") is not None


def command_parser(prog: str, doc: str | None, **options: Any) -> argparse.ArgumentParser:
    """A parser for a command; the first line of `doc` says what it does."""
    return argparse.ArgumentParser(prog=prog, description=(doc or "").split("\n")[0], allow_abbrev=False, **options)


def config_parser(prog: str, doc: str | None, required: str = "", resumes: bool = False) -> argparse.ArgumentParser:
    """A parser for a command that takes a config, which `parse_with_config` reads.

    Args:
      prog: name of the command.
      doc: begins with what it does.
      required: flags that it needs besides.
      resumes: whether --workdir alone names the config.
    """
    config = "[--config=FILE]" if resumes else "--config=FILE"
    parser = command_parser(
        prog,
        doc,
        usage=" ".join(filter(None, (prog, config, required, "[--config.SECTION.FIELD=VALUE ...] [options]"))),
        epilog=f"Fields of the config, with defaults and bounds:\n\n{schema.field_help()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    own = ", ".join(config_files.shipped())
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="config file, or FILE:NAME, which is Python and runs; or the config.json of a workdir. "
        f"{'Not needed to resume the run of --workdir. ' * resumes}The project's own: {own}",
    )
    parser.add_argument("--print_config", action="store_true", help="print the whole config as JSON, and end")
    return parser


def parse_with_config(
    parser: argparse.ArgumentParser, argv: list[str], needs_data: bool = True
) -> tuple[schema.Config, argparse.Namespace]:
    """The config and the other flags; ends with code 0 for --help and --print_config, which need no other flags.

    Raises:
      UserError: as `config_flags`, or a flag names a field without `config.` before it.
    """
    if {"-h", "--help"} & set(argv):
        parser.parse_args(["--help"])
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--workdir", nargs="?")  # `parser` complains of one without a value
    finder.add_argument("--print_config", action="store_true")
    found, _ = finder.parse_known_args(argv)
    config, rest = config_flags(argv, needs_data and not found.print_config, found.workdir or "")
    for flag in rest:
        if re.match(rf"--({'|'.join(schema.SECTIONS)})\.", flag):
            raise UserError(f"{flag}: unknown flag; did you mean --config.{flag.removeprefix('--')}?")
    if found.print_config:
        print(config.to_json(), end="")
        raise SystemExit(0)
    for flag in parser.parse_known_args(rest)[1]:
        name = flag.removeprefix("--").partition("=")[0]
        if sections := [section for section in schema.SECTIONS if name in schema.field_names(section)]:
            raise UserError(f"--{name}: unknown flag; did you mean --config.{sections[0]}.{name}?")
    return config, parser.parse_args(rest)


def model_parser(
    prog: str,
    doc: str | None,
    epilog: str = "--decode.FIELD=VALUE sets any field of the decode section of transformer/config/schema.py.",
) -> argparse.ArgumentParser:
    """A parser for a command on a trained model: --workdir and --checkpoint; `decode_flags` reads --decode.FIELD."""
    parser = command_parser(prog, doc, epilog=epilog)
    parser.add_argument("--workdir", required=True, type=absolute_path, help="folder that train.py wrote")
    parser.add_argument(
        "--checkpoint", default="latest", help="latest (default), best, a step, average:N or best-average:N"
    )
    return parser


def add_direction_flags(parser: argparse.ArgumentParser) -> None:
    """--source_language and --target_language, which choose a direction of a model of several."""
    parser.add_argument("--source_language", help="of a model of several directions: code of the source language")
    parser.add_argument("--target_language", help="of a model of several directions: code of the target language")


def add_ensemble_flag(parser: argparse.ArgumentParser) -> None:
    """--ensemble, whose workdirs `inference.load` takes."""
    parser.add_argument(
        "--ensemble",
        type=absolute_paths,
        default=[],
        help="more workdirs of the same tokenizer, commas between: the models' probabilities are averaged",
    )


def add_metrics_flag(parser: argparse.ArgumentParser, default: str) -> None:
    """--metrics, an EvalConfig."""
    parser.add_argument(
        "--metrics",
        type=lambda text: validation.to_dataclasses({"eval": {"metrics": text}}).eval,
        help=f"with commas between, of {', '.join(schema.METRIC_NAMES)} (default: {default})",
    )


def add_test_set_flags(parser: argparse.ArgumentParser, split_of: str) -> None:
    """--split, --source, --reference and --test_set, which `check_test_set_flags` checks.

    Args:
      split_of: whose splits --split names, for the help.
    """
    parser.add_argument("--split", help=f"split of {split_of}, such as val (default: test)")
    parser.add_argument("--source", type=absolute_path, help="text file of sources instead, one sentence a line")
    parser.add_argument(
        "--reference", type=absolute_paths, default=[], help="its references; several files with commas between"
    )
    parser.add_argument(
        "--test_set", help="public test set instead, by sacreBLEU's name, such as wmt14/full; fetched by sacreBLEU"
    )


def check_test_set_flags(args: argparse.Namespace) -> None:
    """Raises a UserError if the flags name several test sets, or a public one that does not exist."""
    if args.reference and args.split:
        raise UserError("expected --split, or files of --source and --reference, got both")
    if args.test_set is not None:
        if others := [f"--{flag}" for flag in ("split", "source", "reference") if getattr(args, flag)]:
            raise UserError(
                f"--test_set replaces --split, and --source with --reference; leave out {' and '.join(others)}"
            )
        from transformer.evaluation import public_test_sets

        public_test_sets.check_name(args.test_set)


def config_flags(argv: list[str], needs_data: bool = True, workdir: str = "") -> tuple[schema.Config, list[str]]:
    """Reads --config=FILE and its --config.SECTION.FIELD=VALUE overrides; returns the rest of the arguments too.

    The order of the flags does not matter. FILE may end in :NAME, which its `get_config` then receives, or be the
    config.json of a workdir; without --config that of `workdir` is read. JAX is not imported, unless the config file
    does. Without `needs_data` the config may leave open where its text is. A flag that selects, such as
    --config.model.family, leaves out what the file sets for other choices and logs it. A run that has begun in
    `workdir` takes the sizes that it leaves to `train.init_from` from there.

    Raises:
      UserError: no such file, an error inside it, an unknown field, or a value that cannot be.
    """
    mine, rest = split_flags(argv[1:], "config")
    given = [argument.partition("=")[2] for argument in mine if argument.startswith("--config=")]
    if not given and (saved := config_files.saved_path(workdir)):
        given = [saved]
    if len(given) != 1 or not given[0]:
        unless = f"; {workdir} holds no run to resume" if workdir and not given else ""
        got = "an empty one" if given == [""] else len(given)
        raise UserError(f"expected one --config=FILE, such as --config=configs/demo.py, got {got}{unless}")
    overrides = [_override(argument) for argument in mine if not argument.startswith("--config=")]
    is_saved = given[0].endswith(".json")
    if is_saved:
        saved_config = validation.load(given[0])
        config = config_dict.ConfigDict(dataclasses.asdict(saved_config))
        config.model.update(saved_config.model.widths_of_emb_dim())
    else:
        config = config_files.load(os.path.expanduser(given[0]))
    with config.ignore_type():  # validation says what a field takes: 1 may be overridden by 0.5
        for section, field, value in overrides:
            config[section][field] = value
    flags = [(section, field) for section, field, _ in overrides]
    names = {f"{section}.{field}" for section, field in flags}
    values = validation.to_sections(config)
    if not is_saved:  # which leaves no size open
        values = warm_start.inherit_sizes(values, flags, workdir)
    checked, left_out = validation.reset_inapplicable(validation.to_dataclasses(values), names)
    validation.check_consistency(checked, needs_data, strict=not is_saved, given=names)
    if left_out:
        log_info(f"left out of {given[0]}, as nothing reads it with the flags given: {', '.join(left_out)}")
    return checked, rest


def decode_flags(argv: list[str]) -> tuple[dict[str, int | float | bool | str], list[str]]:
    """Reads --decode.FIELD=VALUE, each of which overrides a field of the checkpoint's config; the rest as well.

    Raises:
      UserError: an unknown field, or a value that is not of its type; bounds are checked with the config.
    """
    mine, rest = split_flags(argv[1:], "decode")
    fields = {}
    for argument in mine:
        name, _, text = argument.partition("=")
        if name == "--decode":
            raise UserError(f"{argument}: expected --decode.FIELD=VALUE, such as --decode.length_penalty=1")
        field = name.removeprefix("--decode.")
        fields[field] = _parse(name, "decode", field, text)
    return fields, rest


def split_flags(arguments: list[str], prefix: str) -> tuple[list[str], list[str]]:
    """The flags --PREFIX and --PREFIX.ANYTHING, each as one --name=value, and all others."""
    mine, rest = [], []
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        name = argument.partition("=")[0].lstrip("-")
        if not argument.startswith("-") or (name != prefix and not name.startswith(f"{prefix}.")):
            rest.append(argument)
            continue
        if "=" not in argument:
            if not queue or queue[0].startswith("--"):
                raise UserError(f"{argument}: expected a value, as in {argument}=VALUE")
            argument = f"{argument}={queue.pop(0)}"
        mine.append("--" + argument.lstrip("-"))
    return mine, rest


def _override(argument: str) -> tuple[str, str, Any]:
    """Section, field and value of one --config.SECTION.FIELD=VALUE."""
    name, _, text = argument.partition("=")
    parts = name.removeprefix("--config.").split(".")
    validation.reject_unknown_fields("config", parts[:1], list(schema.SECTIONS))
    if len(parts) != 2:
        raise UserError(f"{argument}: expected --config.SECTION.FIELD=VALUE")
    section, field = parts
    return section, field, _parse(name, section, field, text)


def _parse(flag: str, section: str, field: str, text: str) -> Any:
    """The value of a flag in the type of its field."""
    validation.reject_unknown_fields(f"config.{section}", [field], schema.field_names(section))
    kind = type(schema.field_default(section, field))
    try:
        return PARSERS[kind](text)
    except (ValueError, KeyError, OverflowError) as error:
        expected = "a list in JSON" if kind is tuple else kind.__name__
        raise UserError(f"{flag}: expected {expected}, got {text!r}") from error


def _parse_int(text: str) -> int:
    """Also 1e5, which is whole."""
    value = float(text)
    return int(text) if value != int(value) or abs(value) >= 2**53 else int(value)


def _parse_list(text: str) -> tuple:
    """A list in JSON."""
    value = json.loads(text)
    if not isinstance(value, list):
        raise ValueError(text)
    return tuple(value)


PARSERS: dict[type, Callable[[str], Any]] = {
    int: _parse_int,
    float: float,
    bool: lambda text: {"true": True, "1": True, "false": False, "0": False}[text.lower()],
    str: str,
    tuple: _parse_list,
}


def absolute_path(text: str) -> str:
    """The argparse type of every path: made absolute, ~ expanded, or an address such as gs://bucket/run."""
    try:
        return files.usable_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(f"{error}") from None


def absolute_paths(text: str) -> list[str]:
    """The argparse type of several paths, commas between; commas within one are kept where only that path exists."""
    parts = text.split(",")
    return [absolute_path(one) for one in _existing_paths(parts) or parts]


def _existing_paths(parts: list[str]) -> list[str]:
    """The parts, with commas put back so that each path exists, as few as possible; nothing where that fails."""
    for count in range(1, len(parts) + 1):
        path, rest = ",".join(parts[:count]), parts[count:]
        if object_storage.is_remote(path) or os.path.exists(os.path.expanduser(path)):
            others = _existing_paths(rest)
            if others or not rest:
                return [path, *others]
    return []


def reject_overwriting(output: str | None, read: Iterable[str | None]) -> None:
    """Raises a UserError if --output is one of the files that the command reads."""
    if output and os.path.realpath(output) in map(os.path.realpath, filter(None, read)):
        raise UserError(f"--output={output} would overwrite what is read; name another file")


def positive_int(text: str) -> int:
    """An argparse type."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def add_process_flags(parser: argparse.ArgumentParser) -> None:
    """The flags by which a process learns of the others."""
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="where the others reach process 0 of several")
    parser.add_argument("--num_processes", type=positive_int, help="how many processes there are")
    parser.add_argument("--process_id", type=int, help="which of them this is, from 0")
    parser.add_argument(
        "--host_timeout",
        type=positive_int,
        default=300,
        metavar="SECONDS",
        help="a process that does not join in this time, or is silent for so long, ends the run (default: 300)",
    )
    parser.add_argument(
        "--lost_host_exit_code",
        type=positive_int,
        default=1,
        metavar="CODE",
        help="exit code of the others then, by which a scheduler can tell it from a failure inside (default: 1)",
    )


def markdown_table(heads: Sequence[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """The lines of a Markdown table."""
    head, *body = (f"| {' | '.join(map(str, row))} |" for row in (heads, *rows))
    return [head, "|" + "---|" * len(heads), *body]
