"""Generates small data sets for text-to-text tasks other than translation: docs/tasks.md trains a model on each.

    python -m benchmarks.task_data [--output=runs/tasks]

Writes one folder for each task, which `configs/tasks.py:TASK` reads, with train, val and test files and `baseline.txt`:
a trivial answer to each line of the test file, for `eval.py --versus`. The sentences have the values of the data set
`cldr`: dates, times, prices, cities, countries and languages of the Unicode CLDR. Each of them is in one split only, so
a test article, review or context has no sentence that training has.
"""

import argparse
import collections
import itertools
import pathlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from transformer.command_line import run
from transformer.data.cldr import generator
from transformer.data.cldr.generator import Value, choice
from transformer.data.cldr.grammar import Template
from transformer.runtime.files import write_atomic
from transformer.runtime.logging import log_info

SPLIT_SIZES = {"train": 20_000, "val": 500, "test": 1_000}
SPLIT_SHARES = {"train": 0.8, "val": 0.9, "test": 1.0}  # upper bounds of the hashes of sentences

Pair = tuple[str, str]

# A sentence of the news and its headline.
NEWS = (
    ("Because too few tickets were sold, {event:the} in {city} was moved from {weekday} to {weekday2}.",
     "{city}: {event:the} moved to {weekday2}"),
    ("The government said on {weekday} that prices in {country} rose by {percent} in {year}.",
     "{country}: prices up {percent}"),
    ("According to the police, {many} people came to {event:the} in {city} on {weekday}.",
     "{many} people at {event:the} in {city}"),
    ("A collector from {country} paid {sum} for {thing:a} at an auction in {city}.",
     "{thing:a} sold for {sum}"),
    ("After a fire on {weekday}, {place:the} in {city} will stay closed until {coming}.",
     "{city}: {place:the} closed until {coming}"),
    ("The airline announced that its planes will fly from {city} to {country} from {soon} on.",
     "New flights from {city} to {country}"),
    ("With {inhabitants} inhabitants, {city} is now larger than {city2}, as was reported on {weekday}.",
     "{city} larger than {city2}"),
    ("The minister wants all schools in {country} to teach {language} from {soon} on.",
     "{country}: {language} for all schools"),
    ("Heavy snow stopped all trains between {city} and {city2} on {weekday} for {hours}.",
     "No trains from {city} to {city2} for {hours}"),
    ("The king of {country}, who had ruled for {years} years, died on {past}.",
     "{country}: king dies after {years} years"),
)  # fmt: skip

# A sentence, and questions with their answers.
FACTS = {
    "{one} was born in {city}.": [("Where was {one} born?", "{city}")],
    "{one} bought {thing:a} in {city}.": [("Where did {one} buy something?", "{city}")],
    "{one} traveled from {country} to {country2}.": [
        ("Where did {one} travel to?", "{country2}"),
        ("Where did {one} come from?", "{country}"),
    ],
    "{one} speaks {language} but does not understand {language2}.": [
        ("Which language does {one} speak?", "{language}"),
        ("Which language does {one} not understand?", "{language2}"),
    ],
    "The train to {city} leaves from platform {small} on {weekday}.": [
        ("When does the train to {city} leave?", "{weekday}"),
        ("From which platform does the train to {city} leave?", "{small}"),
    ],
    "{event:the} was moved from {weekday} to {weekday2}.": [
        ("From which day was {event:the} moved?", "{weekday}"),
        ("To which day was {event:the} moved?", "{weekday2}"),
    ],
}

# What a review speaks of, with adjectives of praise and of blame.
ASPECTS = {
    "the staff": ("friendly polite helpful attentive", "rude slow unfriendly careless"),
    "the room": ("clean quiet bright comfortable", "dirty noisy dark uncomfortable"),
    "the food": ("fresh delicious tasty excellent", "cold bland stale awful"),
    "the bill": ("correct reasonable fair low", "wrong excessive unfair high"),
    "the view": ("beautiful impressive lovely great", "ugly boring sad disappointing"),
    "the music": ("pleasant relaxing lively soft", "annoying loud terrible dull"),
    "the website": ("clear simple modern reliable", "confusing broken outdated misleading"),
}
NEGATIONS = ("was not", "was never", "was anything but")
AFFIRMATIONS = ("was", "was really", "was quite", "was always")
AGREEMENTS = ("{main}, and {other}", "{main}; also, {other}", "{main}, just as {other}")
# The verdict is that of {main}; {other} says the opposite.
CONTRASTS = (
    "{other}, but {main}", "although {other}, {main}", "{main}, even though {other}", "{other}; still, {main}",
    "despite the fact that {other}, {main}", "{main}, which matters more than that {other}",
)  # fmt: skip
OPENINGS = (
    "We stayed at the hotel in {city} {lapse:ago}", "{who} recommended this restaurant in {city} to us",
    "The night cost {price}", "We reserved a table for {small} people on {weekday} at {time}",
    "This was my {ordinal} visit to {city}",
)  # fmt: skip


def _render(text: str, values: Mapping[str, Value]) -> str:
    used = {slot: values[slot] for slot in generator.slots_of(text)}
    return generator.render(Template(text, "", "", ""), used, "en")


