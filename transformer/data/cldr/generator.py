"""Generates the embedded data set `cldr`: parallel sentences from templates, CLDR (by Babel) and num2words.

`Cldr` is its TFDS builder, with one config for each target language; `generate` makes the same pairs without TFDS.
Downloads nothing and imports neither JAX nor TensorFlow.
"""

import bisect
import datetime
import hashlib
import itertools
import random
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any, ClassVar, NamedTuple, TypeVar

import tensorflow_datasets as tfds

from transformer.data.cldr import grammar, locale, templates
from transformer.data.cldr import lexicon as words
from transformer.data.cldr.grammar import InflectedValue, Template, contract
from transformer.runtime.errors import UserError

_T = TypeVar("_T")

Value = tuple[Any, ...]

Sampler = Callable[[random.Random], Value]

Renderer = Callable[..., InflectedValue | str]  # of the parts of a value and the language

_PRONOUNS = {
    "en": ("he", "she", "they", "they"),
    "de": ("er", "sie", "sie", "sie"),
    "fr": ("il", "elle", "ils", "elles"),
    "es": ("él", "ella", "ellos", "ellas"),
}

_AND = {"en": "and", "de": "und", "fr": "et", "es": "y"}

_NAMES = words.NAMES["m"] + words.NAMES["f"]

_RELATIVES = words.KIN | words.FAMILIES

_CENTS = (0, 0, 25, 50, 75, 90, 95, 99)

_HALVES = tuple(Decimal(n) / 2 for n in range(2, 41))

_LAPSES = (("day", 1, 20), ("week", 7, 15), ("month", 30, 11), ("year", 365, 30))

_MINUTES = range(24 * 60)


class SlotType(NamedTuple):
    """Samples and renders the values of a slot. Two slots of one family never share an identity within a sentence."""

    sample: Sampler
    render: Renderer
    family: str = ""
    identity: Callable[[Value], frozenset[Any]] = frozenset


def choice(rng: random.Random, options: Sequence[_T]) -> _T:
    """Chooses an option by random() alone, the only method whose results Python keeps the same in all versions."""
    return options[int(rng.random() * len(options))]


def _one_of(options: Sequence[Any]) -> Sampler:
    return lambda rng: (choice(rng, options),)


def _two_of(options: Sequence[Any]) -> Sampler:
    """Two different options, the earlier one first."""

    def sample(rng: random.Random) -> Value:
        first, second = (int(rng.random() * size) for size in (len(options), len(options) - 1))
        second += second >= first
        return (options[min(first, second)], options[max(first, second)])

    return sample


def _all_of(*groups: Sequence[Any]) -> Sampler:
    """One option of each group."""
    return lambda rng: tuple(choice(rng, group) for group in groups)


def _sample_kin(rng: random.Random, nouns: Sequence[str]) -> Value:
    return ("kin", choice(rng, grammar.POSSESSORS), choice(rng, nouns))


def _sample_one(rng: random.Random) -> Value:
    return ("name", choice(rng, _NAMES)) if rng.random() < 0.6 else _sample_kin(rng, tuple(words.KIN))


def _sample_who(rng: random.Random) -> Value:
    chance = rng.random()
    if chance < 0.2:
        return _sample_kin(rng, tuple(words.FAMILIES))
    if chance < 0.4:
        return ("pair", *_two_of(_NAMES)(rng))
    return _sample_one(rng)


def _sample_price(rng: random.Random) -> Value:
    whole = choice(rng, (range(2, 100), range(100, 1000, 5), range(1000, 10000, 50)))
    return (choice(rng, ("EUR", "USD", "GBP")), choice(rng, whole) + Decimal(choice(rng, _CENTS)) / 100)


def _sample_sum(rng: random.Random) -> Value:
    whole = choice(rng, (range(2, 100), range(100, 1000, 10), range(1000, 20000, 500)))
    return (choice(rng, ("EUR", "USD", "GBP", "CHF")), choice(rng, whole))


