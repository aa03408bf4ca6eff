"""The commands as people run them: train, evaluate, translate, and bad input to each of them."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import sacrebleu

from tests.conftest import ROOT, slow
from tests.helpers.commands import run

UNITS = ["null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"]
THINGS = {"houses": "Häuser", "trees": "Bäume", "cats": "Katzen", "dogs": "Hunde", "books": "Bücher"}
NAMES = ["Anna", "Ben", "Carla", "David", "Emma"]

SMALL = [
    "--config=configs/text.py",
    "--config.model.num_layers=1",
    "--config.model.emb_dim=64",
    "--config.model.mlp_dim=128",
    "--config.model.dropout_rate=0.0",
    "--config.data.vocab_size=360",
    "--config.data.max_length=40",
    "--config.data.num_buckets=1",
    "--config.optimizer.learning_rate=0.005",
    "--config.optimizer.warmup_steps=50",
    "--config.train.batch_tokens=1024",
    "--config.train.num_steps=150",
    "--config.train.eval_every_steps=150",
    "--config.mesh.data=2",
    "--config.decode.max_source_tokens=64",
    "--config.decode.max_extra_length=10",
]


def pairs(count, seed):
    """Sentences in which a number moves, a verb goes last and words change: "Anna sees 42 cats"."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        name, thing, number = rng.choice(NAMES), rng.choice(list(THINGS)), rng.integers(10, 100)
        words = f"{UNITS[number // 10]} {UNITS[number % 10]}"
        out.append((f"today {name} sees {number} {thing}", f"heute hat {name} {words} {THINGS[thing]} gesehen"))
    return out


def run_process(*command, stdin=None):
    """As `run`, in a process of its own."""
    result = subprocess.run(
        [sys.executable, *map(str, command)], input=stdin, capture_output=True, cwd=ROOT, timeout=300
    )
    assert result.returncode == 0, result.stderr.decode()
    return result


@pytest.fixture(autouse=True)
def _in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def write(path, lines):
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    everything = dict(pairs(4000, 0))
    rows = list(everything.items())
    for split, part in (("train", rows[60:]), ("val", rows[:20]), ("test", rows[20:60])):
        for side, language in ((0, "en"), (1, "de")):
            write(folder / f"{split}.{language}", [row[side] for row in part])
    return folder


@pytest.fixture(scope="module")
def workdir(folder, tmp_path_factory):
    """A small model trained by the command itself."""
    workdir = tmp_path_factory.mktemp("runs") / "small"
    result = run_process("train.py", *SMALL, *data_flags(folder), f"--workdir={workdir}")
    assert b"step 150/150" in result.stderr
    assert not result.stdout
    return workdir


@pytest.fixture(scope="module")
def evaluated(workdir):
    """The command that scored it; the workdir holds the translations and the report."""
    return run_process("eval.py", f"--workdir={workdir}")


@pytest.fixture
def averaged(workdir, tmp_path):
    """The same workdir with one more checkpoint, 140, whose params are fresh."""
    import jax

    from transformer.checkpoints.loading import load_checkpoint
    from transformer.checkpoints.manager import CheckpointManager
    from transformer.distributed import mesh
    from transformer.training import train_step

    shutil.copytree(workdir, tmp_path / "run")
    trained = load_checkpoint(workdir, "latest")
    state = train_step.init_state(trained.model, trained.config, mesh.make_mesh(trained.config.mesh))
    counter = jax.device_put(np.int32(140), state.step.sharding)
    CheckpointManager(tmp_path / "run").save(state._replace(step=counter), trained.config, trained.tokenizer, {}, {})
    return tmp_path / "run"


def report_of(result):
    """The scores that eval.py printed."""
    return json.loads(result.stdout.splitlines()[-1])


def data_flags(folder):
    return [f"--config.data.dir={folder}", f"--config.data.data_dir={folder}/prepared"]


