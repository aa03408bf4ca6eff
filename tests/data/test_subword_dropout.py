"""Subword dropout of training batches: the same text, split by seed, step and example alone, in rows that it fits."""

import dataclasses
import hashlib
import itertools

import numpy as np
import pytest

from tests.conftest import small_config
from transformer.data import corpus as corpora
from transformer.data import input_pipeline, subword_dropout, tokenizer
from transformer.data.batching import PAD_EXAMPLE, BatchSpec, Bucket, JaggedArray
from transformer.data.bpe_dropout import BpeMerges, segment
from transformer.data.subword_dropout import LengthModel, LengthSample, PlannedLengths
from transformer.data.tokenizer import EOS, PAD, BpePiece
from transformer.data.vocabulary import get_or_train_tokenizer
from transformer.runtime.errors import UserError
from transformer.training import session

BATCHING = pytest.mark.parametrize("batching", ["bucket", "pack"])


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A folder of text files: 3,000 pairs of log-normal lengths, words with frequencies as of Zipf."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    parts = [a + b for a in "bdgklmnprst" for b in ("a", "ei", "ou", "en")]
    words = np.array(["".join(rng.choice(parts, rng.integers(1, 5))) for _ in range(1500)])
    frequencies = 1 / (np.arange(len(words)) + 3)

    def lines(count):
        lengths = np.clip(rng.lognormal(2.2, 0.5, count), 1, 40).astype(int)
        return [" ".join(rng.choice(words, n, p=frequencies / frequencies.sum())) for n in lengths]

    for split, count in (("train", 3000), ("val", 10)):
        source = [*lines(count - 2), "☃ naïve 1,000", "x " * 30]
        for language, texts in (("en", source), ("de", lines(count))):
            (folder / f"{split}.{language}").write_text("\n".join(texts) + "\n")
    data = {"name": "text", "dir": str(folder), "data_dir": str(folder / "prepared"), "vocab_size": 600}
    return small_config(data={**data, "max_length": 64, "subword_dropout": 0.1}, train={"batch_tokens": 1024})


@pytest.fixture(scope="module")
def opened(config):
    """The tokenizer; and the ids of training without and with dropout."""
    corpus = corpora.open_corpus(config.data)
    trained = get_or_train_tokenizer(config.data, corpus)
    ids = input_pipeline.token_ids(config.data, corpus, "train", trained)
    return trained, ids, input_pipeline.with_subword_dropout(config, ids, trained)


def with_fields(config, **fields):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **fields))


def batches_of(config, ids, start=0, num_steps=30, rows=np.arange):
    schedule = input_pipeline.make_batch_schedule(config, ids)
    return list(input_pipeline.train_iterator(schedule, ids, start=start, num_steps=num_steps, rows=rows))


def sentences_of(padded):
    """The sentences of all rows, without EOS."""
    rows = [row[row != PAD] for row in padded]
    return [part[:-1] for row in rows for part in np.split(row, np.flatnonzero(row == EOS) + 1) if len(part)]


@BATCHING
def test_the_text_is_the_same_and_its_segmentation_is_not(config, opened, batching):
    config = with_fields(config, batching=batching)
    trained, ids, dropped = opened
    schedule = input_pipeline.make_batch_schedule(config, dropped)
    num_other = num_all = 0
    for step, batch in enumerate(batches_of(config, dropped, num_steps=5)):
        spec = schedule.batch(step)
        examples = spec.examples_B[spec.examples_B != PAD_EXAMPLE]
        for side, padded, width in zip(ids, batch, spec.bucket[:2], strict=True):
            assert padded.shape == (spec.bucket.rows, width)
            made = sentences_of(padded)
            assert len(made) == len(examples) > 0
            for example, sentence in zip(examples, made, strict=True):
                plain = side.flat[side.offsets[example] : side.offsets[example + 1] - 1]
                assert trained.decode(sentence.tolist()) == trained.decode(plain.tolist())
                num_other += not np.array_equal(sentence, plain)
                num_all += 1
    assert 0.3 < num_other / num_all < 1


