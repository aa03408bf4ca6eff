"""train.py, which notes the examples of each batch, and validates nothing: python -m tests.helpers.recorder FILE FLAGS…

A line for each update: the step, counted from 0, the numbers of this host's rows, and the example of each.
"""

import collections
import json
import sys

import train
from transformer import command_line
from transformer.data import input_pipeline
from transformer.training import trainer

made = collections.deque()
select_rows, train_iterator = input_pipeline.select_rows, input_pipeline.train_iterator


def noted_rows(planned, rows):
    taken = select_rows(planned, rows)
    made.append((rows.tolist(), taken.examples_B.tolist()))
    return taken


def noted_iterator(*args, start, **kwargs):
    for step, batch in enumerate(train_iterator(*args, start=start, **kwargs), start):
        with open(file, "a") as record:
            record.write(json.dumps([step, *made.popleft()]) + "\n")
        yield batch


if __name__ == "__main__":
    file = sys.argv.pop(1)
    input_pipeline.select_rows, input_pipeline.train_iterator = noted_rows, noted_iterator
    trainer.TrainingLoop.evaluate = lambda *args: None
    command_line.run(train.main)