def test_a_seeded_run_learns_the_task(evaluated):
    """BLEU of at least 90 on sentences it never saw; it reaches 100."""
    report = report_of(evaluated)
    assert list(report) == [
        "step",
        "steps",
        "sentences",
        "loss",
        "bleu",
        "bleu_signature",
        "chrf",
        "chrf_signature",
        "ter",
        "ter_signature",
        "length_ratio",
        "seconds",
        "train_flops",
        "train_tokens",
        "train_hours",
        "perplexity",
        "word_perplexity",
        "chrfpp",
        "chrfpp_signature",
        "bleu_by_source_length",
        "legacy_tokenized_bleu",
        "legacy_compound_split_bleu",
        "legacy_signature",
    ]
    assert 1 <= report["perplexity"] < report["word_perplexity"]
    assert report["bleu_by_source_length"].keys() == {"0-10"}
    assert min(report["train_flops"], report["train_tokens"], report["train_hours"]) > 0
    assert re.search(rb"trained on [\d.]+ k target tokens, \d\.\de\+\d+ FLOPs, 0\.\d\d hours", evaluated.stderr)
    assert (report["step"], report["steps"], report["sentences"]) == (150, [150], 40)
    assert report["bleu"] >= 90
    assert b"translation heute hat" in evaluated.stderr
    assert report["bleu_signature"].encode() in evaluated.stderr


def test_the_score_is_that_of_the_sacrebleu_command_on_the_written_file(workdir, evaluated, folder):
    """BLEU shows that it is the file which is scored; tests/evaluation/test_metrics.py compares the other metrics."""
    report = report_of(evaluated)
    written = workdir / "translations" / "150.test.txt"
    assert written.read_bytes().count(b"\n") == 40
    result = run_process("-m", "sacrebleu", folder / "test.de", "-i", written, "-b", "-w", "12")
    assert float(result.stdout) == pytest.approx(report["bleu"], abs=1e-9)
    page = (workdir / "report.html").read_text()
    assert report["bleu_signature"] in page
    assert "validation, step 150" in page


def test_a_public_test_set_is_scored_under_its_name(workdir, evaluated, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sacrebleu.DATASETS["wmt14/full"], "_outdir", str(tmp_path))
    texts = {"src": (folder / "test.en").read_bytes(), "ref": (folder / "test.de").read_bytes()}
    for field in sacrebleu.DATASETS["wmt14/full"].fieldnames("en-de"):
        (tmp_path / f"wmt14_full.en-de.{field}").write_bytes(texts.get(field, b""))
    public = report_of(run("eval.py", f"--workdir={workdir}", "--checkpoint=best", "--test_set=wmt14/full"))
    assert public["bleu"] == report_of(evaluated)["bleu"]
    written = (workdir / "translations" / "150.wmt14_full.txt").read_bytes()
    assert written == (workdir / "translations" / "150.test.txt").read_bytes()
    assert (workdir / "reports" / "150.wmt14_full.html").exists()


def test_validation_and_eval_agree(workdir):
    report = report_of(run("eval.py", f"--workdir={workdir}", "--split=validation"))
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    (valid,) = [line for line in lines if "valid/bleu" in line]
    assert report["bleu"] == pytest.approx(valid["valid/bleu"], abs=1e-9)
    assert report["loss"] == pytest.approx(valid["valid/loss"], abs=1e-6)


def test_the_mean_of_checkpoints_can_be_scored_and_translates(averaged, folder):
    result = run("eval.py", f"--workdir={averaged}", "--checkpoint=average:2")
    report = report_of(result)
    assert (report["step"], report["steps"]) == (150, [140, 150])
    assert b"average of 2: 140, 150" in result.stderr
    (written,) = (averaged / "translations").glob("150-average-2.test.txt")
    source = (folder / "test.en").read_bytes()
    command = ["-m", "transformer.translate", f"--workdir={averaged}"]
    mean = run(*command, "--checkpoint=average:2", stdin=source)
    assert mean.stdout == written.read_bytes()
    assert mean.stdout != run(*command, "--checkpoint=latest", stdin=source).stdout