@BATCHING
@pytest.mark.parametrize(("start", "hosts"), [(1, 1), (17, 1), (17, 2), (25, 4)])
def test_batches_depend_on_the_step_alone(config, opened, batching, start, hosts):
    config, ids = with_fields(config, batching=batching), opened[2]
    wanted = batches_of(config, ids)[start:]
    parts = [
        batches_of(config, ids, start, rows=lambda count, host=host: np.array_split(np.arange(count), hosts)[host])
        for host in range(hosts)
    ]
    for step, batch in enumerate(wanted):
        for side in (0, 1):
            np.testing.assert_array_equal(np.concatenate([part[step][side] for part in parts]), batch[side])


def test_another_step_side_position_or_seed_chooses_other_segmentations(config, opened):
    trained, ids, _ = opened
    sentence = np.array([*trained.encode([" ".join(["boutala"] * 200)])[0]])
    plain = JaggedArray.from_sequences([sentence, sentence])
    word = trained.encode(["boutala"])[0][:-1].astype(np.uint16)
    sides = [JaggedArray.from_sequences([np.append(word, EOS)] * 4)] * 2
    rate = with_fields(config, subword_dropout=0.5)
    dropout = subword_dropout.make_dropout(rate, trained, sides, None)

    def chosen(dropout, key):
        made, fallbacks = dropout.split(plain, np.uint64(key), np.array([3, 4]), np.arange(2), 10_000)
        assert fallbacks == 0
        return [tuple(each.tolist()) for each in sentences_of(made.to_padded(np.arange(2), 10_000))]

    once = chosen(dropout, 1)
    assert len({*once, *chosen(dropout, 2)}) == 4
    assert once == chosen(subword_dropout.make_dropout(rate, trained, sides, None), 1)
    seeded = dataclasses.replace(rate, train=dataclasses.replace(rate.train, seed=5))
    assert once != chosen(subword_dropout.make_dropout(seeded, trained, sides, None), 1)
    first, other = (batches_of(each, input_pipeline.with_subword_dropout(each, ids, trained), num_steps=2)
                    for each in (config, dataclasses.replace(config, train=seeded.train)))  # fmt: skip
    assert not np.array_equal(first[0].target_BT, other[0].target_BT)
    words = [len(trained.decode(list(each)).split()) for each in once]
    assert words == [200, 200]


def test_every_segmentation_of_the_table_is_chosen_equally_often(config, opened):
    trained = opened[0]
    word = trained.encode(["boutala"])[0][:-1].astype(np.uint16)
    sides = [JaggedArray.from_sequences([np.append(word, EOS)])] * 2
    dropout = subword_dropout.make_dropout(with_fields(config, subword_dropout=0.5), trained, sides, None)
    table = dropout._table.segmentations
    known = [tuple(table.flat[a:b].tolist()) for a, b in itertools.pairwise(table.offsets)]
    assert len(known) == subword_dropout.SEGMENTATIONS
    count = 8000
    plain = JaggedArray.from_sequences([np.append(word, EOS)] * count)
    made, _ = dropout.split(plain, np.uint64(1), np.arange(count), np.arange(count), 100)
    got = [tuple(ids.tolist()) for ids in sentences_of(made.to_padded(np.arange(count), 100))]
    for each in set(known):
        share = known.count(each) / len(known)
        assert got.count(each) / count == pytest.approx(share, abs=5 * np.sqrt(share * (1 - share) / count))


@BATCHING
def test_at_most_one_sentence_in_a_hundred_falls_back(config, opened, batching, capsys):
    config = with_fields(config, batching=batching)
    trained, ids, _ = opened
    dropped = input_pipeline.with_subword_dropout(config, ids, trained)
    batches_of(config, dropped, num_steps=100)
    assert dropped.dropout.num_sentences > 1000
    assert 0 < dropped.dropout.fallback_share <= 0.01
    shown = capsys.readouterr().err
    assert f"sentences ({dropped.dropout.fallback_share:.2%}) in" in shown
    assert "warning: subword" not in shown