def _sample_lapse(rng: random.Random) -> Value:
    unit, days, most = choice(rng, _LAPSES)
    return (unit, days, choice(rng, range(2, most + 1)))


def _sample_quantity(*options: tuple[str, Sequence[Decimal | int]]) -> Sampler:
    def sample(rng: random.Random) -> Value:
        unit, amounts = choice(rng, options)
        return (unit, choice(rng, amounts))

    return sample


def _days(first_year: int, last_year: int) -> range:
    return range(datetime.date(first_year, 1, 1).toordinal(), datetime.date(last_year, 12, 31).toordinal())


def _person(sort: str, *who_and_language: str) -> InflectedValue:
    *who, language = who_and_language
    if sort == "kin":
        possessor, noun = who
        agreement = grammar.AGREEMENT[_RELATIVES[noun]["fr"].gender]
        forms = grammar.possessive(possessor, _RELATIVES[noun][language], language)
    else:
        all_female = all(name in words.NAMES["f"] for name in who)
        agreement = (grammar.FS if all_female else grammar.MS) + (grammar.MP if sort == "pair" else 0)
        forms = dict.fromkeys(("", "acc", "dat"), f" {_AND[language]} ".join(who))
    return InflectedValue(forms | {"he": _PRONOUNS[language][agreement]}, agreement)


def _person_identity(value: Value) -> frozenset[Any]:
    return frozenset(value[2:] if value[0] == "kin" else value[1:])


def _thing(noun: str, adjective: str, language: str) -> InflectedValue:
    return grammar.noun_phrase(words.THINGS[noun][language], words.ADJECTIVES[adjective][language], language)


def _things(count: int, noun: str, adjective: str, language: str) -> str:
    word = words.THINGS[noun][language]
    numeral = format(locale.cardinal(count, language), "f" if word.gender == "f" else "")
    return grammar.counted_noun_phrase(word, words.ADJECTIVES[adjective][language], numeral, language)


def _definite(nouns: dict[str, dict[str, words.Noun]]) -> SlotType:
    return SlotType(
        _one_of(tuple(nouns)),
        lambda noun, language: grammar.definite_noun_phrase(noun, nouns[noun][language], language),
    )


def _bare(nouns: dict[str, dict[str, words.Noun]]) -> SlotType:
    return SlotType(_one_of(tuple(nouns)), lambda noun, language: nouns[noun][language].singular)


def _compared(unit: str, amounts: Sequence[Decimal | int]) -> SlotType:
    """Two amounts of one unit, with the forms `low` and `high`."""

    def render(low: Decimal | int, high: Decimal | int, language: str) -> InflectedValue:
        return InflectedValue(
            {"low": locale.quantity(unit, low, language), "high": locale.quantity(unit, high, language)}
        )

    return SlotType(_two_of(amounts), render)


def _span(start: int, end: int, language: str) -> InflectedValue:
    forms = {"start": locale.time_of_day(start, language), "end": locale.time_of_day(end, language)}
    return InflectedValue({**forms, "bare": locale.clock(start, language)})


def _measured(*options: tuple[str, Sequence[Decimal | int]]) -> SlotType:
    return SlotType(_sample_quantity(*options), locale.quantity)


