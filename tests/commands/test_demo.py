"""The demo, whole: what the README promises of it."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from transformer.data.cldr import generator


def run(*command, **options):
    """Stdout of a command run as people run it: one device, optimised, none of the strictness of other tests."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, **options).stdout


def train(workdir, source, target):
    """BLEU of the demo's test split."""
    languages = [f"--config.data.source_language={source}", f"--config.data.target_language={target}"]
    run("train.py", "--config=configs/demo.py", f"--workdir={workdir}", *languages)
    return json.loads(run("eval.py", f"--workdir={workdir}").splitlines()[-1])["bleu"]


@pytest.mark.slow
@pytest.mark.reported
def test_demo_reaches_its_bleu_and_aligns_numbers(tmp_path):
    """English to German reaches 98 to 99; the last of two layers aligns nearly every number with itself."""
    assert train(tmp_path / "demo", "en", "de") >= 97
    sources = [source for source, _ in generator.generate("de", {"test": 200})["test"]]
    command = ["-m", "transformer.translate", f"--workdir={tmp_path}/demo", f"--alignments={tmp_path}/links"]
    translations = run(*command, input="".join(f"{line}\n" for line in sources).encode()).decode().splitlines()
    links = [set(line.split()) for line in (tmp_path / "links").read_text().splitlines()]
    expected = [number_links(*pair) for pair in zip(sources, translations, strict=True)]
    correct = sum(len(line & numbers) for line, numbers in zip(links, expected, strict=True))
    assert correct >= 0.95 * sum(map(len, expected)) >= 95


def number_links(source, target):
    """Links of the numbers that stand once on either side: {"2-3"} for source word 2 and target word 3."""
    sides = [[re.sub(r"\D", "", word) for word in side.split()] for side in (source, target)]
    shared = {number for number in sides[0] if number and all(side.count(number) == 1 for side in sides)}
    return {f"{sides[0].index(number)}-{sides[1].index(number)}" for number in shared}


@pytest.mark.demos
@pytest.mark.parametrize(("source", "target"), [("en", "fr"), ("en", "es"), ("de", "en")])
def test_demo_learns_every_direction(tmp_path, source, target):
    """BLEU of at least 95 on test sentences it never saw."""
    assert train(tmp_path / "demo", source, target) >= 95
