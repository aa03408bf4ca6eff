"""Agreement, declension and contraction for the `cldr` data set.

Every function is pure: words of `lexicon` in, inflected text out.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from transformer.data.cldr.lexicon import EDGE_PLACES, TERRITORIES, TERRITORY_ARTICLES, Adjective, Noun

# Classes of agreement. German neuters differ from masculines in their articles only.
MS, FS, MP, FP = range(4)
AGREEMENT = {"m": MS, "n": MS, "f": FS, "p": MP}

# German articles and endings by case, then gender.
_DER = {
    "nom": {"m": "der", "f": "die", "n": "das"},
    "acc": {"m": "den", "f": "die", "n": "das"},
    "dat": {"m": "dem", "f": "der", "n": "dem"},
}
_EIN_ENDINGS = {
    "nom": {"m": "", "f": "e", "n": "", "p": "e"},
    "acc": {"m": "en", "f": "e", "n": "", "p": "e"},
    "dat": {"m": "em", "f": "er", "n": "em", "p": "en"},
}
_ADJECTIVE_AFTER_DER = {"nom": {"m": "e", "f": "e", "n": "e"}, "acc": {"m": "en", "f": "e", "n": "e"}}
_ADJECTIVE_AFTER_EIN = {"nom": {"m": "er", "f": "e", "n": "es"}, "acc": {"m": "en", "f": "e", "n": "es"}}
_PRONOUN_ACC = {"m": "ihn", "f": "sie", "n": "es"}

POSSESSORS = ("my", "our", "his", "her")
_GERMAN_POSSESSIVES = {"my": "mein", "our": "unser", "his": "sein", "her": "ihr"}
_POSSESSIVES = {
    "fr": {
        "my": ("mon", "ma", "mes"),
        "our": ("notre", "notre", "nos"),
        "his": ("son", "sa", "ses"),
        "her": ("son", "sa", "ses"),
    },
    "es": {
        "my": ("mi", "mi", "mis"),
        "our": ("nuestro", "nuestra", "nuestros"),
        "his": ("su", "su", "sus"),
        "her": ("su", "su", "sus"),
    },
}

_FRENCH_VOWEL = "[aeiouhàâæéèêëîïôöùûüœAEIOUHÀÂÉÈÊÎÔŒ]"
# Words that begin with a vowel or an h but without elision.
_FRENCH_ASPIRATED = "(?!onz|huit|haut|Hongrie|hongrois)"
_CONTRACTIONS = {
    "en": (),
    "de": (
        (r"\b([Ii])n dem\b", r"\1m"),
        (r"\b([Ii])n das\b", r"\1ns"),
        (r"\b([Aa])n dem\b", r"\1m"),
        (r"\b([Zz])u dem\b", r"\1um"),
        (r"\b([Zz])u der\b", r"\1ur"),
    ),
    "fr": (
        (rf"\b([Ll]|[Dd]|qu|n)(?:e|a) (?={_FRENCH_VOWEL}){_FRENCH_ASPIRATED}", r"\1'"),
        (r"\b([Dd])e le\b", r"\1u"),
        (r"\b([Dd])e les\b", r"\1es"),
        (r"\bà le\b", "au"),
        (r"\bà les\b", "aux"),
    ),
    "es": (
        (r"\b([Aa]|[Dd]e) el\b", r"\1l"),
        (r"\by (?=[Hh]?[iíIÍ](?!e))", "e "),
    ),
}
# By language and whether the noun is feminine; other numbers are not inflected.
_NUMBERS = {
    ("fr", True): ((r"un$", "une"),),
    ("es", True): ((r"uno$", "una"), (r"ientos\b", "ientas")),
    ("es", False): ((r"veintiuno", "veintiún"), (r"uno$", "un")),
}
_ORDINALS = {
    ("fr", True): ((r"ier$", "ière"),),
    ("es", True): ((r"o\b", "a"),),
    ("es", False): ((r"(primer|tercer)o$", r"\1"),),
}


class Template(NamedTuple):
    """A sentence in each language; every slot occurs in all four."""

    en: str
    de: str
    fr: str
    es: str


class InflectedValue:
    """The value of a slot in one language: its inflected forms and its agreement class.

    The format spec selects: `{x:dat}` the form named dat, `{x:#a|b}` singular or plural,
    `{x:@a|b}` masculine or feminine, `{x:=a|b|c|d}` by the class MS, FS, MP or FP.
    """

    __slots__ = ("_agreement", "_forms")

    def __init__(self, forms: dict[str, str], agreement: int = MS):
        self._forms = forms
        self._agreement = agreement

    def __format__(self, spec: str) -> str:
        if spec.startswith("#"):
            return spec[1:].split("|")[self._agreement // 2]
        if spec.startswith("@"):
            return spec[1:].split("|")[self._agreement % 2]
        if spec.startswith("="):
            return spec[1:].split("|")[self._agreement]
        return self._forms[spec]


def contract(text: str, language: str) -> str:
    """Joins articles and elides vowels: de le → du, le or → l'or, a el → al, zu der → zur, y Irlanda → e Irlanda."""
    return _substitute(text, _CONTRACTIONS[language])


