"""From a corpus to batches: ids cached once, batches by step, vocabularies never made anew in silence."""

import dataclasses
import itertools
import pathlib
import re

import numpy as np
import pytest

from tests.conftest import small_config
from transformer.config import validation
from transformer.data import corpus as corpora
from transformer.data import input_pipeline, prepared, token_id_cache, tokenizer, vocabulary
from transformer.data.batching import JaggedArray
from transformer.data.tokenizer import EOS, PAD
from transformer.runtime.errors import UserError


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A folder of small text files: 200 pairs of up to 12 words and two that are longer."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    words = [f"{a}{b}" for a in "bdgklmn" for b in ("a", "ei", "ou")]

    def lines(count, longest):
        return [" ".join(rng.choice(words, rng.integers(3, longest))) for _ in range(count)]

    for split, count in (("train", 200), ("val", 20), ("test", 10)):
        source = lines(count, 13) + [" ".join(words * 4)] * (2 if split == "train" else 0)
        (folder / f"{split}.en").write_text("\n".join(source) + "\n")
        (folder / f"{split}.de").write_text("\n".join(line[::-1] for line in source) + "\n")
    return small_config(
        data={"name": "text", "dir": str(folder), "data_dir": str(folder / "prepared"), "vocab_size": 290}
    )


@pytest.fixture(scope="module")
def opened(config, tmp_path_factory):
    corpus = corpora.open_corpus(config.data)
    stored = tmp_path_factory.mktemp("workdir") / "tokenizer"
    trained = vocabulary.get_tokenizer(config.data, corpus, stored)
    return corpus, trained, input_pipeline.token_ids(config.data, corpus, "train", trained)


def test_ids_are_those_of_the_sentences_in_order(opened):
    corpus, trained, ids = opened
    sources = corpus.split("train").sources()
    assert len(ids.source) == len(ids.target) == len(sources) == 202
    for i in (0, 57, 201):
        got = ids.source.flat[ids.source.offsets[i] : ids.source.offsets[i + 1]]
        np.testing.assert_array_equal(got, trained.encode(sources[i : i + 1])[0])


def test_a_sentence_is_tokenized_once(config, opened, monkeypatch):
    corpus, trained, ids = opened
    monkeypatch.setattr(type(trained), "encode", lambda *_: pytest.fail("tokenized again"))
    again = input_pipeline.token_ids(config.data, corpus, "train", trained)
    np.testing.assert_array_equal(again.target.flat, ids.target.flat)


def test_another_vocabulary_has_ids_of_its_own(config, opened):
    corpus, _, ids = opened
    other = tokenizer.train([" ".join(pair) for pair in corpus.split("train")], 280, "bpe")
    assert not np.array_equal(
        input_pipeline.token_ids(config.data, corpus, "train", other).source.offsets, ids.source.offsets
    )


@pytest.mark.parametrize("name", [*token_id_cache.FILES, token_id_cache.METADATA_FILE])
def test_damaged_ids_are_made_anew(config, opened, name, capsys):
    corpus, _, _ = opened
    other = tokenizer.train([" ".join(pair) for pair in corpus.split("train")], 285, "bpe")
    wanted = [np.array(side.flat) for side in input_pipeline.token_ids(config.data, corpus, "validation", other)]
    (folder,) = (pathlib.Path(config.data.data_dir) / "token_ids").glob(f"*{other.digest[:24]}")
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    got = input_pipeline.token_ids(config.data, corpus, "validation", other)
    assert "damaged" in capsys.readouterr().err
    np.testing.assert_array_equal(got.source.flat, wanted[0])
    np.testing.assert_array_equal(got.target.flat, wanted[1])


def test_cached_ids_of_an_unknown_format_are_rebuilt(config, opened, capsys):
    corpus, trained, ids = opened
    (folder,) = (pathlib.Path(config.data.data_dir) / "token_ids").glob(
        f"{corpus.split('train').digest[:24]}*{trained.digest[:24]}"
    )
    path = folder / token_id_cache.METADATA_FILE
    path.write_text(path.read_text().replace("uint16", "uint17"))
    got = input_pipeline.token_ids(config.data, corpus, "train", trained)
    assert "damaged" in capsys.readouterr().err
    np.testing.assert_array_equal(got.source.flat, ids.source.flat)


