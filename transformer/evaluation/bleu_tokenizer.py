"""Chooses sacreBLEU's tokenizer for BLEU by the script of the references.

13a splits at spaces and punctuation: a Chinese or Thai sentence would be one token, and BLEU, which counts 4-grams, 0
even for the best translation. The script is that of the language code in the Unicode CLDR, or, if the code is unknown
or the language has spaces, that of most letters of the references.
"""

import collections
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

from sacrebleu.metrics import BLEU

from transformer.config import DataConfig
from transformer.data.scripts import WITHOUT_SPACES, script_of_language

DEFAULT = "13a"
PUBLISHED = "none -lc -s none"  # for published sets that are lowercased and tokenized: data.tokenized
TOKENIZED = ("none", PUBLISHED)  # for text that is tokens already

# Scripts without spaces → tokenizer: by ISO 15924 code, and by the names of their letters in Unicode.
BY_SCRIPT_CODE = {
    **dict.fromkeys("Hans Hant Hani".split(), "zh"),
    **dict.fromkeys("Jpan Hrkt Hira Kana Thai Laoo Khmr Mymr Tibt Lana Tale Talu Tavt".split(), "char"),
}
BY_UNICODE_NAME = {**dict.fromkeys(WITHOUT_SPACES, "char"), "CJK": "zh"}
MIN_KANA_SHARE = 0.05  # Japanese has more than this share of kana; Chinese has next to none


class BleuTokenizer(NamedTuple):
    """A choice and its reason.

    Attributes:
      name: in sacreBLEU, or PUBLISHED.
    """

    name: str
    reason: str

    def __str__(self) -> str:
        return f"BLEU is that of sacrebleu -tok {self.name}, {self.reason}"


def choose_bleu_tokenizer(data: DataConfig, references: Sequence[str]) -> BleuTokenizer:
    """The tokenizer for scores against these references."""
    if data.tokenized:
        return BleuTokenizer(PUBLISHED, "as data.tokenized says")
    if data.bleu_tokenizer != "auto":
        return BleuTokenizer(data.bleu_tokenizer, "as data.bleu_tokenizer says")
    script = script_of_language(data.target_language)
    if script in BY_SCRIPT_CODE:
        return BleuTokenizer(BY_SCRIPT_CODE[script], f"as {data.target_language} is written without spaces")
    by_letters = _by_letters(references)
    if by_letters != DEFAULT:
        return BleuTokenizer(by_letters, "as most letters of the references are of a script without spaces")
    return BleuTokenizer(DEFAULT, f"for {data.target_language}" if script else "as the references have spaces")


def make_bleu(tokenizer: str) -> BLEU:
    """sacreBLEU's metric with a tokenizer named as in `choose_bleu_tokenizer`."""
    if tokenizer == PUBLISHED:
        return BLEU(tokenize="none", lowercase=True, smooth_method="none", force=True)
    return BLEU(tokenize=tokenizer)


def split_words(lines: Sequence[str], tokenizer: str) -> list[list[str]]:
    """The tokens that BLEU counts, with a tokenizer named as in `choose_bleu_tokenizer`."""
    tokenize: Any = make_bleu(tokenizer).tokenizer
    return [tokenize(line.lower() if tokenizer == PUBLISHED else line).split() for line in lines]


def short_references(references: Sequence[str], tokenizer: str) -> str:
    """Why BLEU does not suit the references: most have under four tokens; empty if it does."""
    count = sum(len(words) < 4 for words in split_words(references, tokenizer))
    if 2 * count <= len(references):
        return ""
    return f"{count:,} of {len(references):,} references have under four tokens and so no 4-grams for BLEU"


def _by_letters(references: Sequence[str]) -> str:
    """The tokenizer for the script of most letters."""
    counts: collections.Counter[str] = collections.Counter()
    for line in references:
        counts.update(line)
    letters: collections.Counter[str] = collections.Counter()
    for character, count in counts.items():
        if character.isalpha():
            name = unicodedata.name(character, "")
            letters[next((prefix for prefix in BY_UNICODE_NAME if name.startswith(prefix)), "")] += count
    if 2 * letters[""] >= letters.total():
        return DEFAULT
    if letters["HIRAGANA"] + letters["KATAKANA"] > MIN_KANA_SHARE * letters.total():
        return "char"
    del letters[""]
    return BY_UNICODE_NAME[letters.most_common(1)[0][0]]


def choose_best_metric(references: Sequence[str], tokenizer: str) -> tuple[str, str]:
    """The metric of the best checkpoint for these references, and the reason if it is not BLEU."""
    reason = short_references(references, tokenizer)
    if not reason:
        return "bleu", ""
    return "chrf", (
        f"the best checkpoint is that of the highest chrF2, as in validation {reason}; train.best_metric sets another"
    )
