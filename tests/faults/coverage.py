"""Rows E: every sentence of an evaluation exactly once, and the scores of what was written."""

import itertools
import json

import numpy as np
import sacrebleu

from tests.faults.table import Tally, row
from tests.faults.world import Command, Heard, World
from transformer.checkpoints import loading
from transformer.config import MeshConfig
from transformer.data.batching import BatchSpec, JaggedArray, eval_batches, make_batch, select_rows
from transformer.data.tokenizer import EOS
from transformer.decoding.translator import Translator
from transformer.distributed import sharding
from transformer.distributed.mesh import make_mesh
from transformer.evaluation import metrics
from transformer.evaluation.evaluator import Evaluator

COUNTS = (0, 1, 7, 12, 13, 14, 15, 16, 100, 101)
BATCHES = (1, 3, 4, 8)
FIRST = 10  # the token that stands for sentence 0


def shares(planned: BatchSpec, mesh, hosts: int, rows: str = "batch") -> list[BatchSpec]:
    """The rows of a global batch that each of so many hosts holds, which share the devices of the mesh."""
    count = len(planned.examples_B)
    groups = np.array_split(mesh.devices.ravel(), hosts)
    return [select_rows(planned, sharding.local_row_indices(mesh, count, rows=rows, devices=group)) for group in groups]


@row("E1", "coverage of evaluation: 10 counts of sentences x 1 to 8 hosts x batches of 1, 3, 4, 8", full=320, quick=320)
def coverage(world: World, tally: Tally) -> None:
    mesh, rng = make_mesh(MeshConfig()), np.random.default_rng(0)
    assert mesh.size == 8
    for count, hosts, batch in itertools.product(COUNTS, range(1, 9), BATCHES):
        with tally.one(f"{count} sentences, {hosts} hosts, batches of {batch}"):
            sentences = [np.array([*[FIRST + i] * rng.integers(0, 40), FIRST + i, EOS]) for i in range(count)]
            source = JaggedArray.from_sequences(sentences)
            seen = []
            for planned in eval_batches(
                source.lengths, np.zeros_like(source.lengths), lambda width, batch=batch: batch
            ):
                for share in shares(planned, mesh, hosts, "decode_batch"):
                    rectangle = make_batch(share, source, source).source_BS
                    real = rectangle[rectangle[:, 0] != 0]
                    whole = [np.array_equal(line[line != 0], sentences[line[0] - FIRST]) for line in real]
                    assert all(whole), "a sentence was cut"
                    seen += (real[:, 0] - FIRST).tolist()
            assert sorted(seen) == list(range(count))


def references_of(translations: list[str]) -> list[str]:
    """Like the translations, but for every third, so that BLEU is no end of its scale."""
    return [f"{line} rot {i}" if i % 3 else f"rot {line or i}" for i, line in enumerate(translations)]


def sources_of(world: World) -> list[str]:
    """Sentences of all lengths, more than a batch."""
    lines = (world.folder / "data" / "train.en").read_text().splitlines()[:40]
    return [*lines, "", "red", " ".join(lines[:6])]


@row(
    "E2",
    "BLEU against the sacrebleu command on the written file, and the same lines for every batch size",
    full=6,
    quick=4,
)
def scores_of_written_files(world: World, tally: Tally) -> None:
    run = loading.load_checkpoint(world.talker(), "latest")
    sources = sources_of(world)
    folder = world.new_folder()
    folder.mkdir()
    whole = Translator([run.model], run.tokenizer, run.config.decode, run.mesh).translate([run.params], sources)
    assert len(set(whole)) > len(whole) // 2, whole
    references = references_of(whole)
    for name, lines in (("source", sources), ("reference", references), ("written", whole)):
        (folder / name).write_text("".join(f"{line}\n" for line in lines))
    for size in (1, 7, 32):
        with tally.one(f"batches of {size}"):
            if tally.quick:
                translator = Translator([run.model], run.tokenizer, run.config.decode, run.mesh)
                groups = [sources[i : i + size] for i in range(0, len(sources), size)]
                result = [line for group in groups for line in translator.translate([run.params], group)]
            else:
                command = ["-m", "transformer.translate", f"--workdir={world.talker()}", f"--batch_size={size}"]
                done = Command(*command, stdin=(folder / "source").read_bytes()).expect(0)
                result = done.stdout.decode().split("\n")[:-1]
            assert result == whole
    command = ["-m", "sacrebleu", folder / "reference", "-i", folder / "written", "-b", "-w", "12"]
    with tally.one("BLEU"):
        ours = metrics.score(whole, [references], ("bleu",))["bleu"]
        theirs = float(Command(*command).expect(0).stdout)
        assert 0 < theirs < 100, f"{theirs} of {whole[:5]}"
        assert abs(float(ours) - theirs) <= 1e-9, f"{ours} against {theirs}"
        tally.note(f"BLEU {theirs:.6f}, difference {abs(float(ours) - theirs):.0e}")
    if not tally.quick:
        with tally.one("eval.py"):
            flags = [f"--source={folder}/source", f"--reference={folder}/reference", f"--output={folder}/again"]
            done = Command("eval.py", f"--workdir={world.talker()}", *flags).expect(0)
            assert (folder / "again").read_bytes() == (folder / "written").read_bytes()
            assert abs(json.loads(done.stdout.splitlines()[-1])["bleu"] - theirs) <= 1e-9
        with tally.one("the harm that a lost line would do"):
            short = sacrebleu.corpus_bleu(whole[1:], [references[:-1]]).score
            assert abs(short - theirs) > 1e-3


@row("E3", "no end of sentence, empty output, references beyond every limit", full=3, quick=3)
def nothing_is_cut(world: World, tally: Tally) -> None:
    run = loading.load_checkpoint(world.talker(), "latest")
    sources = sources_of(world)
    with tally.one("no end of sentence"):
        translator = Translator([run.model], run.tokenizer, run.config.decode, run.mesh)
        result = translator.translate_nbest([run.params], sources)
        assert translator.translate([run.params], sources) == [best.text for best, *_ in result]
        assert len(result) == len(sources)
        open_ones = [one for (one, *_), source in zip(result, sources, strict=True) if source and not one.finished]
        assert len(open_ones) > len(sources) // 2
        assert all(one.text for one in open_ones)
    with tally.one("references beyond every limit"), Heard() as heard:
        references = ["rot " * 300 if i % 2 else line for i, line in enumerate(sources)]
        report = Evaluator(run.model, run.tokenizer, run.config, run.mesh).evaluate(run.params, sources, [references])
        wanted = sacrebleu.corpus_bleu(report.translations, [references]).score
        assert abs(float(report.scores["bleu"]) - wanted) <= 1e-9
        assert f"{len(sources) // 2} references have over" in heard.getvalue()
    with tally.one("empty output"), Heard():
        report = Evaluator(run.model, run.tokenizer, run.config, run.mesh).evaluate(run.params, ["", " "], [["a", ""]])
        assert report.translations == ["", ""]
        assert report.sentences == 2
