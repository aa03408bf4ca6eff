"""The embedded data set: parallel sentences made of templates, CLDR (by Babel) and num2words.

`Cldr` is the TFDS builder `cldr`, with one config for each direction; `generate` makes the same pairs
without TFDS. Nothing is downloaded, and neither JAX nor TensorFlow is imported.
"""

import bisect
import hashlib
import itertools
import random
import string
from collections.abc import Iterator, Mapping
from typing import ClassVar

import tensorflow_datasets as tfds

from transformer.data.cldr import slots as cldr_slots
from transformer.data.cldr import templates_life, templates_time
from transformer.data.cldr.grammar import Frame, contract
from transformer.runtime.errors import UserError

Pair = tuple[str, str]

FRAMES = templates_time.FRAMES + templates_life.FRAMES
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


def _slots(frame: Frame) -> list[str]:
    """The slots of a frame, each once, in English order."""
    return list(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(frame.en) if name))


_SLOTS = [(frame, _slots(frame)) for frame in FRAMES]


def render(frame: Frame, values: Mapping[str, cldr_slots.Value], language: str) -> str:
    """The frame's sentence in one language, with the slots filled, words contracted, the first letter large."""
    text = getattr(frame, language).format_map(cldr_slots.fill(values, language))
    text = contract(text, language)
    return text[0].upper() + text[1:]


def candidates(language: str, seed: int) -> Iterator[Pair]:
    """An endless stream of (English, translation) pairs, with repeats; the same for a seed on every machine."""
    # A string seeds random.Random by SHA-512, the same in every Python version.
    rng = random.Random(f"cldr {seed}")
    while True:
        frame, slots = cldr_slots.pick(rng, _SLOTS)
        values = cldr_slots.draw(slots, rng)
        yield render(frame, values, "en"), render(frame, values, language)


def _position(english: str) -> float:
    """A sentence's fixed place in [0, 1), by which it belongs to one split in every language and run."""
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
        name = names[bisect.bisect_right(bounds, _position(english) * bounds[-1])]
        if len(splits[name]) == split_sizes[name] or english in seen or translation in seen:
            continue
        seen.update((english, translation))
        splits[name].append((english, translation))
        missing -= 1
    return splits


class Cldr(tfds.core.GeneratorBasedBuilder):
    """Generated parallel sentences from English; see the module."""

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