SLOT_TYPES = {
    "who": SlotType(_sample_who, _person, "person", _person_identity),
    "one": SlotType(_sample_one, _person, "person", _person_identity),
    "thing": SlotType(_all_of(tuple(words.THINGS), tuple(words.ADJECTIVES)), _thing),
    "things": SlotType(_all_of(range(2, 100), tuple(words.THINGS), tuple(words.ADJECTIVES)), _things),
    "event": _definite(words.EVENTS),
    "place": _definite(words.PLACES),
    "food": _bare(words.FOODS),
    "drink": _bare(words.DRINKS),
    "country": SlotType(_one_of(tuple(words.TERRITORIES)), locale.country),
    "city": SlotType(_one_of(words.CITY_ZONES), locale.city),
    "language": SlotType(_one_of(words.SPOKEN), locale.language_name),
    "time": SlotType(_one_of(_MINUTES), locale.time_of_day),
    "span": SlotType(_two_of(_MINUTES), _span),
    "weekday": SlotType(_one_of(range(7)), locale.weekday),
    "past": SlotType(_one_of(_days(1960, 2019)), locale.date),
    "coming": SlotType(_one_of(_days(2027, 2035)), locale.date),
    "month": SlotType(_all_of(range(1990, 2020), range(1, 13)), locale.month),
    "soon": SlotType(_all_of(range(2027, 2036), range(1, 13)), locale.month),
    "year": SlotType(_one_of(range(1950, 2020)), lambda year, language: str(year)),
    "lapse": SlotType(_sample_lapse, locale.relative_time),
    "price": SlotType(_sample_price, locale.price),
    "sum": SlotType(_sample_sum, locale.sum_of_money),
    "percent": _measured(("percent", [Decimal(n) / 200 for n in range(3, 80)])),
    "hours": _measured(("duration-hour", _HALVES)),
    "minutes": _measured(("duration-minute", range(2, 60))),
    "distance": _measured(("length-kilometer", (*_HALVES, *range(25, 100, 5), *range(100, 1500, 10)))),
    "centimeters": _measured(("length-centimeter", range(2, 30))),
    "speed": _measured(("speed-kilometer-per-hour", range(45, 240))),
    "area": _measured(("area-square-meter", range(20, 250))),
    "data": _measured(("digital-gigabyte", _HALVES), ("digital-megabyte", range(20, 1000, 10))),
    "mass": _measured(("mass-gram", range(50, 1000, 25)), ("mass-kilogram", _HALVES)),
    "weight": _measured(("mass-kilogram", (*_HALVES, *range(21, 80)))),
    "volume": _measured(("volume-liter", _HALVES), ("volume-milliliter", range(50, 1000, 25))),
    "meters": _compared("length-meter", (*_HALVES, *range(21, 100), *range(100, 1200, 10))),
    "degrees": _compared("temperature-celsius", range(2, 41)),
    "shares": _compared("percent", [Decimal(n) / 200 for n in range(4, 180)]),
    "small": SlotType(_one_of(range(2, 13)), locale.cardinal),
    "years": SlotType(_one_of(range(2, 61)), locale.cardinal),
    "count": SlotType(_one_of(range(2, 100)), locale.cardinal),
    "many": SlotType(_one_of(range(100, 1000)), locale.cardinal),
    "ordinal": SlotType(_one_of(range(2, 21)), locale.ordinal),
    "inhabitants": SlotType(_one_of(range(115_000, 4_000_000, 10_000)), locale.number),
}


def sample_values(slots: Sequence[str], rng: random.Random) -> dict[str, Value]:
    """Samples a value for each slot; no two slots of one family name the same person, city, thing and so on."""
    values: dict[str, Value] = {}
    taken: dict[str, frozenset[Any]] = {}
    for slot in slots:
        name = slot.rstrip(string.digits)
        slot_type = SLOT_TYPES[name]
        family = slot_type.family or name
        value = slot_type.sample(rng)
        while not taken.get(family, frozenset()).isdisjoint(slot_type.identity(value)):
            value = slot_type.sample(rng)
        values[slot] = value
        taken[family] = taken.get(family, frozenset()) | slot_type.identity(value)
    return values


Pair = tuple[str, str]

TEMPLATES = templates.TIME + templates.LIFE
TARGETS = ("de", "fr", "es")
SPLIT_SIZES = {"train": 60_000, "validation": 500, "test": 1_000}

_DESCRIPTION = """
Parallel sentences, English to German, French and Spanish, generated on your machine without a download.
Sentence frames written for this project are filled with dates, times, weekdays, prices, units, territories,
cities and languages localised by the Unicode CLDR (through Babel), and with numbers spelled out by num2words.
Every English sentence has one translation and every translation one English sentence; no sentence of either
side is in two splits. The CLDR data is used under the Unicode License v3.
"""

