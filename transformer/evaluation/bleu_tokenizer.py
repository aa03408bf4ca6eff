"""Which of sacreBLEU's tokenizers BLEU is computed with: one that suits the script of the references.

13a splits at spaces and punctuation, so that a whole Chinese or Thai sentence would be one token, and BLEU, which
counts four tokens in a row, 0 for the best of translations. The script is that of the language code, by the Unicode
CLDR; where the code is unknown, or of a language with spaces, that of most letters of the references.
"""

import collections
import re
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

from babel.core import get_global
from sacrebleu.metrics import BLEU

from transformer.config import DataConfig

DEFAULT = "13a"
PUBLISHED = "none -lc -s none"  # of published sets that are lowercased and tokenized, see data.tokenized

# Scripts written without spaces → the tokenizer. By ISO 15924, and by how Unicode names their letters.
BY_CODE = {
    **dict.fromkeys("Hans Hant Hani".split(), "zh"),
    **dict.fromkeys("Jpan Hrkt Hira Kana Thai Laoo Khmr Mymr Tibt Lana Tale Talu Tavt".split(), "char"),
}
BY_NAME = {
    "CJK": "zh",
    **dict.fromkeys("HIRAGANA KATAKANA THAI LAO KHMER MYANMAR TIBETAN".split(), "char"),
    **dict.fromkeys(("TAI THAM", "TAI LE", "NEW TAI", "TAI VIET"), "char"),
}
KANA = 0.05  # Japanese has more than this share of kana; Chinese has next to none


class BleuTokenizer(NamedTuple):
    """A choice, and the reason for it.

    Attributes:
      name: as sacreBLEU has it, or PUBLISHED.
    """

    name: str
    reason: str

    def __str__(self) -> str:
        return f"BLEU is that of sacrebleu -tok {self.name}, {self.reason}"


def choose(data: DataConfig, references: Sequence[str]) -> BleuTokenizer:
    """The tokenizer for translations that are held against these references."""
    if data.tokenized:
        return BleuTokenizer(PUBLISHED, "as data.tokenized says")
    if data.bleu_tokenizer != "auto":
        return BleuTokenizer(data.bleu_tokenizer, "as data.bleu_tokenizer says")
    script = _script(data.target_language)
    if script in BY_CODE:
        return BleuTokenizer(BY_CODE[script], f"as {data.target_language} is written without spaces")
    found = _by_letters(references)
    if found != DEFAULT:
        return BleuTokenizer(found, "as most letters of the references are of a script without spaces")
    return BleuTokenizer(DEFAULT, f"for {data.target_language}" if script else "as the references have spaces")


def make_bleu(tokenizer: str) -> BLEU:
    """sacreBLEU's metric with a tokenizer that `choose` names."""
    if tokenizer == PUBLISHED:
        return BLEU(tokenize="none", lowercase=True, smooth_method="none", force=True)
    return BLEU(tokenize=tokenizer)


def short(references: Sequence[str], tokenizer: str) -> int:
    """How many references have under four tokens, of which BLEU, which counts four in a row, finds nothing."""
    tokenize: Any = make_bleu(tokenizer).tokenizer
    return sum(len(tokenize(line).split()) < 4 for line in references)


def _script(language: str) -> str:
    """ISO 15924 code of a language's script, such as Latn; empty where the Unicode CLDR does not know the language."""
    code, *subtags = re.split("[-_]", language)
    for subtag in subtags:
        if len(subtag) == 4 and subtag.isalpha():
            return subtag.title()
    code = get_global("language_aliases").get(code.lower(), code.lower())
    likely = get_global("likely_subtags").get(code, "").split("_")
    return likely[1] if len(likely) > 1 else ""


def _by_letters(references: Sequence[str]) -> str:
    """The tokenizer for the script of most letters."""
    counts: collections.Counter[str] = collections.Counter()
    for line in references:
        counts.update(line)
    letters: collections.Counter[str] = collections.Counter()
    for character, count in counts.items():
        if character.isalpha():
            name = unicodedata.name(character, "")
            letters[next((prefix for prefix in BY_NAME if name.startswith(prefix)), "")] += count
    if 2 * letters[""] >= letters.total():
        return DEFAULT
    if letters["HIRAGANA"] + letters["KATAKANA"] > KANA * letters.total():
        return "char"
    del letters[""]
    return BY_NAME[letters.most_common(1)[0][0]]


def decide(references: Sequence[str], tokenizer: str) -> tuple[str, str]:
    """The metric that suits these references, and a line that says why if it is not BLEU."""
    count = short(references, tokenizer)
    if 2 * count <= len(references):
        return "bleu", ""
    why = f"{count:,} of {len(references):,} validation references have under four tokens, of which BLEU finds nothing"
    return "chrf", f"the best checkpoint is that of the highest chrF2, as {why}; train.best_metric sets another"