def the_message(result):
    """All that a command wrote to stderr, besides that it loads JAX."""
    (line,) = (line for line in result.stderr.decode().splitlines() if not line.endswith(": loading JAX …"))
    return line


@pytest.mark.parametrize(
    ("command", "which", "message"),
    [
        (["eval.py"], "average:99", "found 1 of 1"),
        (["-m", "transformer.translate"], "average:0", "N at least 1"),
    ],
)
def test_a_mean_that_cannot_be_is_one_line(workdir, command, which, message):
    result = run(*command, f"--workdir={workdir}", f"--checkpoint={which}", stdin=b"", code=2)
    assert message in the_message(result)


@pytest.mark.slow
def test_a_difference_is_held_against_chance(workdir, averaged, folder, tmp_path):
    shutil.rmtree(averaged / "translations", ignore_errors=True)
    (averaged / "translations").write_text("no folder: a workdir that cannot be written costs no scores\n")
    result = run("eval.py", f"--workdir={averaged}", "--checkpoint=150", f"--versus={averaged}")
    assert b"warning: translations were not saved" in result.stderr
    versus = report_of(result)["versus"]
    assert (versus["bleu"]["difference"], versus["bleu"]["bootstrap_p"], versus["name"]) == (
        0,
        1,
        "run, checkpoint 150",
    )
    write(tmp_path / "poor", ["heute"] * 40)
    result = run("eval.py", f"--workdir={workdir}", f"--versus={tmp_path}/poor")
    versus = report_of(result)["versus"]
    assert versus["chrf"]["significant"] is True
    assert b"small compared with poor" in result.stderr
    assert result.stderr.count(b"  poor        heute") == 5
    write(tmp_path / "short", ["heute"] * 39)
    result = run("eval.py", f"--workdir={workdir}", f"--versus={tmp_path}/short", code=2)
    assert b"each of the 40 sentences of test, got 39 lines" in result.stderr.splitlines()[-1]


@pytest.mark.slow
def test_watching_scores_what_is_there_and_ends_on_a_signal(averaged):
    command = [sys.executable, "eval.py", f"--workdir={averaged}", "--watch"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        actual = [json.loads(process.stdout.readline()) for _ in range(2)]
        process.terminate()
        assert b"2 checkpoints scored; run again to resume" in process.communicate(timeout=60)[1]
    assert process.returncode == 143
    assert [entry["step"] for entry in actual] == [140, 150]
    written = (averaged / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == actual
    assert actual[1]["name"] == "test"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--watch", "--checkpoint=best"], "leave out --checkpoint"),
        (["--watch", "--versus=x"], "leave out --versus"),
        (["--versus_checkpoint=best"], "goes with --versus"),
        (["--versus=README.md", "--versus_checkpoint=best"], "goes with --versus=DIR, got the file"),
        (["--versus=x", "--output=x"], "would overwrite"),
        (["--versus=x", "--output=./x"], "would overwrite"),
        (["--versus=none"], "none: there is no such file"),
        (["--output=configs", "--checkpoint=none"], "configs: Is a directory"),  # said before anything is read
    ],
)
def test_flags_that_cannot_go_together_are_one_line(workdir, flags, message):
    assert message in the_message(run("eval.py", f"--workdir={workdir}", *flags, code=2))


