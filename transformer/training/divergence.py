"""What was in the batch that a run diverged at, for a person to look at."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from etils import epath

from transformer.data.batching import PADDING_ROW, TrainPlan
from transformer.data.corpus import Split
from transformer.distributed import multihost
from transformer.runtime.errors import DivergedError
from transformer.runtime.files import reported, write_whole

FILE = "diverged.json"


@contextlib.contextmanager
def dumped(workdir: epath.Path, plan: TrainPlan, split: Split) -> Iterator[None]:
    """Writes the batch of the update that a DivergedError names to WORKDIR/diverged.json, and passes the error on."""
    try:
        yield
    except DivergedError as error:
        if error.update is None:
            raise
        path = workdir / FILE
        _write(path, contents(plan, split, error))
        raise DivergedError(f"{error}. The sentence pairs of its batch are in {path}", error.update) from error


@multihost.lead_only
def _write(path: epath.Path, values: dict[str, Any]) -> None:
    with reported(f"{path}"):
        write_whole(path, json.dumps(values, ensure_ascii=False, indent=1) + "\n")


def contents(plan: TrainPlan, split: Split, error: DivergedError) -> dict[str, Any]:
    """The update, why, and the number in the training split and the text of each sentence pair of its batch."""
    examples = plan.batch((error.update or 1) - 1).examples_B
    numbers = examples[examples != PADDING_ROW].tolist()
    pairs = [{"number": number, "source": split[number][0], "target": split[number][1]} for number in numbers]
    return {"update": error.update, "why": str(error), "pairs": pairs}
