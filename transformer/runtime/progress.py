"""Progress of long phases on stderr: a bar on a terminal, a line every ten seconds elsewhere.

    with progress.phase("reading", total=1000, unit="pairs") as reading:
        reading.advance(10)

A thread shows it, so a phase may be one long call. Short phases show nothing. Phases may be nested: a terminal has a
bar for each, and lines are of the innermost; `Stages` are one bar for all within. Messages appear above the bars.
"""

import contextlib
import datetime
import os
import sys
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID
from rich.text import Text

from transformer.runtime import logging

LINE_INTERVAL_S = 10.0  # the longest time without a message
BAR_WIDTH = 16  # characters
BAR_DELAY_S = 1.0  # a shorter phase has no bar
TICK_S = 0.5
LEAST_STAGE_S = 0.5
BREAK_S = 1.0  # phases that follow each other sooner are one stretch of work

T = TypeVar("T")

_STEPS = 1000


class Phase:
    """A part of a command's work.

    Args:
      name: what is done.
      total: units of work in all; None if that is not known.
      unit: the plural of what is counted; empty if nothing is.
      completed: units done before the phase began.

    Attributes:
      note: shown after the count.
    """

    def __init__(self, name: str, total: int | None = None, unit: str = "", completed: int = 0):
        self.name, self.total, self.unit, self.completed, self.note = name, total, unit, completed, ""
        self._first, self._start, self._left_out = completed, logging.clock(), 0.0

    def advance(self, count: int = 1) -> None:
        """Adds to the units done."""
        self.completed += count

    def leave_out(self, seconds: float) -> None:
        """Takes seconds out of the rate by which the time left is computed."""
        self._left_out += seconds

    @property
    def seconds(self) -> float:
        """Since the start."""
        return logging.clock() - self._start

    @property
    def units_per_s(self) -> float | None:
        """The rate so far; None if that is not known: the first unit tells too little."""
        done, seconds = self.completed - self._first, self.seconds - self._left_out
        return done / seconds if done > 1 and seconds > 0 else None

    @property
    def seconds_left(self) -> float | None:
        """At the rate so far; None if that is not known: the first unit tells too little."""
        done = self.completed - self._first
        if not self.total or done <= 1:
            return None
        return max(self.seconds - self._left_out, 0.0) / done * max(self.total - self.completed, 0)

    def count(self) -> str:
        """Units done, and all if that is known; empty if nothing is counted."""
        count = f"{self.completed:,}" + (f"/{self.total:,}" if self.total else "")
        return f"{count} {self.unit}" if self.unit else ""

    def status(self) -> str:
        """Count, note, and the times elapsed and left."""
        left = self.seconds_left
        parts = [
            self.count(),
            self.note,
            f"{format_seconds(self.seconds)} elapsed",
            "" if left is None else f"{format_seconds(left)} left",
        ]
        return " · ".join(filter(None, parts))


