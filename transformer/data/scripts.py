"""Scripts of languages by the Unicode CLDR, and which letters belong to a script.

Shapes: N texts.
"""

import functools
import re
import unicodedata
from collections.abc import Sequence

import numpy as np
from babel.core import get_global

# ISO 15924 code → first words of the Unicode names of its letters.
LETTER_NAMES = {
    "Arab": ("ARABIC",),
    "Armn": ("ARMENIAN",),
    "Beng": ("BENGALI",),
    "Cans": ("CANADIAN",),
    "Cher": ("CHEROKEE",),
    "Cyrl": ("CYRILLIC",),
    "Deva": ("DEVANAGARI",),
    "Ethi": ("ETHIOPIC",),
    "Geor": ("GEORGIAN",),
    "Grek": ("GREEK",),
    "Gujr": ("GUJARATI",),
    "Guru": ("GURMUKHI",),
    "Hans": ("CJK", "IDEOGRAPHIC", "BOPOMOFO"),
    "Hant": ("CJK", "IDEOGRAPHIC", "BOPOMOFO"),
    "Hebr": ("HEBREW",),
    "Jpan": ("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"),
    "Khmr": ("KHMER",),
    "Knda": ("KANNADA",),
    "Kore": ("HANGUL", "CJK"),
    "Laoo": ("LAO",),
    "Latn": ("LATIN",),
    "Mlym": ("MALAYALAM",),
    "Mong": ("MONGOLIAN",),
    "Mymr": ("MYANMAR",),
    "Nkoo": ("NKO",),
    "Orya": ("ORIYA",),
    "Sinh": ("SINHALA",),
    "Taml": ("TAMIL",),
    "Telu": ("TELUGU",),
    "Tfng": ("TIFINAGH",),
    "Thaa": ("THAANA",),
    "Thai": ("THAI",),
    "Tibt": ("TIBETAN",),
}

_WIDTHS = ("FULLWIDTH", "HALFWIDTH")  # before the name of the script
# First words of letters that texts of any script have, such as ª, µ and mathematical ones.
_COMMON = {"ANGSTROM", "BLACK-LETTER", "DOUBLE-STRUCK", "FEMININE", "KELVIN", "MASCULINE", "MATHEMATICAL", "MICRO"}
_COMMON |= {"MODIFIER", "OHM", "PLANCK", "SCRIPT"}
_FIRST_IDEOGRAPH, _LAST_IDEOGRAPH = 0x20000, 0x3FFFF  # planes of ideographs alone
_CODE_POINTS = 0x110000


# First words of the Unicode names of letters that are written without spaces between words.
WITHOUT_SPACES = (
    *("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"),
    *("TAI THAM", "TAI LE", "NEW TAI", "TAI VIET"),
)


def is_written_without_spaces(character: str) -> bool:
    """Whether a character is a letter of a script without spaces between words."""
    return unicodedata.name(character, "").startswith(WITHOUT_SPACES)


def script_of_language(language: str) -> str:
    """ISO 15924 code of a language's script, such as Latn; "" if the Unicode CLDR lacks the language."""
    code, *subtags = re.split("[-_]", language)
    for subtag in subtags:
        if len(subtag) == 4 and subtag.isalpha():
            return subtag.title()
    code = get_global("language_aliases").get(code.lower(), code.lower())
    likely = get_global("likely_subtags").get(code, "").split("_")
    return likely[1] if len(likely) > 1 else ""


def share_in_script(texts: Sequence[str], script: str) -> np.ndarray:
    """The share of each text's letters that belong to a script of LETTER_NAMES, [N]; 1 for a text without letters."""
    is_letter, in_script = _tables(script)
    code_points = np.frombuffer("".join(texts).encode("utf-32-le"), "<u4")
    ends_N = np.cumsum([len(text) for text in texts], dtype=np.int64)
    letters_N, inside_N = (_count(table[code_points], ends_N) for table in (is_letter, in_script))
    return np.where(letters_N > 0, inside_N / np.maximum(letters_N, 1), 1.0)


def _count(flags: np.ndarray, ends_N: np.ndarray) -> np.ndarray:
    """The number of flags in each of N stretches that follow one another."""
    totals_N = np.concatenate([[0], np.cumsum(flags, dtype=np.int64)])[ends_N]
    return np.diff(totals_N, prepend=0)


@functools.cache
def _tables(script: str) -> tuple[np.ndarray, np.ndarray]:
    """For each code point whether it is a letter of some script, and whether of this one."""
    is_letter, in_script = np.zeros(_CODE_POINTS, bool), np.zeros(_CODE_POINTS, bool)
    for code_point in range(_FIRST_IDEOGRAPH):
        character = chr(code_point)
        if unicodedata.category(character).startswith("L"):
            words = unicodedata.name(character, "unnamed").split()
            name = words[1] if words[0] in _WIDTHS else words[0]
            is_letter[code_point] = name not in _COMMON
            in_script[code_point] = name in LETTER_NAMES[script]
    is_letter[_FIRST_IDEOGRAPH : _LAST_IDEOGRAPH + 1] = True
    in_script[_FIRST_IDEOGRAPH : _LAST_IDEOGRAPH + 1] = "CJK" in LETTER_NAMES[script]
    return is_letter, in_script