@BATCHING
@pytest.mark.parametrize("longest", [12, 20, 64])
def test_the_schedule_keeps_the_same_pairs(config, opened, batching, longest):
    config = with_fields(config, batching=batching, max_length=longest)
    _, ids, dropped = opened
    plain, planned = (input_pipeline.make_batch_schedule(config, each) for each in (ids, dropped))
    assert (plain.kept, plain.dropped) == (planned.kept, planned.dropped)
    assert planned.steps_per_epoch > plain.steps_per_epoch
    lengths = np.maximum(ids.source.lengths, ids.target.lengths)
    for schedule in (plain, planned):
        specs = [schedule.batch(step) for step in range(schedule.steps_per_epoch)]
        examples = np.sort(np.concatenate([spec.examples_B[spec.examples_B != PAD_EXAMPLE] for spec in specs]))
        np.testing.assert_array_equal(examples, np.flatnonzero(lengths <= longest))
    dropped.dropout.num_sentences = dropped.dropout.num_fallbacks = 0
    batches_of(config, dropped, num_steps=planned.steps_per_epoch)
    assert dropped.dropout.num_sentences == 2 * plain.kept
    assert dropped.dropout.fallback_share <= 0.01


def test_rows_are_no_wider_than_learned_positions_reach(config, opened):
    config = with_fields(config, max_length=20)
    learned = dataclasses.replace(config.model, positions="learned", max_positions=22)
    for model, widest in ((config.model, range(23, 40)), (learned, range(22, 23))):
        schedule = input_pipeline.make_batch_schedule(dataclasses.replace(config, model=model), opened[2])
        assert schedule.buckets[-1].target in widest


@BATCHING
def test_no_sentence_outgrows_the_learned_positions(config, opened, batching):
    """Though rows are wider: of several sentences, or as a multiple of 8."""
    config = with_fields(config, batching=batching, max_length=20, length_multiple=8)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, positions="learned", max_positions=22))
    ids = input_pipeline.with_subword_dropout(config, opened[1], opened[0])
    for side in zip(*batches_of(config, ids, num_steps=200), strict=True):
        lengths = [len(sentence) + 1 for padded in side for sentence in sentences_of(padded)]
        assert 20 < max(lengths) <= 22


def test_the_plan_has_headroom():
    lengths = np.array([1, 2, 25, 64, 96, 500])
    model = LengthModel(0.1, 1.5)
    np.testing.assert_array_equal(model.plan(lengths), [3, 5, 35, 83, 121, 584])
    np.testing.assert_array_equal(PlannedLengths(lengths, model, 100, 110)[1:], [5, 35, 83, 110, 111])


def test_the_fallbacks_that_are_planned_for_are_counted_like_those_of_batches():
    """Two rows of 10 source tokens, with sentences of 4 and 5, and of 9; those that grow too much are counted."""

    class Schedule:
        steps_per_epoch, kept = 1, 3

        def batch(self, step):
            return BatchSpec(Bucket(10, 99, 2), np.array([[0, 1], [2, PAD_EXAMPLE]]))

    sides = [np.array([4, 5, 9]), np.array([5, 5, 12])]
    assert LengthSample((sides[0],) * 2, (sides[1],) * 2).fallback_share(Schedule()) == 1 / 6
    sides = [np.array([4, 5, 9]), np.array([5, 6, 12])]
    assert LengthSample((sides[0],) * 2, (sides[1],) * 2).fallback_share(Schedule()) == 2 / 6


class HandmadeVocabulary:
    """A BPE vocabulary of five letters, in which all pairs, and then all words of three letters, are merged."""

    letters = [f"▁{c}" for c in "ab"] + list("cde")

    def bpe_pieces(self):
        pairs = [a + b for a in self.letters[:2] for b in self.letters[2:]] + [a + b for a in "cde" for b in "cde"]
        texts = ["▁", "a", "b", *"cde", *self.letters[:2], *pairs, *(pair + c for pair in pairs[:6] for c in "cde")]
        specials = [BpePiece(f"<{number}>", 0.0, False) for number in range(4)]
        return specials + [BpePiece(text, -float(number), True) for number, text in enumerate(texts)]