_CITATION = """\
@misc{cldr,
  title  = {{Unicode Common Locale Data Repository}},
  author = {{Unicode Consortium}},
  url    = {https://cldr.unicode.org},
}"""


def slots_of(text: str) -> list[str]:
    """The slots of a template's text, each once, in order."""
    return list(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(text) if name))


_SLOTS = [(template, slots_of(template.en)) for template in TEMPLATES]


def render(template: Template, values: Mapping[str, Value], language: str) -> str:
    """The sentence of a template in one language: slots filled, words contracted, first letter capitalized."""
    rendered = {slot: SLOT_TYPES[slot.rstrip(string.digits)].render(*value, language) for slot, value in values.items()}
    text = contract(getattr(template, language).format_map(rendered), language)
    return text[0].upper() + text[1:]


def candidates(language: str, seed: int) -> Iterator[Pair]:
    """Yields (English, translation) pairs without end, with repeats; the same for a seed on every machine."""
    # A string seeds random.Random by SHA-512, the same in every Python version.
    rng = random.Random(f"cldr {seed}")
    while True:
        template, slots = choice(rng, _SLOTS)
        values = sample_values(slots, rng)
        yield render(template, values, "en"), render(template, values, language)


def split_position(english: str) -> float:
    """Hashes a sentence to [0, 1), so that it is in the same split in every language and run."""
    return int.from_bytes(hashlib.blake2b(english.encode(), digest_size=6).digest()) / 2**48


def generate(language: str, split_sizes: Mapping[str, int] = SPLIT_SIZES, seed: int = 0) -> dict[str, list[Pair]]:
    """Generates the splits of one direction.

    Args:
      language: the target, one of `TARGETS`.
      split_sizes: how many pairs each split gets.
      seed: another seed gives other sentences of the same kinds.

    Returns:
      For each split its (English, translation) pairs. No English sentence and no translation occurs twice,
      within a split or between two.

    Raises:
      UserError: the language is not one of `TARGETS`.
    """
    if language not in TARGETS:
        raise UserError(f"expected a target language of {', '.join(TARGETS)}, got {language!r}")
    bounds = list(itertools.accumulate(split_sizes.values()))
    names = list(split_sizes)
    splits: dict[str, list[Pair]] = {name: [] for name in names}
    seen: set[str] = set()
    stream = candidates(language, seed)
    missing = sum(split_sizes.values())
    while missing:
        english, translation = next(stream)
        name = names[bisect.bisect_right(bounds, split_position(english) * bounds[-1])]
        if len(splits[name]) == split_sizes[name] or english in seen or translation in seen:
            continue
        seen.update((english, translation))
        splits[name].append((english, translation))
        missing -= 1
    return splits


class Cldr(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of the generated sentence pairs."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "Initial release: English to German, French and Spanish."}
    BUILDER_CONFIGS: ClassVar[list[tfds.core.BuilderConfig]] = [
        tfds.core.BuilderConfig(name=f"en-{language}", description=f"English to {language}.") for language in TARGETS
    ]
    split_sizes: Mapping[str, int] = SPLIT_SIZES

    @property
    def _target(self) -> str:
        return self.builder_config.name.removeprefix("en-")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=tfds.features.Translation(languages=("en", self._target)),
            supervised_keys=("en", self._target),
            homepage="https://cldr.unicode.org",
            citation=_CITATION,
            license="Unicode License v3 (CLDR data)",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager  # nothing to download
        splits = generate(self._target, self.split_sizes)
        return {name: self._generate_examples(pairs) for name, pairs in splits.items()}

    def _generate_examples(self, pairs: list[Pair]) -> Iterator[tuple[int, dict[str, str]]]:
        for key, (english, translation) in enumerate(pairs):
            yield key, {"en": english, self._target: translation}
