"""Trains a base config and named changes of it, several seeds each: one table, one plot; resumable.

    python -m benchmarks.ablation --config=configs/demo.py --changes=benchmarks/changes/demo.py --output=runs/ablation
        [--seeds=2] [--equal=flops] [--only=base,rms] [--split=test] [--checkpoint=latest] [--check]
        [--config.SECTION.FIELD=VALUE …]

The changes file is Python: `get_changes(base)` returns name → fields, see benchmarks/changes/. Each change differs from
the base in these fields alone. All have the base's number of updates, or with --equal=flops as many as cost the base's
FLOPs. --check checks every change, prints the plan and trains nothing.

Each run is train.py and then eval.py, one run at a time, in a workdir DIR/CHANGE/seedN with a log beside it. What is
finished is kept: the same command continues after an interruption, and adds seeds or changes. A run that fails is a row
with its reason, tried again by the same command; the exit code is then 1. After every run DIR gets ablation.md,
results.json, ablation.svg, and curves by time and FLOPs. Processes with different --only may share DIR. The last line
of stdout is one JSON object.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from etils import epath

from benchmarks import ablation_plan, ablation_table
from benchmarks.ablation_plan import BASE, Variant
from benchmarks.ablation_table import Figures, Row
from benchmarks.flag_lists import known_names
from transformer import command_line
from transformer.config import Config, mixture, schema, validation
from transformer.data import corpus
from transformer.evaluation.metrics import METRICS
from transformer.evaluation.significance import PairedTestResult
from transformer.runtime import object_storage, progress, signals
from transformer.runtime.errors import StoppedError, UserError, WorkdirError
from transformer.runtime.files import METRICS_FILE, check_writable, read_json_lines, write_atomic
from transformer.runtime.logging import log_error, log_info
from transformer.training import workdir as workdirs

ROOT = pathlib.Path(__file__).parent.parent
TRAIN, EVAL = (str(ROOT / name) for name in ("train.py", "eval.py"))
POLL_S, RATE = 1.0, "train/target_tokens_per_s"


class Run(NamedTuple):
    """A config with a seed, trained in a folder of its own.

    Attributes:
      workdir: of train.py; all other files of the run have its name and an ending.
    """

    name: str
    seed: int
    config: Config
    workdir: epath.Path

    def file(self, ending: str) -> epath.Path:
        """A file of the run beside its workdir."""
        return self.workdir.parent / f"{self.workdir.name}.{ending}"

    def step(self) -> int:
        """The last update that is logged, 0 without any."""
        return max((row["step"] for row in read_json_lines(self.workdir / METRICS_FILE)), default=0)


class RunFailedError(Exception):
    """A command of a run failed; says why."""


def main(argv: list[str]) -> None:
    """Checks all changes, trains and scores what is not finished; rewrites the table after each run."""
    args, base, flags = parse(argv)
    changes = ablation_plan.load_changes(args.changes, base, flags)
    names = known_names("--only", args.only, changes) if args.only else list(changes)
    variants = ablation_plan.plan(flags, changes, args.equal == "flops")
    corpus.open_corpus(ablation_plan.scored_data(base.data)).split(args.split)  # a missing one is an error now
    print(ablation_plan.format_plan(variants), flush=True)
    ablation = Ablation(args, variants)
    if args.check:
        print(json.dumps(ablation.results()))
        return
    ablation.run(names)
    print(f"\n{ablation.table()}")
    print(json.dumps(ablation.results()))
    if failed := ", ".join(f"{name} seed {seed}" for name, seeds in ablation.failed.items() for seed in seeds):
        log_error(f"failed: {failed}; {args.output} has the logs, and the same command tries them again")
        raise SystemExit(1)


def parse(argv: list[str]) -> tuple[argparse.Namespace, Config, list[str]]:
    """The flags, the base config without what the changes file sets in it, and the flags that it is made of."""
    parser = command_line.config_parser("python -m benchmarks.ablation", __doc__, "--changes=FILE --output=DIR")
    path = command_line.absolute_path
    own = ", ".join(ablation_plan.shipped())
    parser.add_argument("--changes", required=True, metavar="FILE", help=f"with get_changes. The project's own: {own}")
    parser.add_argument("--output", required=True, type=path, help="folder of all runs and results")
    parser.add_argument("--seeds", type=command_line.positive_int, default=1, help="runs of each change (default: 1)")
    parser.add_argument(
        "--equal", choices=["updates", "flops"], default="updates", help="cost of all runs (default: updates)"
    )
    parser.add_argument("--only", default="", help="names to train, commas between (default: all)")
    parser.add_argument("--split", default="test", help="that is scored (default: test)")
    parser.add_argument("--checkpoint", default="latest", help="as in eval.py (default: latest)")
    parser.add_argument("--check", action="store_true", help="check every change, print the plan, train nothing")
    base, args = command_line.parse_with_config(parser, argv)
    if object_storage.is_remote(args.output):
        raise UserError(f"--output={args.output}: expected a local folder, which logs are written to")
    return args, base, command_line.split_flags(argv[1:], "config")[0]


class Ablation:
    """All runs of an ablation and their results.

    Attributes:
      metric: that is compared, the first of eval.metrics.
      finished: figures by change and seed; also of seeds that other commands trained.
      failed: reasons by change and seed.
    """

    def __init__(self, args: argparse.Namespace, variants: Mapping[str, Variant]):
        self._args, self._variants, self._output = args, variants, epath.Path(args.output)
        self.metric = variants[BASE].config.eval.metric_names[0]
        self._result = f"{args.split}.{args.checkpoint}"  # in the names of files: another one is another result
        self.finished: dict[str, dict[int, Figures]] = {name: {} for name in variants}
        self.failed: dict[str, dict[int, str]] = {name: {} for name in variants}
        self._load()

    def _load(self) -> None:
        """Reads what is finished, also what was trained elsewhere, with the data in another folder.

        Raises:
          UserError: a result has another config.
        """
        for name, finished in self.finished.items():
            for path in sorted((self._output / name).glob(f"seed*.{self._result}.json")):
                saved, run = json.loads(path.read_text()), self._run(name, int(path.name[4:].partition(".")[0]))
                found = schema.diff(validation.validate(saved["config"], strict=False), run.config)
                if changes := [change for change in found if not mixture.moves_data_only(change)]:
                    raise UserError(
                        f"{path}: has another config: {'; '.join(map(str, changes))}. Choose another --output, or "
                        "delete that folder"
                    )
                finished[run.seed] = saved["figures"]

    def _run(self, name: str, seed: int) -> Run:
        config = validation.replace_field(self._variants[name].config, "train.seed", seed)
        return Run(name, seed, config, self._output / name / f"seed{seed}")

    def run(self, names: Iterable[str]) -> None:
        """Trains and scores what is not finished, a seed of all changes before the next seed."""
        first = self._variants[BASE].config.train.seed
        runs = [self._run(name, first + i) for i in range(self._args.seeds) for name in names]
        missing = [run for run in runs if run.seed not in self.finished[run.name]]
        check_writable(self._output / "results.json", f"--output={self._output}")
        log_info(f"{len(runs)} runs, {len(runs) - len(missing)} of them finished before")
        done = sum(run.step() for run in missing)
        phase = progress.Phase("ablation", sum(run.config.train.num_steps for run in missing), "updates", done)
        self.save()
        with progress.shown(phase):
            for number, run in enumerate(missing, 1):
                title = phase.note = f"run {number} of {len(missing)}: {run.name}, seed {run.seed}"
                others = phase.completed - run.step()

                def show(run: Run = run, others: int = others) -> None:
                    phase.completed = others + run.step()

                try:
                    figures = self.train_and_score(run, show)
                    log_info(f"{title}: {METRICS[self.metric].label} {figures[self.metric]:.2f}")
                except RunFailedError as error:
                    self.failed[run.name][run.seed] = str(error)
                    log_info(f"{title}: failed, continuing with the others: {error}")
                phase.completed = others + run.config.train.num_steps
                self.save()

    def train_and_score(self, run: Run, tick: Callable[[], None]) -> Figures:
        """Trains, or resumes the training of a run, and evaluates it.

        Raises:
          RunFailedError: one of the two commands failed.
        """
        run.workdir.parent.mkdir(parents=True, exist_ok=True)
        config, translations, log = run.file("config.json"), run.file(f"{self._result}.txt"), run.file("log")
        write_atomic(config, run.config.to_json())
        wait_for_lock(run.workdir)
        call([TRAIN, f"--config={config}", f"--workdir={run.workdir}"], log, tick)
        which = f"--checkpoint={self._args.checkpoint}", f"--split={self._args.split}"
        printed = call([EVAL, f"--workdir={run.workdir}", *which, f"--output={translations}"], log, tick)
        logged = read_json_lines(run.workdir / METRICS_FILE)
        rates = [row[RATE] for row in logged if RATE in row]
        if not rates:
            raise RunFailedError("it ended before a speed was logged; lower train.log_every_steps")
        points = ablation_table.curve(logged, f"valid/{self.metric}")
        figures = json.loads(printed.splitlines()[-1]) | {
            "target_tokens_per_s": statistics.median(rates),
            "curve": points,
        }
        result = {"figures": figures, "config": dataclasses.asdict(run.config)}
        write_atomic(run.file(f"{self._result}.json"), json.dumps(result, indent=1) + "\n")
        return figures

    def rows(self) -> list[Row]:
        """The base and the changes, in the order of the changes file."""
        return [
            Row(name, variant, self.finished[name], self.failed[name], self._test(name))
            for name, variant in self._variants.items()
        ]

    def _test(self, name: str) -> PairedTestResult | None:
        """The test of a change's median seed and the base's."""
        if name == BASE or not self.finished[name] or not self.finished[BASE]:
            return None
        seeds = {each: ablation_table.median_seed(self.finished[each], self.metric) for each in (name, BASE)}
        files = (self._run(*each).file(f"{self._result}.txt") for each in seeds.items())
        data = ablation_plan.scored_data(self._variants[BASE].config.data)
        return ablation_table.paired_test(*files, data, self._args.split, self.metric)

    def table(self) -> str:
        """The results as Markdown, with the conditions."""
        args = self._args
        conditions = f"- Equal {args.equal}; split {args.split}; checkpoint {args.checkpoint}."
        return f"{ablation_table.table(self.rows(), self.metric)}\n{conditions}"

    def results(self) -> dict[str, Any]:
        """All results by change."""
        return {row.name: row.as_json(self.metric) for row in self.rows()}

    def save(self) -> None:
        """Writes tables and plots of the results so far, with those of other processes."""
        self._load()
        write_atomic(self._output / "results.json", json.dumps(self.results(), indent=1) + "\n")
        write_atomic(self._output / "ablation.md", self.table() + "\n")
        ablation_table.draw(self._output, self.rows(), self.metric)


def wait_for_lock(workdir: epath.Path) -> None:
    """Waits while another process trains in the workdir, such as one whose ablation was killed."""
    with progress.phase(f"waiting for another process that trains in {workdir}"):
        while True:
            with contextlib.suppress(WorkdirError):
                workdirs.acquire_lock(workdir).close()
                return
            time.sleep(POLL_S)


def call(command: list[str], log: epath.Path, tick: Callable[[], None]) -> str:
    """Runs a command of this project with stderr appended to a log, and returns its stdout.

    Args:
      command: file and flags.
      log: a file.
      tick: called every second.

    Raises:
      RunFailedError: it failed.
      StoppedError: this process received a stop signal, which the command received too.
    """
    received = []
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.PIPE, stderr=file, text=True, start_new_session=True
        )

        def forward(number: int, _: object) -> None:
            received.append(number)
            process.send_signal(number)

        with signals.handling(forward):
            try:
                while True:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        printed, _ = process.communicate(timeout=POLL_S)
                        break
                    tick()
            finally:
                process.kill()
    if received:
        raise StoppedError(received[0], f"stopped by {signal.Signals(received[0]).name}; run again to resume")
    if process.returncode:
        raise RunFailedError(reason(command[0], process.returncode, log))
    return printed


def reason(command: str, code: int, log: epath.Path) -> str:
    """Why a command failed: its signal, or the last line of its log."""
    name = os.path.basename(command)
    if code < 0:
        return f"{name} was ended by {signal.Signals(-code).name}"
    lines = log.read_bytes().decode(errors="replace").strip().splitlines()
    message = lines[-1].removeprefix(f"{name}: ") if lines else ""
    return f"{name}, exit code {code}: {message}"


if __name__ == "__main__":
    command_line.run(main)