# They change with what every run with this field trains on: never, unless such runs shall not resume.
GOLDEN = {
    "bucket": "904027f863d5aab7c6936bb9970255efda7f659afbbc3afb52f50247acd4ebe6",
    "pack": "84f2b3c84db25903c1332ad2706958c992911cbd9a160b9cb46a40321f19a45f",
}


@pytest.mark.parametrize("batching", GOLDEN)
def test_the_choice_of_segmentations_never_changes(config, batching):
    vocabulary = HandmadeVocabulary()
    merges = BpeMerges(vocabulary.bpe_pieces())
    numbers = {piece.text: number for number, piece in enumerate(vocabulary.bpe_pieces())}
    draws = np.random.Generator(np.random.PCG64(1)).random((2, 400, 12, 7))
    sides = []
    for draw in draws:
        sentences = []
        for letters in draw:
            spelled = [["▁", "ab"[int(2 * a)], *("cde"[int(3 * b)] for b in rest)] for a, *rest in letters]
            words = JaggedArray.from_sequences([np.array([numbers[c] for c in word]) for word in spelled])
            plain = segment(merges, words, 0.0, np.zeros(12, np.uint64), 1)
            sentences.append(np.append(plain.flat[: plain.offsets[1 + int(11 * letters[0, 0])]], EOS))
        sides.append(JaggedArray.from_sequences(sentences))
    config = with_fields(config, batching=batching, subword_dropout=0.5)
    ids = input_pipeline.with_subword_dropout(config, input_pipeline.TokenIds(*sides), vocabulary)
    digest = hashlib.sha256()
    for batch in batches_of(config, ids, num_steps=12):
        for side in batch:
            digest.update(repr(side.shape).encode() + np.ascontiguousarray(side, "<i4").tobytes())
    assert digest.hexdigest() == GOLDEN[batching]


def words_that_fit(growths, totals, width):
    """The slow, obvious way: word by word, while the row has space left."""
    fits = []
    for words, used in zip(growths, totals, strict=True):
        free = width - used
        for growth in words:
            free -= max(growth, 0)
            fits.append(growth <= 0 or free >= 0)
    return fits


def test_words_that_do_not_fit_keep_their_plain_segmentation(opened):
    """Against word by word; and with no space at all nothing grows."""
    trained, ids, dropped = opened
    examples = np.arange(40)
    starts = ids.target.offsets[examples]
    lengths = ids.target.offsets[examples + 1] - starts
    plain = subword_dropout.take(ids.target.flat, starts, lengths)
    rows = np.sort(np.arange(40) % 13)
    totals = np.bincount(rows, lengths).astype(int)
    free_made, none = dropped.dropout.split(plain, np.uint64(3), examples, rows, 10_000)
    assert none == 0
    for width in (totals.max(), totals.max() + 3, totals.max() + 100):
        made, fallbacks = dropped.dropout.split(plain, np.uint64(3), examples, rows, width)
        assert (np.bincount(rows, made.lengths) <= width).all()
        fits = made.lengths == free_made.lengths
        assert fallbacks >= (~fits).sum()
        for i in range(40):
            ends = [(each.flat[each.offsets[i] : each.offsets[i + 1]]).tolist() for each in (made, plain)]
            assert trained.decode(ends[0]) == trained.decode(ends[1])
    spans = subword_dropout._find_words(plain, dropped.dropout._begins_V)
    growth = np.random.default_rng(0).integers(-1, 4, len(spans.starts_W))
    got = subword_dropout._fits(growth, spans, plain.lengths, rows, int(totals.max()), 10_000)
    row_W = rows[spans.sentence_W]
    by_row = [growth[row_W == row] for row in range(13)]
    np.testing.assert_array_equal(got, words_that_fit(by_row, totals, totals.max()))
    assert 0 < got.sum() < len(got)