def split_of(sentence: str) -> str:
    """The split that a sentence belongs to, by its hash."""
    position = generator.split_position(sentence)
    return next(name for name, bound in SPLIT_SHARES.items() if position < bound)


def _sentence(rng: random.Random, split: str, text: str, taken: Mapping[str, Value] | None = None) -> tuple[str, dict]:
    """A sentence of a split, and the values of its slots, none of which is as in `taken`."""
    while True:
        values = generator.sample_values(generator.slots_of(text), rng)
        sentence = _render(text, values)
        if split_of(sentence) == split and not any((taken or {}).get(slot) == value for slot, value in values.items()):
            return sentence, values


def _shuffled(rng: random.Random, items: Sequence[str]) -> list[str]:
    return [item for _, item in sorted((rng.random(), item) for item in items)]


def summarization(rng: random.Random, split: str) -> Pair:
    """A sentence of the news among two others → its headline."""
    text, headline = choice(rng, NEWS)
    news, values = _sentence(rng, split, text)
    others = [_sentence(rng, split, choice(rng, generator.TEMPLATES).en)[0] for _ in range(2)]
    return " ".join(_shuffled(rng, [news, *others])), _render(headline, values)


def _clause(rng: random.Random, aspect: str, positive: bool) -> str:
    negated = rng.random() < 0.3
    adjectives = ASPECTS[aspect][positive == negated].split()
    return f"{aspect} {choice(rng, NEGATIONS if negated else AFFIRMATIONS)} {choice(rng, adjectives)}"


def sentiment(rng: random.Random, split: str) -> Pair:
    """A review of two clauses, perhaps negated, half the time praise and blame → the polarity of its main clause."""
    positive, contrast = rng.random() < 0.5, rng.random() < 0.5
    opening, _ = _sentence(rng, split, choice(rng, OPENINGS))
    while True:
        main, other = _shuffled(rng, list(ASPECTS))[:2]
        clauses = {"main": _clause(rng, main, positive), "other": _clause(rng, other, positive != contrast)}
        verdict = choice(rng, CONTRASTS if contrast else AGREEMENTS).format(**clauses)
        if split_of(verdict) == split:
            return f"{opening}. {verdict[0].upper()}{verdict[1:]}.", "positive" if positive else "negative"


def question_answering(rng: random.Random, split: str) -> Pair:
    """A question and two facts → the answer, from one of them; half the time both are of one kind."""
    text, other = choice(rng, list(FACTS)), choice(rng, list(FACTS))
    fact, values = _sentence(rng, split, text)
    distractor, _ = _sentence(rng, split, text if rng.random() < 0.5 else other, values)
    question, answer = choice(rng, FACTS[text])
    context = " ".join(_shuffled(rng, [fact, distractor]))
    return f"question: {_render(question, values)} context: {context}", _render(answer, values)


def most_frequent(pairs: Mapping[str, Sequence[Pair]]) -> list[str]:
    """The most frequent target of training."""
    ((target, _),) = collections.Counter(target for _, target in pairs["train"]).most_common(1)
    return [target] * len(pairs["test"])


def first_words(pairs: Mapping[str, Sequence[Pair]]) -> list[str]:
    """The first words of each source, as many as the targets of training have on average."""
    count = round(sum(len(target.split()) for _, target in pairs["train"]) / len(pairs["train"]))
    return [" ".join(source.split()[:count]) for source, _ in pairs["test"]]


class Task(NamedTuple):
    """A task: the extensions of its files, the generator of its pairs, and a trivial answer to each line of test."""

    source: str
    target: str
    generate: Callable[[random.Random, str], Pair]
    baseline: Callable[[Mapping[str, Sequence[Pair]]], list[str]]


TASKS = {
    "summarization": Task("article", "summary", summarization, first_words),
    "sentiment": Task("review", "label", sentiment, most_frequent),
    "question_answering": Task("question", "answer", question_answering, most_frequent),
}


def examples(task: Task, split: str) -> Iterator[Pair]:
    """Yields pairs without end, each once; the same on every machine."""
    rng = random.Random(f"{task.source} {split}")
    seen: set[str] = set()
    while True:
        pair = task.generate(rng, split)
        if pair[0] not in seen:
            seen.add(pair[0])
            yield pair


def write(task: Task, folder: pathlib.Path, sizes: Mapping[str, int]) -> None:
    """Writes the files of a task."""
    pairs = {split: list(itertools.islice(examples(task, split), size)) for split, size in sizes.items()}
    folder.mkdir(parents=True, exist_ok=True)
    files = {f"{split}.{end}": [pair[i] for pair in pairs[split]] for split in pairs for i, end in enumerate(task[:2])}
    for name, lines in {**files, "baseline.txt": task.baseline(pairs)}.items():
        write_atomic(folder / name, "".join(f"{line}\n" for line in lines))
    log_info(f"{folder}: {', '.join(f'{len(pairs[split]):,} {split}' for split in pairs)}")


def main(argv: list[str]) -> None:
    """Parses the flags and writes all tasks."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.task_data", allow_abbrev=False)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/tasks"))
    args = parser.parse_args(argv[1:])
    for name, task in TASKS.items():
        write(task, args.output / name, SPLIT_SIZES)


if __name__ == "__main__":
    run(main)