def _substitute(text: str, rules: Iterable[tuple[str, str]]) -> str:
    """Applies substitutions, each a pattern and its replacement, in turn."""
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


def _describe(noun: str, gender: str, plural: bool, adjective: Adjective, language: str) -> str:
    """A noun with its adjective, agreeing, in English, French or Spanish."""
    word = adjective.feminine if gender == "f" else adjective.masculine
    if language == "fr" and plural and not word.endswith(("s", "x")):
        word += "x" if word.endswith("eau") else "s"
    if language == "fr" and not plural and gender == "m" and re.match(_FRENCH_VOWEL, noun):
        word = adjective.before_vowel
    if language == "es" and plural:
        word += "s" if word[-1] in "aeo" else "es"
    return f"{word} {noun}" if language == "en" or adjective.comes_first else f"{noun} {word}"


def _german_noun_phrase(noun: Noun, adjective: Adjective) -> dict[str, str]:
    stem, gender = adjective.masculine, noun.gender
    forms = {"rel": _DER["nom"][gender], "it.acc": _PRONOUN_ACC[gender]}
    for case, suffix in (("nom", ""), ("acc", ".acc")):
        after_der, after_ein = _ADJECTIVE_AFTER_DER[case][gender], _ADJECTIVE_AFTER_EIN[case][gender]
        forms["the" + suffix] = f"{_DER[case][gender]} {stem}{after_der} {noun.singular}"
        forms["a" + suffix] = f"ein{_EIN_ENDINGS[case][gender]} {stem}{after_ein} {noun.singular}"
    return forms


def noun_phrase(noun: Noun, adjective: Adjective, language: str) -> InflectedValue:
    """Adjective and noun with an article: `the` or `a`; German also `the.acc`, `a.acc`, `rel` and `it.acc`."""
    if language == "de":
        return InflectedValue(_german_noun_phrase(noun, adjective), AGREEMENT[noun.gender])
    phrase = _describe(noun.singular, noun.gender, False, adjective, language)
    index = AGREEMENT[noun.gender]
    if language == "en":
        article = "an" if phrase[0] in "aeiou" else "a"
        return InflectedValue({"the": f"the {phrase}", "a": f"{article} {phrase}"})
    the, a = {"fr": (("le", "la"), ("un", "une")), "es": (("el", "la"), ("un", "una"))}[language]
    return InflectedValue({"the": f"{the[index]} {phrase}", "a": f"{a[index]} {phrase}"}, index)


def counted_noun_phrase(noun: Noun, adjective: Adjective, number: str, language: str) -> str:
    """Number, adjective and noun in the plural (German: nominative or accusative)."""
    if language == "de":
        return f"{number} {adjective.masculine}e {noun.plural}"
    return f"{number} {_describe(noun.plural, noun.gender, True, adjective, language)}"