def test_alignments_come_with_the_translation(workdir, folder, tmp_path):
    source = (folder / "test.en").read_bytes()
    command = ["-m", "transformer.translate", f"--workdir={workdir}"]
    plain = run(*command, stdin=source).stdout
    flags = [f"--alignments={tmp_path}/a", f"--attention={tmp_path}/b.npz", "--batch_size=16"]
    assert run(*command, *flags, stdin=source).stdout == plain
    links = (tmp_path / "a").read_text().splitlines()
    for line, translation in zip(links, plain.decode().splitlines(), strict=True):
        assert len(line.split()) == len(translation.split())
    with np.load(tmp_path / "b.npz") as arrays:
        assert len(arrays.files) == 3 * 40
        assert arrays["weights_39"].shape[:2] == (1, 4)
    result = run(*command, f"--alignments={tmp_path}/none/a", stdin=source, code=2)
    assert b"none/a" in result.stderr


def test_files_can_be_scored_against_several_references(workdir, folder, tmp_path):
    command = ["eval.py", f"--workdir={workdir}", f"--source={folder}/test.en", f"--output={tmp_path}/out.txt"]
    report = report_of(run(*command, f"--reference={folder}/test.de,{folder}/test.en"))
    assert "nrefs:2" in report["bleu_signature"]
    assert (tmp_path / "out.txt").read_bytes().count(b"\n") == 40


def test_translate_streams_one_line_for_each(workdir, folder):
    odd = ["today Anna sees 42 cats", "", "a\rb", "\u2028", "x" * 3000, "today Ben sees 99 dogs"]
    source = "\n".join(odd).encode()  # the last line has no end
    result = run_process("-m", "transformer.translate", f"--workdir={workdir}", "--batch_size=2", stdin=source)
    lines = result.stdout.decode().split("\n")
    assert len(lines) == len(odd) + 1
    assert lines[-1] == lines[1] == ""
    assert (lines[0], lines[5]) == ("heute hat Anna vier zwei Katzen gesehen", "heute hat Ben neun neun Hunde gesehen")
    assert b"1 sources are longer than decode.max_source_tokens = 64" in result.stderr


@pytest.mark.parametrize(
    ("source", "message"),
    [(b"good\n\xff\xfe\n", b"stdin, line 2: not UTF-8"), (b"a\0b\n", b"stdin, line 1: holds a NUL")],
)
def test_translate_refuses_what_is_no_text(workdir, source, message):
    assert message in run("-m", "transformer.translate", f"--workdir={workdir}", stdin=source, code=2).stderr


def test_an_empty_evaluation_file_scores_no_sentences(workdir, tmp_path):
    write(tmp_path / "empty", [])
    flags = [f"--source={tmp_path}/empty", f"--reference={tmp_path}/empty"]
    result = run("eval.py", f"--workdir={workdir}", *flags)
    assert report_of(result)["sentences"] == 0
    assert b"nothing to score" in result.stderr


def test_unequal_counts_are_refused_with_both(workdir, folder, tmp_path):
    write(tmp_path / "short", ["one", "two"])
    flags = [f"--source={folder}/test.en", f"--reference={tmp_path}/short"]
    assert b"40" in run("eval.py", f"--workdir={workdir}", *flags, code=2).stderr


def replace_first_line(path, line):
    path.write_bytes(line + path.read_bytes().partition(b"\n")[2])


