"""Public test sets by sacreBLEU's names, such as wmt14/full, which sacreBLEU downloads and verifies. Imports no JAX.

They are cached in $SACREBLEU, by default ~/.sacrebleu.
"""

import difflib

import sacrebleu

from transformer.data import text_files
from transformer.runtime.errors import UserError
from transformer.runtime.progress import phase

MAX_NAMES = 12  # in a message


def check_name(name: str) -> None:
    """Raises a UserError unless sacreBLEU has a test set of this name."""
    if name not in sacrebleu.DATASETS:
        close = difflib.get_close_matches(name, sacrebleu.DATASETS, 3, 0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else "such as wmt14/full;"
        raise UserError(f"--test_set={name}: sacreBLEU has no such test set; {hint} sacrebleu --list shows all")


def languages(name: str, pair: str | None) -> tuple[str, str]:
    """The codes of source and target of a test set; those of its only pair if none is given.

    Raises:
      UserError: the set has several pairs and none is given, or not the one that is.
    """
    pairs = sorted(sacrebleu.DATASETS[name].langpairs)
    if pair is None and len(pairs) > 1:
        raise UserError(f"--test_set={name}: has {', '.join(pairs)}; choose with --language_pair={pairs[0]}")
    if pair is not None and pair not in pairs:
        raise UserError(f"--language_pair={pair}: {name} has {', '.join(pairs)}; name one of them")
    source, target = (pair or pairs[0]).split("-", 1)
    return source, target


def load(name: str, languages: tuple[str, str]) -> tuple[list[str], list[list[str]]]:
    """The sources of a test set and its lists of references; downloads it first if it is not cached.

    Args:
      name: sacreBLEU's.
      languages: codes of source and target.

    Raises:
      UserError: sacreBLEU has no such set in this direction, or it cannot be downloaded or read.
    """
    check_name(name)
    pair, folder = "-".join(languages), f"{sacrebleu.SACREBLEU_DIR}/{name}"
    if pair not in sacrebleu.DATASETS[name].langpairs:
        others = [other for other, dataset in sacrebleu.DATASETS.items() if pair in dataset.langpairs]
        more = ", …" if len(others) > MAX_NAMES else ""
        raise UserError(
            f"--test_set={name}: has {', '.join(sorted(sacrebleu.DATASETS[name].langpairs))}; expected {pair}, the "
            f"languages of the model. Sets with {pair}: {', '.join(others[:MAX_NAMES]) or 'none'}{more}"
        )
    try:
        with phase(f"fetching {name}"):
            source = sacrebleu.get_source_file(name, pair)
            references = sacrebleu.get_reference_files(name, pair)
    except (Exception, SystemExit) as error:  # of many types; it exits if a checksum is wrong
        reason = "sacreBLEU's message is above" if isinstance(error, SystemExit) else f"{type(error).__name__}: {error}"
        raise UserError(
            f"--test_set={name}: cannot be downloaded ({reason}). Where there is a network, run\n"
            f"  sacrebleu --test-set {name} --language-pair {pair} --echo src\n"
            f"and copy its folder ~/.sacrebleu/{name} to {folder}. If that folder has files already, delete it first"
        ) from error
    lines = [list(text_files.read_lines(path)) for path in (source, *references)]
    if len(set(map(len, lines))) > 1 or not lines[0]:
        counts = ", ".join(f"{len(side):,}" for side in lines)
        raise UserError(
            f"{folder}: expected equally many sentences of source and references, got {counts}: the download was "
            "interrupted; delete the folder and run again"
        )
    return lines[0], lines[1:]