def test_nothing_half_written_stays_behind(config, opened, monkeypatch):
    corpus, _, _ = opened
    other = tokenizer.train([" ".join(pair) for pair in corpus.split("train")], 275, "bpe")
    monkeypatch.setattr(input_pipeline.np, "save", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(UserError, match="disk full"):
        input_pipeline.token_ids(config.data, corpus, "train", other)
    folder = pathlib.Path(config.data.data_dir) / "token_ids"
    assert not list(folder.glob(f"*{other.digest[:24]}"))
    monkeypatch.undo()
    input_pipeline.token_ids(config.data, corpus, "train", other)
    assert not list(folder.glob("*partial*"))


def rows_of(host, hosts):
    return lambda count: np.array_split(np.arange(count), hosts)[host]


@pytest.mark.parametrize(("start", "hosts"), [(0, 1), (7, 1), (7, 2), (25, 4)])
def test_batches_depend_on_the_step_alone(config, opened, start, hosts):
    _, _, ids = opened
    plan = input_pipeline.make_batch_schedule(config, ids)
    whole = input_pipeline.train_iterator(plan, ids, start=0, num_steps=30)
    wanted = list(itertools.islice(whole, start, 30))
    parts = [
        list(input_pipeline.train_iterator(plan, ids, start=start, num_steps=30, rows=rows_of(host, hosts)))
        for host in range(hosts)
    ]
    assert {len(part) for part in parts} == {30 - start}
    for step, batch in enumerate(wanted):
        for side in ("source_BS", "target_BT"):
            together = np.concatenate([getattr(part[step], side) for part in parts])
            np.testing.assert_array_equal(together, getattr(batch, side))


@pytest.mark.parametrize("batching", ["bucket", "pack"])
def test_the_seed_of_the_config_orders_the_data(config, opened, batching):
    _, _, ids = opened
    orders = []
    for seed in (0, 1, 1):
        changed = dataclasses.replace(config, data=dataclasses.replace(config.data, batching=batching))
        changed = validation.replace_field(changed, "train.seed", seed)
        orders.append(input_pipeline.make_batch_schedule(changed, ids).batch(0).examples_B.tolist())
    assert orders[0] != orders[1] == orders[2]


def test_long_pairs_are_dropped_and_counted(config, opened):
    _, _, ids = opened
    plan = input_pipeline.make_batch_schedule(config, ids)
    too_long = int(((ids.source.lengths > 32) | (ids.target.lengths > 32)).sum())
    assert plan.dropped == too_long >= 2
    batch = next(input_pipeline.train_iterator(plan, ids, start=0, num_steps=1))
    assert max(batch.source_BS.shape[1], batch.target_BT.shape[1]) <= 32
    last = [row[row != PAD][-1] for row in batch.target_BT if (row != PAD).any()]
    assert set(last) == {EOS}


@pytest.mark.parametrize("batching", ["bucket", "pack"])
def test_the_config_says_what_widths_are_multiples_of(config, opened, batching):
    data = dataclasses.replace(config.data, batching=batching, length_multiple=8)
    plan = input_pipeline.make_batch_schedule(dataclasses.replace(config, data=data), opened[2])
    assert all(bucket.source % 8 == bucket.target % 8 == 0 for bucket in plan.buckets)
    assert (
        plan.buckets
        != input_pipeline.make_batch_schedule(dataclasses.replace(config, data=config.data), opened[2]).buckets
    )


@pytest.mark.parametrize(
    ("pairs", "sections", "expected"),
    [
        (300, {}, "shapes of batches: 8, each of which is compiled, for 8 batches an epoch; fill 0.1"),
        (300, {"data": {"batching": "pack"}}, None),
        (4000, {"data": {"num_buckets": 1}, "train": {"batch_tokens": 256}}, "shapes of batches: 1, each .* fill 0.1"),
        (4000, {"train": {"batch_tokens": 256}}, None),
    ],
)
def test_low_fill_and_many_shapes_are_reported_with_what_helps(pairs, sections, expected, capsys):
    """The figures are those of the schedule with that change alone."""
    lengths = np.clip(np.random.default_rng(0).lognormal(2.8, 0.6, pairs), 2, 128).astype(int)
    ids = input_pipeline.TokenIds(*[JaggedArray(np.zeros(lengths.sum(), np.int32), np.cumsum([0, *lengths]))] * 2)
    given = {"data": {"max_length": 128, **sections.get("data", {})}}
    given["train"] = {"batch_tokens": 4096, **sections.get("train", {})}
    config = validation.to_dataclasses(given)
    input_pipeline.make_batch_schedule(config, ids)
    shown = capsys.readouterr().err
    if expected is None:
        assert shown == ""
        return
    assert re.search(f"^warning: {expected}", shown)
    assert shown.count("\n") == 1
    changes = re.findall(r"([a-z]+\.[a-z_]+) = (\w+) gives fill ([01]\.[0-9]+), shapes: ([0-9]+)", shown)
    names = ["data.num_buckets", "data.batching", *["train.batch_tokens"] * (pairs == 300)]
    assert [name for name, *_ in changes] == names
    for name, value, fill, shapes in changes:
        value = int(value) if value.isdecimal() else value
        schedule = input_pipeline.make_batch_schedule(validation.replace_field(config, name, value), ids)
        assert f"{schedule.fill:.2f}" == fill
        assert len(schedule.buckets) == int(shapes)
        assert float(fill) > float(re.search(r"fill (0.[0-9]+) \(", shown)[1])


def test_no_change_is_advised_that_the_config_would_not_accept(capsys):
    lengths = np.clip(np.random.default_rng(0).lognormal(2.8, 0.6, 300), 2, 128).astype(int)
    ids = input_pipeline.TokenIds(*[JaggedArray(np.zeros(lengths.sum(), np.int32), np.cumsum([0, *lengths]))] * 2)
    given = {"data": {"max_length": 128}, "train": {"batch_tokens": 4096}}
    given["model"] = {"attention": "cudnn", "dtype": "bfloat16", "attention_dropout_rate": 0.0}
    input_pipeline.make_batch_schedule(validation.to_dataclasses(given), ids)
    shown = capsys.readouterr().err
    assert re.findall(r"([a-z]+\.[a-z_]+) = ", shown) == ["data.num_buckets", "train.batch_tokens"]


def test_if_every_pair_is_too_long_there_is_nothing_to_train_on(config, opened):
    short = dataclasses.replace(config, data=dataclasses.replace(config.data, max_length=2))
    with pytest.raises(UserError, match=r"max_length = 2: all 202 training pairs"):
        input_pipeline.make_batch_schedule(short, opened[2])


def test_a_vocabulary_is_trained_once_and_then_used_by_every_run(config, opened, tmp_path, monkeypatch):
    corpus, trained, _ = opened
    monkeypatch.setattr(tokenizer, "train", lambda *_: pytest.fail("trained again"))
    for workdir in (tmp_path / "one", tmp_path / "other", tmp_path / "one"):
        assert vocabulary.get_tokenizer(config.data, corpus, workdir).digest == trained.digest
        assert tokenizer.load(workdir).digest == trained.digest


def test_each_corpus_direction_size_and_type_has_a_vocabulary_of_its_own(config, opened, tmp_path):
    def kept(data, corpus):
        before = set(tmp_path.glob("vocabularies/*/*.model"))
        vocabulary.get_or_train_tokenizer(dataclasses.replace(data, data_dir=str(tmp_path)), corpus)
        return len(set(tmp_path.glob("vocabularies/*/*.model")) - before)

    corpus, data = opened[0], config.data
    back = dataclasses.replace(data, source_language="de", target_language="en")
    other = dataclasses.replace(data, train_source=f"{data.dir}/val.en", train_target=f"{data.dir}/val.de", dir="")
    assert kept(data, corpus) == 1
    assert kept(data, corpus) == 0
    assert kept(back, corpora.open_corpus(back)) == 1
    assert kept(other, corpora.open_corpus(other)) == 1
    assert kept(dataclasses.replace(data, vocab_size=288), corpus) == 1
    assert kept(dataclasses.replace(data, tokenizer="unigram", vocab_size=280), corpus) == 1


def test_what_could_not_be_published_the_next_run_publishes(config, opened, tmp_path, monkeypatch):
    corpus, data = opened[0], dataclasses.replace(config.data, data_dir=str(tmp_path))
    published, makers = (
        [],
        (
            lambda: vocabulary.get_or_train_tokenizer(data, corpus),
            lambda: input_pipeline.token_ids(data, corpus, "validation", opened[1]),
        ),
    )

    def fail(folder):
        raise OSError("no network")

    for make in makers:
        monkeypatch.setattr(prepared.object_storage, "push", fail)
        with pytest.raises(UserError, match="no network"):
            make()
        monkeypatch.setattr(prepared.object_storage, "push", published.append)
        make()
    assert [folder.parent.name for folder in published] == ["vocabularies", "token_ids"]
    assert all(any(folder.iterdir()) for folder in published)


def test_a_training_that_fails_leaves_no_folder_that_would_pass_for_a_vocabulary(config, opened, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "train", lambda *_: (_ for _ in ()).throw(UserError("failed")))
    with pytest.raises(UserError, match="failed"):
        vocabulary.get_or_train_tokenizer(dataclasses.replace(config.data, data_dir=str(tmp_path)), opened[0])
    assert not list(tmp_path.glob("vocabularies/[!.]*"))


def test_a_damaged_vocabulary_is_trained_anew(config, opened, capsys):
    corpus, trained, _ = opened
    (path,) = (pathlib.Path(config.data.data_dir) / "vocabularies").glob(f"*/{trained.digest}.model")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert vocabulary.get_or_train_tokenizer(config.data, corpus).digest == trained.digest
    assert f"{path}: damaged; training the vocabulary again" in capsys.readouterr().err
    assert path.read_bytes() != content


def test_before_the_first_checkpoint_another_size_makes_another_vocabulary(config, opened, tmp_path, capsys):
    corpus, trained, _ = opened
    trained.save(tmp_path)
    smaller = dataclasses.replace(config.data, vocab_size=280)
    assert vocabulary.get_tokenizer(smaller, corpus, tmp_path).vocab_size == 280
    assert "replacing the vocabulary" in capsys.readouterr().err
    assert tokenizer.load(tmp_path).vocab_size == 280


def test_before_the_first_checkpoint_another_or_damaged_vocabulary_is_replaced(config, opened, tmp_path, capsys):
    corpus, trained, _ = opened
    path = tmp_path / trained.file_name
    for kind, damage in (("unigram", b""), ("bpe", b"x")):
        trained.save(tmp_path)
        path.write_bytes(path.read_bytes() + damage)
        got = vocabulary.get_tokenizer(dataclasses.replace(config.data, tokenizer=kind), corpus, tmp_path)
        assert "replacing the vocabulary" in capsys.readouterr().err
        assert (got.digest == trained.digest) is (kind == "bpe")
        assert tokenizer.load(tmp_path).digest == got.digest


def test_after_it_the_vocabulary_must_be_that_of_the_checkpoints(config, opened, tmp_path):
    corpus, trained, _ = opened
    trained.save(tmp_path / "right")
    assert vocabulary.check_same_tokenizer(config.data, corpus, tmp_path / "right", trained) is trained
    with pytest.raises(UserError, match="missing or not the one"):
        vocabulary.check_same_tokenizer(config.data, corpus, tmp_path / "none", trained)
    tokenizer.train(["a b c"] * 9, 264, "unigram").save(tmp_path / "other")
    with pytest.raises(UserError, match="missing or not the one"):
        vocabulary.check_same_tokenizer(config.data, corpus, tmp_path / "other", trained)


def test_after_it_the_config_may_name_the_same_vocabulary_elsewhere_and_no_other(config, opened, tmp_path):
    corpus, trained, _ = opened
    trained.save(tmp_path / "run" / "tokenizer")
    trained.save(tmp_path / "moved")
    tokenizer.train(["a b c"] * 9, 264, "bpe").save(tmp_path / "other")

    def go_on(folder):
        path = str(tmp_path / folder / tokenizer.FILE_NAME)
        data = dataclasses.replace(config.data, tokenizer=path, vocab_size=tokenizer.load(path).vocab_size)
        return vocabulary.check_same_tokenizer(data, corpus, tmp_path / "run" / "tokenizer", trained)

    assert go_on("moved") is trained
    with pytest.raises(UserError, match=r"other/sentencepiece\.model: is not the vocabulary of the run .*: expected"):
        go_on("other")


def test_a_vocabulary_from_elsewhere_must_have_the_size_the_config_says(config, opened, tmp_path):
    corpus, trained, _ = opened
    trained.save(tmp_path / "given")
    path = str(tmp_path / "given" / tokenizer.FILE_NAME)
    data = dataclasses.replace(config.data, tokenizer=path)
    assert vocabulary.get_tokenizer(data, corpus, tmp_path / "a").digest == trained.digest
    assert (tmp_path / "a" / tokenizer.FILE_NAME).exists()
    wrong = dataclasses.replace(data, vocab_size=999)
    with pytest.raises(UserError, match=r"has 290 tokens; set data\.vocab_size = 290"):
        vocabulary.get_tokenizer(wrong, corpus, tmp_path / "b")


def test_codes_get_the_pieces_of_the_training_text_and_other_codes_other_ones(config, opened, tmp_path):
    corpus, path = opened[0], tmp_path / "my.codes"

    def get(merge):
        path.write_text(f"#version: 0.2\n{merge}\n")
        data = dataclasses.replace(config.data, tokenizer=str(path), vocab_size=9999)
        with pytest.raises(UserError, match=r"my\.codes has .* tokens; set data\.vocab_size") as refused:
            vocabulary.get_tokenizer(data, corpus, tmp_path / "run")
        data = dataclasses.replace(data, vocab_size=int(str(refused.value).split()[-1]))
        got = vocabulary.get_tokenizer(data, corpus, tmp_path / "run")
        with pytest.raises(UserError, match=r"vocab_size = 8888, but .* has .* tokens"):
            vocabulary.get_tokenizer(dataclasses.replace(data, vocab_size=8888), corpus, tmp_path / "run")
        return got

    one, other = get("e i</w>"), get("o u</w>")
    assert "ei" in one.pieces(range(one.vocab_size))
    assert "ou" in other.pieces(range(other.vocab_size))
    assert other.digest == tokenizer.load(tmp_path / "run").digest
    line = corpus.split("train").sources()[0]
    assert one.decode(one.encode([line])[0]) == line


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_the_model_type_is_the_config_s(config, opened, tmp_path, model_type):
    corpus, trained, _ = opened
    data = dataclasses.replace(config.data, tokenizer=model_type)
    got = vocabulary.get_tokenizer(data, corpus, tmp_path / model_type)
    assert (got.digest == trained.digest) == (model_type == "bpe")


@pytest.mark.reported
@pytest.mark.parametrize(("length", "warns"), [(32, False), (9, True)])
def test_a_line_says_if_more_than_a_tenth_is_too_long(config, opened, capsys, length, warns):
    _, _, ids = opened
    short = dataclasses.replace(config, data=dataclasses.replace(config.data, max_length=length))
    plan = input_pipeline.make_batch_schedule(short, ids)
    total = len(ids.source)
    assert (plan.dropped > total / 10) == warns
    warning = (
        f"warning: {plan.dropped:,} of {total:,} training pairs ({plan.dropped / total:.0%}) are longer than data.max"
    )
    assert (warning in capsys.readouterr().err) == warns