# One that is refused before anything is read, one while it is prepared; tests/data has the others.
BAD_DATA = {
    "a missing file": (lambda f: (f / "train.de").unlink(), r"train\.de"),
    "NUL": (lambda f: replace_first_line(f / "val.en", b"a\0\n"), r"val\.en, line 1: holds a NUL"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_training_data_is_one_message_and_leaves_nothing_harmed(case, folder, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("prepared"))
    change, message = BAD_DATA[case]
    change(copy)
    result = run("train.py", *SMALL, *data_flags(copy), f"--workdir={tmp_path}/run", code=2)
    assert re.search(message, result.stderr.decode()), result.stderr.decode()
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("flag", "code", "message"),
    [
        ("--config.mesh.data=64", 2, "found only"),
        slow("--config.optimizer.learning_rate=1e30", 3, "the run diverged"),
    ],
)
def test_what_only_the_machine_or_the_training_can_refuse(flag, code, message, folder, tmp_path):
    result = run("train.py", *SMALL, *data_flags(folder), flag, f"--workdir={tmp_path}/run", code=code)
    assert message in result.stderr.decode()


@pytest.mark.parametrize("command", [["eval.py"], ["-m", "transformer.translate"]])
def test_a_folder_that_is_not_a_workdir_is_refused(command, tmp_path):
    assert b"expected a folder" in run(*command, f"--workdir={tmp_path}/none", code=2, stdin=b"").stderr
    assert b"found no checkpoint" in run(*command, f"--workdir={tmp_path}", code=2, stdin=b"").stderr


def test_without_a_valid_checkpoint_the_exit_code_says_so(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "run")
    for manifest in (tmp_path / "run" / "checkpoints").glob("*/manifest.json"):
        manifest.write_text("{}")
    for command in (["eval.py"], ["-m", "transformer.translate"]):
        result = run(*command, f"--workdir={tmp_path}/run", code=4, stdin=b"")
        assert b"damaged" in result.stderr


def test_a_workdir_is_resumed_without_a_config(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "run")
    log = run("train.py", f"--workdir={tmp_path}/run").stderr.decode()
    assert "resuming after step 150" in log
    assert "learning rate up to " in log
    assert "trained for 150 steps" in log
    assert (tmp_path / "run" / "config.json").read_bytes() == (workdir / "config.json").read_bytes()


def test_another_config_is_refused_by_the_command_too(workdir, folder):
    flags = [*SMALL, *data_flags(folder), "--config.model.norm=pre", f"--workdir={workdir}"]
    assert b"model.norm: 'post'" in run("train.py", *flags, code=2).stderr


@pytest.mark.slow
def test_ctranslate2_translates_as_the_command_does(workdir, folder, tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2", reason="the export extra is not installed")
    import sentencepiece

    flags = [f"--workdir={workdir}", "--decode.length_penalty=1", "--decode.length_penalty_form=length"]
    summary = run("-m", "transformer.export", *flags, "--format=ctranslate2", f"--output={tmp_path}/exported")
    assert json.loads(summary.stdout)["largest_difference"] < 1e-4
    options = json.loads((tmp_path / "exported" / "export.json").read_text())["translate_batch"]
    program = ctranslate2.Translator(f"{tmp_path}/exported", compute_type="float32")
    pieces = sentencepiece.SentencePieceProcessor(model_file=f"{tmp_path}/exported/sentencepiece.model")
    source = (folder / "test.en").read_bytes()
    cut = pieces.encode(source.decode().split("\n")[:-1], out_type=str)
    for beam_size in (1, 4):
        actual = program.translate_batch(cut, **{**options, "beam_size": beam_size})
        texts = [pieces.decode([piece for piece in one.hypotheses[0] if piece != "</s>"]) for one in actual]
        own = run("-m", "transformer.translate", *flags, f"--beam_size={beam_size}", stdin=source).stdout.decode()
        assert texts == own.split("\n")[:-1]


@pytest.mark.slow
def test_decoding_otherwise_leaves_the_translations_of_the_config_alone(workdir, folder):
    default = workdir / "translations" / "150.test.txt"
    default.parent.mkdir(exist_ok=True)
    default.write_text("as the config says\n")
    files = [f"--source={folder}/test.en", f"--reference={folder}/test.de"]
    result = run("eval.py", f"--workdir={workdir}", *files, "--decode.beam_size=1", "--decode.length_penalty=0")
    assert report_of(result)["bleu"] >= 90
    (written,) = workdir.glob("translations/*beam_size*")
    # The digest tells it from a set of the same name with other references, scored before.
    assert re.fullmatch(r"150\.test\.en(-\w{8})?\.beam_size=1\.length_penalty=0\.0\.txt", written.name)
    assert written.read_bytes().count(b"\n") == 40
    assert default.read_text() == "as the config says\n"
