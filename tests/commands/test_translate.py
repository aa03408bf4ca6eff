"""The Python API and the command: one load, threads, flags, files that belong together, and lines that stream."""

import io
import multiprocessing
import os
import sys
import threading

import jax
import numpy as np
import pytest

import transformer
from tests.conftest import small_config
from tests.decoding.test_translator import LINES
from tests.helpers.compilation import CompileCounter
from transformer import translate
from transformer.checkpoints.manager import CheckpointManager
from transformer.data import tokenizer
from transformer.distributed import mesh
from transformer.models import registry
from transformer.runtime.errors import UserError
from transformer.training import train_step

SHORT = [line for line in LINES if len(line.split()) < 4]  # of one width: one program


def save(workdir, vocabulary, seed=3, target="de", **model):
    """A workdir of an untrained model."""
    config = small_config(model={"num_layers": 1, **model}, data={"target_language": target})
    fresh = registry.ModelDef(config.model, vocabulary.vocab_size)
    state = train_step.init_state(fresh, config, mesh.make_mesh(config.mesh))
    state = state._replace(
        params=jax.tree.map(lambda one, like: jax.device_put(one, like.sharding), fresh.init(seed), state.params)
    )
    CheckpointManager(workdir).save(state, config, vocabulary, {"training": "digest of the data"}, {})
    return workdir


@pytest.fixture(scope="module")
def vocabulary():
    return tokenizer.train(LINES, 300, "bpe")


@pytest.fixture(scope="module")
def workdir(vocabulary, tmp_path_factory):
    return save(tmp_path_factory.mktemp("runs") / "one", vocabulary)


@pytest.fixture(scope="module")
def another(vocabulary, tmp_path_factory):
    return save(tmp_path_factory.mktemp("runs") / "another", vocabulary, seed=4, emb_dim=24, qkv_dim=24, value_dim=24)


@pytest.fixture(scope="module")
def loaded(workdir):
    return transformer.load(workdir)


@pytest.fixture(scope="module")
def usual(loaded):
    return loaded.translate(LINES)


def test_a_call_translates_and_gives_n_best_when_asked(loaded, usual):
    assert len(usual) == len(LINES)
    assert len(set(usual)) > 10
    several = loaded.translate(SHORT[:2], n_best=2)
    assert [actual[0].text for actual in several] == [usual[LINES.index(line)] for line in SHORT[:2]]
    assert all(len(actual) == 2 and actual[0].score > actual[1].score for actual in several)
    assert loaded.translate([]) == []