def test_rows_of_padding_alone_stay_so(config, opened):
    schedule = input_pipeline.make_batch_schedule(config, opened[2])
    rows = np.arange(schedule.batch(0).bucket.rows, schedule.batch(0).bucket.rows + 3)
    ids = opened[2]
    batch = next(input_pipeline.train_iterator(schedule, ids, start=0, num_steps=1, rows=lambda _: rows))
    assert batch.target_BT.shape == (3, schedule.batch(0).bucket.target)
    assert not batch.source_BS.any()
    assert not batch.target_BT.any()


def test_off_nothing_changes(config, opened):
    trained, ids, _ = opened
    assert input_pipeline.with_subword_dropout(with_fields(config, subword_dropout=0.0), ids, trained) is ids


def test_the_table_is_drawn_once_and_a_damaged_one_again(config, opened, monkeypatch):
    trained, ids, dropped = opened
    wanted = batches_of(config, dropped, num_steps=3)
    with monkeypatch.context() as patch:
        patch.setattr(subword_dropout, "_draw_table", lambda *_: pytest.fail("drawn again"))
        again = input_pipeline.with_subword_dropout(config, ids, trained)
    for path in ids.folder.glob("subword-*/*.npy"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    redrawn = input_pipeline.with_subword_dropout(config, ids, trained)
    in_memory = dataclasses.replace(ids, folder=None)
    for each in (again, redrawn, input_pipeline.with_subword_dropout(config, in_memory, trained)):
        for batch, other in zip(wanted, batches_of(config, each, num_steps=3), strict=True):
            np.testing.assert_array_equal(batch.source_BS, other.source_BS)
            np.testing.assert_array_equal(batch.target_BT, other.target_BT)


def test_the_table_does_not_depend_on_how_the_corpus_is_divided_and_holds_the_most_frequent_words(
    config, opened, monkeypatch
):
    trained, ids, _ = opened
    make = lambda: subword_dropout.make_dropout(config, trained, (ids.source, ids.target), None)  # noqa: E731
    whole = make()._table
    monkeypatch.setattr(subword_dropout, "_CHUNK_SENTENCES", 700)
    monkeypatch.setattr(subword_dropout, "_CHUNK_WORDS", 300)
    divided = make()._table
    for array, other in zip(subword_dropout._arrays(whole), subword_dropout._arrays(divided), strict=True):
        np.testing.assert_array_equal(array, other)
    monkeypatch.setattr(subword_dropout, "MAX_TABLE_CHARACTERS", 2000)
    few = make()
    assert 100 < len(few._table.hashes_W) < len(whole.hashes_W) / 2
    assert set(few._table.hashes_W) < set(whole.hashes_W)
    for batch in batches_of(config, dataclasses.replace(ids, dropout=few), num_steps=2):
        assert all(trained.decode(sentence.tolist()) for sentence in sentences_of(batch.target_BT))


def test_a_corpus_without_words_to_split_is_left_as_it_is(config, opened):
    trained = opened[0]
    (x,) = (number for number, piece in enumerate(trained.pieces(range(600))) if piece == "▁")
    sides = [JaggedArray.from_sequences([np.array([x, EOS])])] * 2
    dropout = subword_dropout.make_dropout(config, trained, sides, None)
    made, _ = dropout.split(sides[0], np.uint64(1), np.arange(1), np.arange(1), 10)
    np.testing.assert_array_equal(made.flat, [x, EOS])


@pytest.mark.parametrize("kind", ["unigram", "codes"])
def test_another_vocabulary_is_refused_before_data_is_prepared(config, tmp_path, kind):
    unigram = tokenizer.train(["a b c ab"] * 9, 264, "unigram")
    unigram.save(tmp_path, "mine.model")
    data = dataclasses.replace(config.data, tokenizer=str(tmp_path / "mine.model"), vocab_size=264)
    if kind == "codes":
        (tmp_path / "my.codes").write_text("#version: 0.2\na b\n")
        data = dataclasses.replace(config.data, tokenizer=str(tmp_path / "my.codes"))
    changed = dataclasses.replace(config, data=data)
    with pytest.raises(UserError, match=r"subword_dropout = 0\.1: leaves out merges of a SentencePiece BPE vocabulary"):
        session.check_data(session.check_config(changed, str(tmp_path / "run")), str(tmp_path / "run"))