def definite_noun_phrase(english: str, noun: Noun, language: str) -> InflectedValue:
    """A noun with its article: `the`, `in`; English also `at`, German `the.acc`, `the.dat` and `rel`."""
    gender = noun.gender
    if language == "de":
        forms = {"the": f"{_DER['nom'][gender]} {noun.singular}", "rel": _DER["nom"][gender]}
        forms |= {f"the.{case}": f"{_DER[case][gender]} {noun.singular}" for case in ("acc", "dat")}
        forms["in"] = f"{'an' if english in EDGE_PLACES else 'in'} {forms['the.dat']}"
        return InflectedValue(forms, AGREEMENT[gender])
    if language == "en":
        the = f"the {noun.singular}"
        return InflectedValue(
            {"the": the, "at": f"at {the}", "in": f"{'at' if english in EDGE_PLACES else 'in'} {the}"}
        )
    article, preposition = {"fr": ("le", "à"), "es": ("el", "en")}[language]
    the = f"{'la' if gender == 'f' else article} {noun.singular}"
    return InflectedValue({"the": the, "in": f"{preposition} {the}"}, AGREEMENT[gender])


def _german_territory(name: str, article: str) -> dict[str, str]:
    if article == "-":
        return {"to": f"nach {name}", "in": f"in {name}", "from": f"aus {name}"}
    # United is the one adjective in these names: die Vereinigten Staaten, das Vereinigte Königreich.
    oblique = re.sub("^Vereinigtes?", "Vereinigten", name)
    to = {"f": f"die {name}", "n": f"das {re.sub('^Vereinigtes', 'Vereinigte', name)}", "p": f"die {oblique}"}[article]
    dative = f"{({'f': 'der', 'n': 'dem', 'p': 'den'})[article]} {oblique}"
    if article == "p" and not name.endswith("n"):
        dative += "n"
    return {"to": f"in {to}", "in": f"in {dative}", "from": f"aus {dative}"}


def _french_territory(name: str, article: str) -> dict[str, str]:
    the = {"f": f"la {name}", "m": f"le {name}", "p": f"les {name}", "-": name}[article]
    if article == "f":
        return {"the": the, "in": f"en {name}", "from": f"de {name}"}
    return {"the": the, "in": f"à {the}", "from": f"de {the}"}


def territory(name: str, code: str, language: str) -> InflectedValue:
    """A territory: the form "" in English and Spanish; German `to`, `in`, `from`; French `the`, `in`, `from`."""
    if language == "de":
        return InflectedValue(_german_territory(name, TERRITORIES[code][0]))
    if language == "fr":
        return InflectedValue(_french_territory(name, TERRITORIES[code][1]))
    return InflectedValue({"": TERRITORY_ARTICLES[language].get(code, "") + name})


def possessive(possessor: str, noun: Noun, language: str) -> dict[str, str]:
    """A noun with a possessive, as in "my brother": the form "", and in German `acc` and `dat`."""
    if language == "en":
        return {"": f"{possessor} {noun.singular}"}
    if language == "de":
        stem = _GERMAN_POSSESSIVES[possessor]
        return {
            "" if case == "nom" else case: f"{stem}{_EIN_ENDINGS[case][noun.gender]} {noun.singular}"
            for case in ("nom", "acc", "dat")
        }
    return {"": f"{_POSSESSIVES[language][possessor]['mfp'.index(noun.gender)]} {noun.singular}"}


def inflect_number(words: str, language: str, feminine: bool) -> str:
    """Inflects a spelled-out cardinal before a noun: vingt et une, veintiún, doscientas."""
    return _substitute(words, _NUMBERS.get((language, feminine), ()))


def inflect_ordinal(words: str, language: str, feminine: bool) -> str:
    """Inflects a spelled-out ordinal before a noun: premier or première, tercer or tercera."""
    return _substitute(words, _ORDINALS.get((language, feminine), ()))
