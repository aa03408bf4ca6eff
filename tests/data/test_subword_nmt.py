"""Merges learnt by subword-nmt: cut words as it does, and make a vocabulary that is a tokenizer like any other."""

import json
import pickle

import pytest
from etils import epath

from tests.conftest import ROOT
from transformer import command_line
from transformer.config import DataConfig
from transformer.data import subword_nmt, tokenizer
from transformer.data.tokenizer import EOS, UNK
from transformer.models.registry import ModelDef
from transformer.runtime.errors import UserError

# Of `subword-nmt learn-bpe -s 10` (0.3.8) on "low low low low low lower lower newest × 6 widest × 3", a line each.
CODES = """#version: 0.2
s t</w>
e st</w>
l o
w est</w>
n e
ne west</w>
lo w</w>
w i
wi d
wid est</w>
"""
# What its apply-bpe made of them.
CUT = {
    "low lower newest widest": "low lo@@ w@@ e@@ r newest widest",
    "lowest slow wide es ess": "lo@@ west s@@ low wid@@ e e@@ s e@@ s@@ s",
    "nene a  lo": "ne@@ n@@ e a l@@ o",
}
FOLDER = ROOT.parent / "shared" / "data" / "multi30k_tok"


@pytest.fixture(scope="module")
def small():
    return make(["low lower", "newest widest"])


def make(lines, codes=CODES):
    return tokenizer.Tokenizer(subword_nmt.build_vocabulary(subword_nmt.parse(codes, "x.codes"), lines))


def config(path, size) -> DataConfig:
    return DataConfig(tokenizer=str(path), vocab_size=size)


@pytest.mark.parametrize("line", CUT)
def test_words_are_cut_as_subword_nmt_does(line):
    assert " ".join(subword_nmt.BpeSegmenter(subword_nmt.parse(CODES, "")).segment(line)) == CUT[line]


def test_a_pair_that_overlaps_itself_is_joined_from_the_left():
    codes = subword_nmt.parse("#version: 0.2\na a\n", "")
    assert subword_nmt.BpeSegmenter(codes).segment("aaaab") == ["aa@@", "aa@@", "b"]


def test_ids_come_back_as_text_and_what_training_lacked_is_unknown(small):
    (ids,) = small.encode(["low newest x lower"])
    assert ids[-1] == EOS
    assert (ids == UNK).sum() == 1
    assert small.decode(ids) == "low newest <unk> lower"
    assert small.encode([""])[0].tolist() == [EOS]


def test_the_vocabulary_is_all_pieces_of_the_text_the_frequent_first():
    assert make(["low low newest"]).pieces(range(4, 6)) == ["low", "newest"]
    assert make(["low", "newest", "newest"]).pieces(range(4, 6)) == ["newest", "low"]
    assert make(["low", "newest <unk>"]).vocab_size == len({"<@@", "u@@", "n@@", "k@@", ">", "low", "newest"}) + 4


def test_words_are_numbered_by_pieces(small):
    (ids,) = small.encode(["low lower newest"])
    assert small.pieces(ids[:-1]) == ["low", "lo@@", "w@@", "e@@", "r", "newest"]
    assert small.word_ids(ids) == [0, 1, 1, 1, 1, 2, -1]


def test_it_survives_pickle_and_a_folder_in_place_of_another_kind(small, tmp_path):
    assert pickle.loads(pickle.dumps(small)).digest == small.digest
    tokenizer.train(["the old house"] * 9, 270, "bpe").save(tmp_path)
    small.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [tokenizer.CODES_FILE_NAME]
    assert tokenizer.load(tmp_path).digest == small.digest
    assert (
        tokenizer.load_configured(config(tmp_path / tokenizer.CODES_FILE_NAME, small.vocab_size)).digest == small.digest
    )


def test_a_config_names_the_codes_and_gets_the_vocabulary_of_its_text(small, tmp_path):
    (tmp_path / "my.codes").write_text(CODES)
    data = config(tmp_path / "my.codes", small.vocab_size)
    assert tokenizer.load_configured(data) is None
    assert tokenizer.build(data, ["low lower", "newest widest"]).digest == small.digest
    with pytest.raises(UserError, match=f"vocab_size = 300, but .*my.codes has {small.vocab_size} tokens"):
        tokenizer.build(config(tmp_path / "my.codes", 300), ["low lower", "newest widest"])


def test_other_codes_are_another_recipe(tmp_path):
    for name, text in (("a", CODES), ("b", CODES), ("c", CODES + "lo w\n")):
        (tmp_path / f"{name}.codes").write_text(text)
    one, same, other = (tokenizer.cache_key(config(tmp_path / f"{name}.codes", 20)) for name in "abc")
    assert one == same != other


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("e s\n", "whose first line is '#version: 0.2', got 'e s'"),
        ("#version: 0.2\ne s\nest\n", "line 3: expected two tokens with a space between, got 'est'"),
        (b"#version: 0.2\n\xff s\n", "in UTF-8, got other bytes"),
        (None, "the file is missing"),
    ],
)
def test_what_is_no_file_of_codes_is_refused_before_training(tmp_path, text, message):
    path = tmp_path / "x.codes"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        tokenizer.load_configured(config(path, 20))


@pytest.mark.parametrize("ending", ["codes", "json"])
def test_what_the_file_system_refuses_is_a_message(tmp_path, monkeypatch, ending):
    path = tmp_path / f"x.{ending}"
    path.write_text(CODES)

    def refuse(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(epath.Path(path)), "read_bytes", refuse)
    with pytest.raises(UserError, match=rf"x\.{ending}: Permission denied; check the path"):
        tokenizer.load_configured(config(path, 20))


def test_a_folder_of_codes_is_a_message(tmp_path):
    (tmp_path / "x.codes").mkdir()
    with pytest.raises(UserError, match=r"config\.data\.tokenizer = .*x\.codes: Is a directory"):
        tokenizer.load_configured(config(tmp_path / "x.codes", 20))


@pytest.mark.parametrize("model", ['{"pieces": []}', "{", json.dumps({"pieces": 3, "merges": []})])
def test_a_damaged_vocabulary_is_refused(tmp_path, model):
    (tmp_path / "x.json").write_text(model)
    with pytest.raises(UserError, match="expected a vocabulary of BPE merges"):
        tokenizer.load(tmp_path / "x.json")


@pytest.mark.skipif(not FOLDER.exists(), reason=f"no {FOLDER}")
def test_multi30k_has_the_published_number_of_pieces():
    merges = subword_nmt.parse((FOLDER / "bpe.codes").read_text("utf-8"), "bpe.codes")
    lines = [(FOLDER / f"train.{code}").read_text("utf-8").split("\n") for code in ("en", "de")]
    assert tokenizer.Tokenizer(subword_nmt.build_vocabulary(merges, lines[0] + lines[1])).vocab_size == 9708 + 4


@pytest.mark.skipif(not FOLDER.exists(), reason=f"no {FOLDER}")
def test_the_config_of_the_published_figure_has_its_sizes():
    """2.57M params; ours lack the biases of attention, 6,144."""
    flags = ["train.py", f"--config={ROOT}/configs/multi30k_tok.py:{FOLDER}"]
    config = command_line.config_flags(flags)[0]
    assert ModelDef(config.model, config.data.vocab_size).num_params() == 2_568_192 - 6_144
    assert config.data.vocab_size == 9708 + 4
    assert tokenizer.load_configured(config.data) is None