class Stages(Phase):
    """The phases of a command that follow each other, shown as one with the time left of all.

    Args:
      name: of all.
      shares: stage → the share of the work that it is expected to take, in any unit.
    """

    def __init__(self, name: str, shares: Mapping[str, float]):
        super().__init__(name, total=_STEPS)
        self._shares, self._done, self._current, self._began = dict(shares), 0.0, "", self.seconds

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Makes a stage the current one for the block; one that takes no time, as all is there, is taken out."""
        self._current, self._began = name, self.seconds
        yield
        if self.seconds - self._began < LEAST_STAGE_S:
            del self._shares[name]
        else:
            self._done += self._shares[name]
        self._current = ""

    def update(self, inner: Sequence[Phase]) -> None:
        """Takes over what the phases within say."""
        within = next((phase for phase in inner if phase.total), None)
        share = min(within.completed / within.total, 1) if within and within.total else 0.0
        done = self._done + share * self._shares.get(self._current, 0.0)
        self.completed = round(_STEPS * done / max(sum(self._shares.values()), 1e-9))
        parts = [f"{inner[-1].name} {inner[-1].count()}".strip(), inner[-1].note] if inner else []
        self.note = " · ".join(filter(None, parts))

    def count(self) -> str:
        """In percent."""
        return f"{100 * self.completed / _STEPS:.0f}%"


def format_seconds(seconds: float) -> str:
    """As h:mm:ss."""
    return str(datetime.timedelta(seconds=round(seconds)))


def phase(name: str, total: int | None = None, unit: str = "") -> contextlib.AbstractContextManager[Phase]:
    """Shows a new phase for the block, in process 0; see `Phase`."""
    return shown(Phase(name, total, unit))


@contextlib.contextmanager
def shown(phase: Phase) -> Iterator[Phase]:
    """Shows a phase for the block, in process 0."""
    _display.add(phase)
    try:
        yield phase
    finally:
        _display.remove(phase)


def track(items: Iterable[T], name: str, total: int | None = None, unit: str = "") -> Generator[T]:
    """Yields the items as a phase that counts them."""
    with phase(name, total, unit) as current:
        for item in items:
            yield item
            current.advance(1)


def leave_out(seconds: float) -> None:
    """Takes seconds that do not recur, such as those of compilation, out of the time left of all phases."""
    _display.leave_out(seconds)


def names() -> list[str]:
    """The names of all phases, the innermost last; takes no lock, so that a signal handler may call it."""
    return [phase.name for phase in _display.phases]


def hidden() -> contextlib.AbstractContextManager[None]:
    """Clears the bars for the block, in which results are written to what may be the same terminal."""
    return _display.hidden()


class _Display:
    """The phases that are under way, and the thread that shows them."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.phases: list[Phase] = []
        self._bars: Progress | None = None
        self._tasks: dict[Phase, TaskID] = {}
        self._end = threading.Event()
        self._busy_since, self._last_end = 0.0, -BREAK_S

    def add(self, phase: Phase) -> None:
        if not logging.is_shown():
            return
        with self._lock:
            self.phases.append(phase)
            if len(self.phases) == 1:
                if logging.clock() - self._last_end >= BREAK_S:
                    self._busy_since = logging.clock()
                self._end = threading.Event()
                start_ticks(self._end)

    def remove(self, phase: Phase) -> None:
        with self._lock:
            if phase not in self.phases:
                return
            self.phases.remove(phase)
            task = self._tasks.pop(phase, None)
            if self._bars and task is not None:
                self._bars.remove_task(task)
            if not self.phases:
                self._last_end = logging.clock()
                self._end.set()
                self._stop_bars()

    def leave_out(self, seconds: float) -> None:
        with self._lock:
            for phase in self.phases:
                phase.leave_out(seconds)

    @contextlib.contextmanager
    def hidden(self) -> Iterator[None]:
        with self._lock:  # which keeps the thread from starting them again
            if self._bars and sys.stdout.isatty():
                self._stop_bars()
            yield

    def tick(self) -> None:
        """Redraws the bars, or logs a line if one is due."""
        with self._lock:
            if not self.phases:
                return
            if is_terminal():
                self._draw()
                return
            quiet_since = max(logging.last_message(), self._busy_since)
            if logging.clock() - quiet_since > LINE_INTERVAL_S - TICK_S:
                innermost = self._shown()[-1]
                logging.log_info(f"{innermost.name}: {innermost.status()}")

    def _shown(self) -> list[Phase]:
        """All phases, or the stages that hold them."""
        for index, phase in enumerate(self.phases):
            if isinstance(phase, Stages):
                phase.update(self.phases[index + 1 :])
                return self.phases[: index + 1]
        return self.phases

    def _draw(self) -> None:
        for phase in self._shown():
            if phase.seconds < BAR_DELAY_S:
                continue
            if self._bars is None:
                self._bars = _make_bars()
                self._bars.start()
            name, status, done = phase.name, phase.status(), phase.completed
            if phase in self._tasks:
                task = self._tasks[phase]
                self._bars.update(task, completed=done, total=phase.total, name=name, status=status)
            else:
                task = self._bars.add_task("", completed=done, total=phase.total, name=name, status=status)
                self._tasks[phase] = task

    def _stop_bars(self) -> None:
        self._tasks.clear()
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


def is_terminal() -> bool:
    """Whether stderr can show a bar."""
    is_tty = sys.stderr is not None and sys.stderr.isatty()
    return is_tty and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


class _Console(Console):
    """Leaves the cursor alone, which Ctrl-C would leave hidden, and drops what has no reader any more."""

    def show_cursor(self, show: bool = True) -> bool:
        """Called by rich."""
        return False

    def on_broken_pipe(self) -> None:
        """Called by rich, which would end the process."""
        self.quiet = True


class _TextColumn(ProgressColumn):
    """A field of a task as plain text."""

    def __init__(self, field: str):
        super().__init__()
        self._field = field

    def render(self, task: Task) -> Text:
        """Called by rich."""
        return Text(str(task.fields[self._field]))


def _make_bars() -> Progress:
    console = _Console(stderr=True, highlight=False, soft_wrap=True)
    columns = _TextColumn("name"), BarColumn(BAR_WIDTH), _TextColumn("status")
    # Results on stdout must not pass through the console, which writes to stderr.
    return Progress(*columns, console=console, transient=True, redirect_stdout=False)


def _tick_until(end: threading.Event) -> None:
    while not end.wait(TICK_S):
        with contextlib.suppress(OSError, ValueError):  # stderr was closed
            _display.tick()


def start_ticks(end: threading.Event) -> None:
    """Starts the thread that shows progress until the event; tests with a clock of their own replace it."""
    threading.Thread(target=_tick_until, args=(end,), name="progress", daemon=True).start()


_display = _Display()
