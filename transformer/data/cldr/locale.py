"""Localizes numbers, times, dates, money, units and names for the `cldr` data set.

The text comes from CLDR through Babel, spelled-out numbers from num2words. CLDR's no-break spaces are replaced by
plain ones everywhere, so that a tokenizer and a reader see one kind of space.
"""

import datetime
import functools
import re
from decimal import Decimal
from typing import Literal

import num2words
from babel import Locale, dates, numbers, units

from transformer.data.cldr import grammar
from transformer.data.cldr.grammar import InflectedValue
from transformer.data.cldr.lexicon import LANGUAGES

_LOCALES = {language: Locale.parse(language) for language in LANGUAGES}
_TIME_PATTERNS = {"en": "h:mm a", "de": "HH:mm", "fr": "H 'h' mm", "es": "H:mm"}
_DATE_PATTERNS = {
    "en": ("MMMM d, y", "EEEE, MMMM d, y"),
    "de": ("d. MMMM y", "EEEE, 'dem' d. MMMM y"),
    "fr": ("d MMMM y", "EEEE d MMMM y"),
    "es": ("d 'de' MMMM 'de' y", "EEEE d 'de' MMMM 'de' y"),
}


def _plain(text: str, language: str) -> str:
    text = text.replace("\u00a0", " ").replace("\u202f", " ")
    if language == "es":
        # CLDR groups Spanish digits from five on (minimumGroupingDigits), which Babel does not apply.
        text = re.sub(r"(?<![\d.])(\d)\.(\d{3})(?![\d.])", r"\1\2", text)
    return text


@functools.cache
def clock(minute: int, language: str) -> str:
    """Formats a minute of the day: 3:45 PM, 15:45, 15 h 45 (and 15 h on the hour)."""
    time = datetime.time(minute // 60, minute % 60)
    text = _plain(dates.format_time(time, _TIME_PATTERNS[language], locale=_LOCALES[language]), language)
    return text.removesuffix(" 00") if language == "fr" else text


def time_of_day(minute: int, language: str) -> str:
    """Formats a minute of the day for use after a preposition: 3:45 PM, 15:45 Uhr, 15 h 45, las 15:45."""
    text = clock(minute, language)
    if language == "de":
        return f"{text} Uhr"
    if language == "es":
        return f"{'la' if minute // 60 == 1 else 'las'} {text}"
    return text


@functools.cache
def date(day: int, language: str) -> InflectedValue:
    """A day by its ordinal: the form "", and `weekday` with the weekday before it (German: after "am")."""
    moment = datetime.date.fromordinal(day)
    texts = [dates.format_date(moment, pattern, locale=_LOCALES[language]) for pattern in _DATE_PATTERNS[language]]
    if language == "fr" and moment.day == 1:
        texts = [re.sub(r"\b1 ", "1er ", text, count=1) for text in texts]
    return InflectedValue({"": texts[0], "weekday": texts[1]})


@functools.cache
def month(year: int, number: int, language: str) -> str:
    """A month with its year: March 2025, marzo de 2025."""
    pattern = "MMMM 'de' y" if language == "es" else "MMMM y"
    return dates.format_date(datetime.date(year, number, 1), pattern, locale=_LOCALES[language])


@functools.cache
def weekday(number: int, language: str) -> InflectedValue:
    """A weekday, Monday being 0: the form "", and `every` for a habit (Mondays, montags)."""
    name = _LOCALES[language].days["format"]["wide"][number]
    habits = {"en": f"{name}s", "de": f"{name.lower()}s", "fr": name, "es": name.removesuffix("s") + "s"}
    return InflectedValue({"": name, "every": habits[language]})


@functools.cache
def relative_time(
    unit: Literal["day", "week", "month", "year"], days: int, number: int, language: str
) -> InflectedValue:
    """Formats `number` units of `days` days relative to now: the forms `in` (in 3 days) and `ago` (3 days ago)."""
    forms = {}
    for spec, sign in (("in", 1), ("ago", -1)):
        text = dates.format_timedelta(
            datetime.timedelta(days=sign * days * number),
            granularity=unit,
            threshold=number + 1,
            add_direction=True,
            locale=_LOCALES[language],
        )
        forms[spec] = _plain(text, language)
    return InflectedValue(forms)


@functools.cache
def quantity(unit: str, number: Decimal | int, language: str) -> str:
    """Formats a number with its CLDR unit in the right plural: 1.5 kilometers, 1,5 kilomètre."""
    locale = _LOCALES[language]
    if unit == "percent":
        text = numbers.format_percent(number, locale=locale, decimal_quantization=False)
    else:
        text = units.format_unit(number, unit, "long", locale=locale)
    return _plain(text, language)


@functools.cache
def price(currency: str, amount: Decimal, language: str) -> str:
    """An amount with cents and the currency's symbol: $1,234.50, 1.234,50 $."""
    return _plain(numbers.format_currency(amount, currency, locale=_LOCALES[language]), language)


@functools.cache
def sum_of_money(currency: str, amount: int, language: str) -> str:
    """A whole amount with the currency's name: 1,200 US dollars, 1200 dólares estadounidenses."""
    text = numbers.format_currency(
        amount, currency, "#,##0", locale=_LOCALES[language], currency_digits=False, format_type="name"
    )
    return _plain(text, language)


@functools.cache
def number(value: int, language: str) -> str:
    """A whole number in digits, grouped: 1,234,500."""
    return _plain(numbers.format_decimal(value, locale=_LOCALES[language]), language)


@functools.cache
def cardinal(value: int, language: str) -> InflectedValue:
    """A spelled-out number before a masculine noun (the form "") or a feminine one (`f`)."""
    text = num2words.num2words(value, lang=language)
    return InflectedValue({spec: grammar.inflect_number(text, language, spec == "f") for spec in ("", "f")})


@functools.cache
def ordinal(value: int, language: str) -> InflectedValue:
    """A spelled-out ordinal before a masculine noun (the form "") or a feminine one (`f`); German `dat`."""
    text = num2words.num2words(value, lang=language, to="ordinal")
    if language == "de":
        return InflectedValue({"": text, "dat": f"{text}n"})
    # The usual Spanish words, where num2words has rare ones.
    text = {"décimoprimero": "undécimo", "décimosegundo": "duodécimo"}.get(text, text)
    return InflectedValue({spec: grammar.inflect_ordinal(text, language, spec == "f") for spec in ("", "f")})


@functools.cache
def city(zone: str, language: str) -> str:
    """The exemplar city of a time zone: Europe/Vienna is Vienna, Wien, Vienne, Viena."""
    return dates.get_timezone_location(zone, locale=_LOCALES[language], return_city=True)


@functools.cache
def country(code: str, language: str) -> InflectedValue:
    """A territory by its ISO code, with the forms of `grammar.territory`."""
    return grammar.territory(_LOCALES[language].territories[code], code, language)


@functools.cache
def language_name(code: str, language: str) -> InflectedValue:
    """A language by its ISO code: the form "", and `the`; German `from` and `into` (aus dem, ins)."""
    name = _LOCALES[language].languages[code]
    if language == "de":
        return InflectedValue({"": name, "from": f"aus dem {name}en", "into": f"ins {name}e"})
    return InflectedValue({"": name, "the": f"{'le' if language == 'fr' else 'el'} {name}"})