@pytest.mark.slow
def test_fields_constraints_and_seeds_can_be_given_to_a_call(loaded, usual):
    short = [usual[LINES.index(line)] for line in SHORT]
    assert loaded.translate(SHORT, beam_size=1) != short
    drawn = [loaded.translate(SHORT, method="sample", seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    begun = loaded.translate(SHORT, prefixes=["red"] * len(SHORT), constraints=[["cat"]] * len(SHORT))
    assert all(text.startswith("red") and "cat" in text for text in begun)
    assert loaded.translate(SHORT) == short


@pytest.mark.slow
def test_programs_are_compiled_once_and_kept(loaded, usual):
    calls = ({}, {"beam_size": 3}, {"method": "sample", "seed": 5}, {"n_best": 2})
    for options in calls:
        loaded.translate(SHORT, **options)
    with CompileCounter() as counter:
        for options in (*calls, {"method": "sample", "seed": 77}):
            loaded.translate(SHORT[::-1], **options)
    assert counter.count == 0
    with CompileCounter() as counter:
        loaded.translate(SHORT, length_penalty=0.7)
    assert counter.count == 1


@pytest.mark.slow
def test_threads_get_what_one_caller_gets_and_compile_no_more(workdir, fresh_programs):
    """Eight threads with different work begin at once on a model that has compiled nothing."""
    fresh, results = transformer.load(workdir), {}
    work = [(SHORT[i % 2 :: 2], {"beam_size": 2 + i % 2}) for i in range(8)]
    barrier = threading.Barrier(8)

    def run(i):
        barrier.wait()
        results[i] = [fresh.translate(work[i][0], **work[i][1]) for _ in range(3)]

    with CompileCounter() as counter:
        threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert counter.count == 2
    for i, (sentences, options) in enumerate(work):
        assert results[i] == [fresh.translate(sentences, **options)] * 3


@pytest.mark.parametrize(
    ("sentences", "options", "message"),
    [
        ("one text", {}, "expected a list of sentences, got one text"),
        (["a"], {"beam": 3}, "config.decode: unknown field 'beam'"),
        (["a"], {"beam_size": 0}, "config.decode.beam_size: expected at least 1, got 0"),
        (["a"], {"temperature": 0.5}, "temperature = 0.5: read only with method = sample or mbr, got method = beam"),
        (["a"], {"method": "sample", "coverage_penalty": 0.5}, "coverage_penalty = 0.5: read only with method = beam"),
        (["a"], {"method": "sample", "mbr_samples": 3}, "mbr_samples = 3: read only with method = mbr"),
        (["a"], {"seed": 3}, "seed = 3: read only with method = sample or mbr"),
        (["a"], {"n_best": 3}, "n_best = 3: expected at most decode.beam_size = 2"),
        (["a"], {"n_best": 0}, "n_best: expected at least 1, got 0"),
    ],
)
def test_what_cannot_be_asked_of_a_call_is_refused(loaded, sentences, options, message):
    with pytest.raises(UserError) as caught:
        loaded.translate(sentences, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.reported
@pytest.mark.filterwarnings("ignore:.*fork:RuntimeWarning", "ignore:.*fork:DeprecationWarning")
def test_a_fork_after_loading_gets_an_error_that_says_how_to_load(loaded):
    """In a fork JAX hangs; the message comes at once."""

    def translate_in_fork(sender):
        try:
            sender.send(loaded.translate(SHORT[:1]))
        except UserError as error:
            sender.send(str(error))

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=translate_in_fork, args=(sender,), daemon=True)
    child.start()
    assert receiver.poll(30), "it hangs"
    assert f"loaded in process {os.getpid()}, of which process {child.pid} is a fork" in receiver.recv()
    child.join(30)


@pytest.mark.slow
def test_an_ensemble_is_loaded_from_workdirs(loaded, workdir, another, usual):
    both = transformer.load(workdir, ensemble=[another]).translate(SHORT)
    assert both != [usual[LINES.index(line)] for line in SHORT]
    assert both == transformer.load(another, ensemble=[workdir]).translate(SHORT)


def test_what_is_loaded_may_be_named_as_people_do(workdir, monkeypatch):
    assert transformer.load(workdir, checkpoint=0).primary.step == 0
    with pytest.raises(UserError, match=r"^checkpoint: expected latest, .*\[0\], got '579'"):
        transformer.load(workdir, checkpoint=579)
    for one in (workdir, str(workdir)):
        with pytest.raises(UserError, match=r"ensemble: expected a list of workdirs, got one, '.*'"):
            transformer.load(workdir, ensemble=one)
    monkeypatch.setattr(translate.command_line.object_storage.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="gs://b/run: gs:// needs the package gcsfs: pip install gcsfs"):
        transformer.load("gs://b/run")


@pytest.mark.slow
def test_an_ensemble_of_other_tokenizers_is_refused(workdir, tmp_path):
    stranger = save(tmp_path / "stranger", tokenizer.train(LINES, 290, "bpe"))
    with pytest.raises(UserError, match="expected the tokenizer of") as caught:
        transformer.load(workdir, ensemble=[stranger])
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_an_ensemble_of_other_directions_is_refused(workdir, vocabulary, tmp_path):
    french = save(tmp_path / "french", vocabulary, target="fr")
    with pytest.raises(UserError, match="translates en to fr, expected en to de"):
        transformer.load(workdir, ensemble=[french])


@pytest.mark.slow
def test_a_member_whose_positions_do_not_reach_is_refused(workdir, vocabulary, tmp_path):
    short = save(tmp_path / "short", vocabulary, positions="learned", max_positions=80)
    model = transformer.load(workdir, ensemble=[short])
    assert len(model.translate(SHORT[:1])) == 1
    with pytest.raises(UserError, match="max_positions: learned positions must cover"):
        model.translate(SHORT[:1], max_extra_length=40)


def test_importing_the_package_imports_no_jax(root):
    import subprocess

    program = "import sys, transformer; transformer.load; print('jax' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    assert result.stdout == "False\n"


@pytest.fixture
def command(workdir, monkeypatch, capfdbinary):
    """Runs the command on lines of text; gives its lines."""

    def run(lines, *flags):
        text = "".join(f"{line}\n" for line in lines).encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
        translate.main(["translate", f"--workdir={workdir}", *map(str, flags)])
        return capfdbinary.readouterr().out

    return run


def write(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


WAYS = {
    "beam": [],
    "n-best": ["--n_best=2"],
    "sample": ["--decode.method=sample", "--n_best=3", "--decode.top_p=0.9"],
    "mbr": ["--mbr=4", "--decode.seed=3"],
    "wishes": ["--decode.max_extra_length=25"],
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_neither_batch_size_nor_order_changes_a_byte(command, tmp_path, way):
    lines = [*SHORT, "", *SHORT[3:]]
    prefixes = ["red" if i % 2 == 0 and line else "" for i, line in enumerate(lines)]
    phrases = ["cat\told tree" if i % 2 == 0 and line else "" for i, line in enumerate(lines)]

    def run(order, size):
        files = []
        if way == "wishes":
            one = write(tmp_path / "prefixes", [prefixes[i] for i in order])
            other = write(tmp_path / "phrases", [phrases[i] for i in order])
            files = [f"--prefix_file={one}", f"--constraint_file={other}"]
        return command([lines[i] for i in order], *WAYS[way], *files, f"--batch_size={size}")

    straight = range(len(lines))
    usual = run(straight, 32)
    assert usual == run(straight, 1) == run(straight, 7)
    order = np.random.default_rng(0).permutation(len(lines))
    shuffled = run(order, 7).decode().split("\n")[:-1]
    if "n_best" in str(WAYS[way]):
        by_line = [line.split(" ||| ", 1) for line in shuffled]
        shuffled = [f"{int(order[int(index)])} ||| {rest}" for index, rest in by_line]
        assert sorted(shuffled) == sorted(usual.decode().split("\n")[:-1])
    else:
        back = dict(zip(order.tolist(), shuffled, strict=True))
        assert [back[i] for i in straight] == usual.decode().split("\n")[:-1]
    if way == "wishes":
        for prefix, several, text in zip(prefixes, phrases, usual.decode().split("\n")[:-1], strict=True):
            assert text.startswith(prefix)
            assert all(phrase in text for phrase in several.split("\t"))


def test_n_best_lines_are_those_of_moses(command, loaded):
    got = command([SHORT[0], "", SHORT[1]], "--n_best=2").decode().split("\n")
    actual = loaded.translate([SHORT[0], "", SHORT[1]], n_best=2)
    want = [f"{i} ||| {one.text} ||| {one.score:.6f}" for i, several in enumerate(actual) for one in several]
    assert got == [*want, ""]
    assert [line.split(" ||| ")[0] for line in want] == ["0", "0", "1", "2", "2"]


@pytest.mark.slow
def test_flags_are_fields(command, usual, another, loaded):
    short = "".join(f"{usual[LINES.index(line)]}\n" for line in SHORT).encode()
    assert command(SHORT) == command(SHORT, "--decode.beam_size=2") == short
    assert command(SHORT, "--beam_size=1") == command(SHORT, "--decode.beam_size", "1") != short
    assert command(SHORT, "--mbr=3") == command(SHORT, "--decode.method=mbr", "--decode.mbr_samples=3") != short
    assert command(SHORT, f"--ensemble={another}") != short


def test_alignments_see_no_more_of_a_source_than_decoding(command, tmp_path):
    path = tmp_path / "align"
    command([LINES[-1]], "--decode.max_source_tokens=3", f"--alignments={path}")
    assert {int(link.split("-")[0]) for link in path.read_text().split()} <= {0, 1}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--decode.beam=3"], "config.decode: unknown field 'beam'; did you mean 'beam_size'"),
        (["--decode.beam_size=two"], "--decode.beam_size: expected int, got 'two'"),
        (["--decode=3"], "expected --decode.FIELD=VALUE"),
        (["--n_best=2", "--alignments=x"], "--alignments and --attention are of one translation a line; leave out"),
        (["--beam_size=3", "--decode.beam_size=3"], "--beam_size and --decode.beam_size set the same"),
        (["--mbr=3", "--decode.method=sample"], "--mbr and --decode.method set the same"),
        (["--mbr=3", "--beam_size=2"], "beam_size = 2: read only with method = beam, got method = mbr"),
        (["--decode.method=sample", "--beam_size=9"], "beam_size = 9: read only with method = beam"),
        (["--n_best=9"], "n_best = 9: expected at most decode.beam_size = 2"),
        (["--decode.top_p=2"], "config.decode.top_p: expected at most 1, got 2.0"),
        (["--prefix_file=FILE", "--constraint_file=none.tsv"], "none.tsv"),
        (["--prefix_file=FILE"], "stdin has 1 lines and"),
    ],
)
def test_bad_flags_are_one_message(command, tmp_path, flags, message):
    path = write(tmp_path / "two", ["red", "red"])
    with pytest.raises(UserError) as caught:
        command(SHORT[:1], *[flag.replace("FILE", str(path)) for flag in flags])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_errors_name_the_line_whatever_the_group(command, tmp_path):
    path = write(tmp_path / "phrases", ["", "", "red\t"])
    with pytest.raises(UserError, match="sentence 3: expected phrases that are not empty"):
        command(SHORT[:3], f"--constraint_file={path}", "--batch_size=2")


def test_a_file_that_ends_early_says_so_after_what_it_held(command, tmp_path, capfdbinary):
    path = write(tmp_path / "one", ["red"])
    with pytest.raises(UserError, match="one has 1 lines and stdin has more"):
        command(SHORT[:2], f"--prefix_file={path}")
    assert capfdbinary.readouterr().out.startswith(b"red")


def test_lines_before_one_that_is_no_text_are_translated_still():
    def lines():
        yield "a"
        raise UserError("line 2: not UTF-8")

    out = io.BytesIO()
    with pytest.raises(UserError, match="line 2"):
        translate.translate_stream(list, lines(), out, 10)
    assert out.getvalue() == b"a\n"


def test_the_stream_is_flushed_group_by_group():
    written = []

    class Out(io.BytesIO):
        def flush(self):
            written.append(self.getvalue())

    translate.translate_stream(lambda group: [line.upper() for line in group], iter(["a", "b", "c"]), Out(), 2)
    assert written == [b"A\nB\n", b"A\nB\nC\n"]


@pytest.mark.parametrize(
    "odd", ["\r", "a\rb", "\u2028", "a\u2028b", "\u0085", "\ufeffa", "\ufffd", "x" * 5000, "漢" * 40, "<s>"]
)
def test_every_line_gives_exactly_one_line(loaded, odd):
    out = io.BytesIO()
    translate.translate_stream(loaded.translate, [LINES[0], odd, LINES[1]], out, 2)
    assert out.getvalue().count(b"\n") == 3
    assert out.getvalue().endswith(b"\n")


class Filtered:
    """As a pandas Series after a filter and a sort: items come in order, and [label] finds one by its label."""

    def __init__(self, values):
        labels = np.random.default_rng(0).permutation(len(values)).tolist()
        self._by_label = dict(zip(labels, values, strict=True))

    def __len__(self):
        return len(self._by_label)

    def __iter__(self):
        return iter(self._by_label.values())

    def __getitem__(self, label):
        return self._by_label[label]


def series(values):
    """Every second row of a table, whose rows lie backwards and are then sorted."""
    pandas = pytest.importorskip("pandas")
    rows = [text for value in reversed(values) for text in (value, "unwanted")]
    table = pandas.DataFrame({"text": rows})
    return table[table.text != "unwanted"].sort_index(ascending=False).text


def crlf_file(values):
    content = "".join(f"{value}\r\n" for value in values).encode()
    return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8", newline="")


KINDS = {
    "tuple": tuple,
    "NumPy": np.array,
    "NumPy of objects": lambda values: np.array(values, object),
    "generator": lambda values: (value for value in values),
    "map": lambda values: map(str, values),
    "filter": lambda values: filter(None, values),
    "filtered": Filtered,
    "pandas": series,
    "values of a dict": lambda values: dict(enumerate(values)).values(),
    "file": lambda values: io.StringIO("".join(f"{value}\n" for value in values)),
    "file of CR LF": crlf_file,
}


@pytest.mark.reported
@pytest.mark.parametrize("kind", KINDS)
def test_any_iterable_of_texts_is_taken_in_its_own_order(loaded, usual, kind):
    make, lines = KINDS[kind], SHORT[:4]
    assert loaded.translate(make(lines)) == [usual[LINES.index(line)] for line in lines]
    prefixes = ["red", "old", "the cat", "blue"]
    asked = loaded.translate(lines, prefixes=prefixes)
    assert all(text.startswith(prefix) for text, prefix in zip(asked, prefixes, strict=True))
    assert loaded.translate(make(lines), prefixes=make(prefixes)) == asked


@pytest.mark.reported
@pytest.mark.parametrize("kind", KINDS)
def test_any_iterable_of_phrases_is_taken(loaded, kind):
    make, phrases = KINDS[kind], [["cat"], ["old", "tree"], None]
    asked = loaded.translate(SHORT[:3], constraints=phrases)
    assert "cat" in asked[0]
    assert "old" in asked[1]
    assert "tree" in asked[1]
    assert loaded.translate(SHORT[:3], constraints=iter([each and make(each) for each in phrases])) == asked


@pytest.mark.reported
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("one text", "expected a list of sentences, got one text, 'one text'"),
        (b"one text", "expected a list of sentences, got one text, b'one text'"),
        (None, "expected a list of sentences, got None"),
        (3, "expected a list of sentences, got an object of type int"),
        ({"a": "b"}, "got an object of type dict, not a sequence"),
        ({"a", "b"}, "got an object of type set, not a sequence"),
        (np.array("a"), "got an object of type ndarray, not a sequence"),
        (np.array([["a", "b"]]), "got an object of type ndarray, not a sequence"),
        (["a", None], "sentence 2: expected str, got NoneType: None"),
        (["a", float("nan")], "sentence 2: expected str, got float: nan"),
        (io.BytesIO(b"a\nb\n"), "sentence 1: expected str, got bytes: b'a"),
        ([["a"]], "sentence 1: expected str, got list: ['a']"),
        (["a", "\ud800"], "sentence 2: holds half a surrogate pair"),
    ],
)
def test_what_is_no_iterable_of_texts_is_refused(loaded, given, message):
    with pytest.raises(UserError) as caught:
        loaded.translate(given)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.reported
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefixes": "ab"}, "prefixes: expected a list with an item for each sentence, got one text, 'ab'"),
        ({"prefixes": 3}, "prefixes: expected a list with an item for each sentence, got an object of type int"),
        ({"prefixes": iter("a")}, "prefixes: expected one for each of 2 sentences, got 1"),
        ({"prefixes": ["a", 3]}, "sentence 2, its prefix: expected str, got int: 3"),
        ({"prefixes": ["a", "b\nc"]}, "sentence 2: a translation is one line, so it cannot hold 'b\\nc'"),
        ({"constraints": "ab"}, "constraints: expected a list with an item for each sentence, got one text, 'ab'"),
        ({"constraints": {"a": "b"}}, "constraints: expected a list with an item for each sentence, got an object of"),
        ({"constraints": [["a"], "b"]}, "sentence 2: expected a list of phrases, got one text, 'b'"),
        ({"constraints": [["a"], 3]}, "sentence 2: expected a list of phrases, got an object of type int"),
        ({"constraints": [["a"], iter([" "])]}, "sentence 2: expected phrases that are not empty, got [' ']"),
        ({"constraints": [["a"], ["b\r\nc"]]}, "sentence 2: a translation is one line, so it cannot hold 'b\\r\\nc'"),
    ],
)
def test_what_is_no_prefix_or_phrase_is_refused(loaded, options, message):
    with pytest.raises(UserError) as caught:
        loaded.translate(["a", "b"], **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.reported
def test_an_ensemble_may_come_from_a_generator(workdir, another):
    both = [transformer.load(workdir, ensemble=make([another])) for make in (list, iter)]
    assert both[0].translate(SHORT[:2]) == both[1].translate(SHORT[:2])
    with pytest.raises(UserError, match="ensemble: expected a list of workdirs, got None"):
        transformer.load(workdir, ensemble=None)


@pytest.mark.reported
def test_texts_lose_one_line_end_and_nothing_else(loaded, usual, capsys):
    lines = SHORT[:3]
    plain = {"prefixes": ["red"] * 3, "constraints": [["cat"]] * 3}
    asked = loaded.translate(lines, **plain)
    capsys.readouterr()
    for end in ("\n", "\r\n"):
        ended = {"prefixes": ["red" + end] * 3, "constraints": [["cat" + end]] * 3}
        assert loaded.translate([line + end for line in lines]) == [usual[LINES.index(line)] for line in lines]
        assert loaded.translate(lines, **ended) == asked
    assert "line breaks" not in capsys.readouterr().err
    assert loaded.translate(["red\r", "red\rcat"]) != loaded.translate(["red", "red cat"])
    assert loaded.translate(["red\r\ncat", "\nred\n\ncat\r\n"]) == loaded.translate(["red cat"] * 2)
    assert "warning: 2 sources hold line breaks, read as spaces" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.reported
def test_cr_lf_in_stdin_and_in_files_beside_it_ends_lines(command, tmp_path):
    def run(cr):
        files = {"prefixes": ["red", "", "old cat"], "phrases": ["cat\told", "tree", ""]}
        for name, lines in files.items():
            (tmp_path / name).write_bytes("".join(f"{line}{cr}\n" for line in lines).encode())
        flags = [f"--prefix_file={tmp_path}/prefixes", f"--constraint_file={tmp_path}/phrases"]
        return command([line + cr for line in SHORT[:3]], "--decode.max_extra_length=25", *flags)

    assert run("\r") == run("")


@pytest.mark.reported
def test_truncated_translations_are_counted_and_logged(loaded, capsys):
    count = sum(not one.finished for (one,) in loaded.translate(SHORT, n_best=1))
    assert count
    assert f"warning: {count} translations are cut at source tokens + decode.max_extra_length = 10" in (
        capsys.readouterr().err
    )
