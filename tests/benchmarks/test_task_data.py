"""The data of docs/tasks.md: the same everywhere, no sentence in two splits, and answers that the sources hold."""

import itertools
import random
import re

import pytest

from benchmarks import task_data

every_task = pytest.mark.parametrize("name", task_data.TASKS)


def pairs(name, split, count=300):
    return list(itertools.islice(task_data.examples(task_data.TASKS[name], split), count))


def sentences(name, split):
    """All sentences of the sources; not the questions, which are of few kinds."""
    texts = (source.split("context: ")[-1] for source, _ in pairs(name, split))
    return {sentence for text in texts for sentence in re.split(r"(?<=[.?]) (?=[A-Z])", text)}


@every_task
def test_no_sentence_is_in_two_splits(name):
    train, val, test = (sentences(name, split) for split in task_data.SPLIT_SIZES)
    assert min(map(len, (train, val, test))) > 300
    assert not train & val
    assert not train & test
    assert not val & test


@every_task
def test_pairs_are_the_same_in_every_run_and_each_once(name):
    found = pairs(name, "val")
    assert found == pairs(name, "val")
    assert len({source for source, _ in found}) == len(found)


@every_task
def test_files_have_the_extensions_of_the_config(name, tmp_path):
    task = task_data.TASKS[name]
    task_data.write(task, tmp_path, {"train": 50, "val": 5, "test": 10})
    files = {path.name: path.read_text().splitlines() for path in tmp_path.iterdir()}
    sides = {f"{split}.{end}" for split in ("train", "val", "test") for end in (task.source, task.target)}
    assert set(files) == {*sides, "baseline.txt"}
    assert len(files["baseline.txt"]) == len(files[f"test.{task.target}"]) == 10


def test_baselines_are_trivial_answers():
    data = {"train": [("a b", "x"), ("c", "y"), ("d", "y")], "test": [("e f", "x"), ("g", "y")]}
    assert task_data.most_frequent(data) == ["y", "y"]
    assert task_data.first_words(data) == ["e", "g"]


def test_answers_are_in_their_contexts():
    for source, answer in pairs("question_answering", "train"):
        question, context = source.split(" context: ")
        assert question.startswith("question: ")
        assert answer.lower() in context.lower()


def test_labels_are_balanced_and_those_of_the_main_clause():
    labels = [label for _, label in pairs("sentiment", "train")]
    assert 100 < labels.count("positive") < 200
    contrasts = 0
    for source, label in pairs("sentiment", "train"):
        if match := re.search(r"(?:\. |, but |; still, )([Tt]he [^,;]*)(?:, even though [^,;]*)?\.$", source):
            aspect, rest = re.fullmatch(r"([Tt]he \w+) (was .*)", match[1]).groups()
            negated = any(rest.startswith(negation) for negation in task_data.NEGATIONS)
            praised = rest.split()[-1] in task_data.ASPECTS[aspect.lower()][0].split()
            assert (praised != negated) == (label == "positive"), source
            contrasts += 1
    assert contrasts > 30


def test_the_second_fact_has_other_values():
    """So the question has one answer."""
    rng = random.Random("facts")
    for _ in range(200):
        _, values = task_data._sentence(rng, "train", "{one} was born in {city} on {past}.")
        _, others = task_data._sentence(rng, "train", "{one} bought {things} for {price} in {city}.", values)
        assert values["one"] != others["one"]
        assert values["city"] != others["city"]
