"""What the report says of a small corpus, counted by hand."""

import dataclasses

import pytest

from transformer.config import Config, DataConfig, TrainConfig
from transformer.data import corpus as corpora
from transformer.data import input_pipeline, statistics, tokenizer, vocabulary

TRAIN = [
    *[("one two", "eins zwei")] * 3,
    ("one two", "eins  und zwei"),
    ("", "leer"),
    ("three", "drei"),
    ("long " * 40, "lang"),
    ("ab", "c"),  # together the same letters as the next
    ("a", "bc"),
]
VALID = [("one two", "something else"), ("new", "neu"), ("", "")]
TEST = [("x" * 60, "y"), ("three", "drei"), ("three", "drei"), ("日本", "ß")]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    for name, pairs in {"train": TRAIN, "val": VALID, "test": TEST}.items():
        for side, language in enumerate(("en", "de")):
            (folder / f"{name}.{language}").write_text("".join(f"{pair[side]}\n" for pair in pairs))
    data = DataConfig(name="text", dir=str(folder), data_dir=str(folder / "data"), max_length=40, vocab_size=283)
    config = Config(data=data, train=TrainConfig(num_steps=100, batch_tokens=64))
    corpus = corpora.open_corpus(data)
    splits = {name: corpus.split(name) for name in corpus.names}
    trained = vocabulary.get_or_train_tokenizer(data, corpus)
    ids = {name: input_pipeline.token_ids(data, corpus, name, trained) for name in splits}
    return config, corpus, splits, ids, trained


def test_texts_are_counted(parts):
    _, _, splits, _, _ = parts
    texts = {name: statistics.read_texts(split) for name, split in splits.items()}
    assert texts["train"].words == (2 * 4 + 1 + 40 + 2, 2 * 3 + 3 + 1 + 1 + 2)
    assert {name: text.duplicates for name, text in texts.items()} == {"train": 2, "validation": 0, "test": 1}
    assert texts["validation"].sources_in(texts["train"]) == 1
    assert texts["test"].sources_in(texts["train"]) == 2
    assert texts["test"].sources_in(texts["validation"]) == 0


def test_tokens_are_counted(parts, monkeypatch):
    _, _, splits, ids, trained = parts
    for chunk in (1 << 24, 7):
        monkeypatch.setattr(statistics, "_CHUNK_TOKENS", chunk)
        source, target = (statistics.count_tokens(side, trained) for side in ids["test"])
        pieces = [trained.pieces(line[:-1]) for line in trained.encode(splits["test"].sources())]
        lengths = sorted(len(line) for line in pieces)
        assert source.total == sum(lengths)
        assert source.lengths == (lengths[2], lengths[3], lengths[3], lengths[3])
        assert source.unknown == 0
        assert source.byte_fallback == 6 + 60  # 日本 in UTF-8, and an x that training has not
        assert target.byte_fallback == 2 + 1  # ß, y


def test_unknown_tokens_are_counted(parts):
    trained = parts[-1]
    from transformer.data.batching import JaggedArray

    ids = JaggedArray.from_sequences([[9, tokenizer.UNK, tokenizer.EOS], [tokenizer.UNK, tokenizer.EOS]])
    assert statistics.count_tokens(ids, trained).unknown == 2
    assert statistics.count_tokens(ids, trained).lengths == (2, 2, 2, 2)


def test_a_split_of_no_pairs_is_no_trouble(parts):
    from transformer.data.batching import JaggedArray

    assert statistics.count_tokens(JaggedArray.from_sequences([]), parts[-1]).lengths == (0, 0, 0, 0)


def rows(text):
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line.startswith("│")]


def test_the_tables_say_it(parts, capsys):
    config, corpus, splits, ids, trained = parts
    plan = input_pipeline.make_batch_schedule(config, ids["train"])
    statistics.print_report(config, splits, ids, plan, corpus, trained)
    out = capsys.readouterr().out
    pairs, tokens = rows(out)[:3], rows(out)[3:]
    assert pairs == [
        ["train", "8", "1", "1 dropped", "2 (25.0%)", ""],
        ["validation", "3", "", "0 kept", "0 (0.0%)", "1 (33.3%)"],
        ["test", "4", "", "1 kept", "1 (25.0%)", "2 (50.0%)"],
    ]
    assert [row[:2] for row in tokens] == [
        [name, side] for name in ("train", "validation", "test") for side in ("en", "de")
    ]
    assert all(len(row) == 10 for row in tokens)
    assert f"{plan.steps_per_epoch} steps an epoch, {plan.fill:.1%} of their target token positions filled" in out
    assert f"train.num_steps = 100 are {100 / plan.steps_per_epoch:,.1f} epochs" in out


def test_the_report_shows_what_each_filter_took(parts, capsys):
    config, _, _, ids, trained = parts
    chain = {"filter_max_ratio": 3.0, "filter_controls": True, "filter_duplicates": True}
    corpus = corpora.open_corpus(dataclasses.replace(config.data, **chain))
    splits = {"train": corpus.split("train")}
    ids = {"train": input_pipeline.token_ids(config.data, corpus, "train", trained)}
    statistics.print_report(
        config, splits, ids, input_pipeline.make_batch_schedule(config, ids["train"]), corpus, trained
    )
    out = capsys.readouterr().out
    assert rows(out)[0] == ["train", "5", "1", "0 dropped", "0 (0.0%)", ""]
    assert "Filters of 8 training pairs" in out
    assert rows(out)[3:] == [
        ["ratio", "a side has over 3 times the words of the other", "1 (12.5%)"],
        ["controls", "control characters or U+FFFD", "0 (0.0%)"],
        ["duplicates", "the pair occurs before", "2 (25.0%)"],
    ]
    assert f"ratio: {('long ' * 40)[:80]}… → lang\n" in out
    assert out.count("duplicates: one two → eins zwei\n") == 2
    assert statistics._shorten("a\x07\ufffd\u2028b") == "a\\x07\ufffd\\u2028b"


def test_markup_in_a_name_is_escaped(parts, capsys):
    config, corpus, splits, ids, trained = parts
    plan = input_pipeline.make_batch_schedule(dataclasses.replace(config), ids["train"])
    renamed = {"train": splits["train"], "[b]": splits["test"]}
    both = {"train": ids["train"], "[b]": ids["test"]}
    statistics.print_report(config, renamed, both, plan, corpus, trained)
    assert "[b]" in capsys.readouterr().out
