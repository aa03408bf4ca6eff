"""Writes an exported model and compares its log-probabilities with those of the original first."""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from transformer.checkpoints.loading import RestoredModel
from transformer.data.tokenizer import EOS, UNK
from transformer.export import ctranslate2, jax_export
from transformer.export.jax_export import Score, pad
from transformer.models.registry import ModelDef
from transformer.runtime.errors import UserError
from transformer.runtime.files import user_error_on_oserror, write_atomic

NEEDS = {"ctranslate2": "ctranslate2", "jax": "flatbuffers"}

# By how many nats the log-probability of a token may differ, at most and on average. int8 is meant to differ: its
# bounds only tell rounding from a model that is broken.
PAIRS, LONGEST = 24, 40  # random sentences that are scored, and their tokens

TOLERANCES = {"float32": (1e-3, 1e-4), "bfloat16": (1.0, 0.1), "int8": (3.0, 0.3)}


class MaxAbsError(NamedTuple):
    """Between log-probabilities of what was written and those of the model, in nats a token."""

    largest: float
    mean: float


def check_installed(form: str, flag: str) -> None:
    """Refuses a format whose package is missing; `flag` is what asked for it."""
    if importlib.util.find_spec(NEEDS[form]) is None:
        raise UserError(f"{flag} needs the package {NEEDS[form]}: pip install {NEEDS[form]}")


def write(trained: RestoredModel, folder: pathlib.Path, form: str, quantization: str = "float32") -> dict[str, Any]:
    """Writes the model, its tokenizer and export.json into a folder that exists; returns what export.json says.

    Raises:
      UserError: the format cannot express the model, or what was written computes something else.
    """
    family = trained.config.model.family
    if family != "attention":
        raise UserError(f"model.family = {family}: expected attention, the one family that can be exported")
    trained.tokenizer.save(folder)
    score: Score
    if form == "ctranslate2":
        precision, score = quantization, ctranslate2.write(trained, folder, quantization)
    else:
        precision, score = trained.config.model.dtype, jax_export.write(trained, folder)
    difference = compare(trained, precision, score)
    summary = {
        "format": form,
        "precision": precision,
        "steps": trained.steps,
        "largest_difference": difference.largest,
        "mean_difference": difference.mean,
        "longest": jax_export.max_length(trained.config),
        "decode": dataclasses.asdict(trained.config.decode),
    }
    if form == "ctranslate2":
        summary["translate_batch"] = ctranslate2.options(trained.config.decode)
    write_atomic(folder / "export.json", json.dumps(summary, indent=1) + "\n")
    return summary


def compare(trained: RestoredModel, precision: str, score: Score) -> MaxAbsError:
    """Holds the log-probabilities that `score` gives to random targets of random sources against the model's own.

    Raises:
      UserError: they differ by more than their precision explains.
    """
    sources, targets = random_sentences(trained, seed=0), random_sentences(trained, seed=1)
    pairs = zip(score(sources, targets), reference_log_probs(trained, precision, sources, targets), strict=True)
    differences = np.concatenate([np.abs(got - own) for got, own in pairs])
    found = MaxAbsError(float(differences.max()), float(differences.mean()))
    bounds = TOLERANCES[precision]
    if not (found.largest <= bounds[0] and found.mean <= bounds[1]):
        raise UserError(
            f"the exported model gives other log-probabilities: expected differences of at most {bounds[0]} nats a "
            f"token, {bounds[1]} on average, got {found.largest:.3g} and {found.mean:.3g}; nothing was exported. Try "
            "another version of the package it is for, or --format of another"
        )
    return found


def random_sentences(trained: RestoredModel, seed: int) -> list[np.ndarray]:
    """Ids of ordinary pieces with EOS at the end."""
    rng = np.random.default_rng(seed)
    longest = min(LONGEST, trained.config.decode.max_source_tokens)
    lengths = rng.integers(1, longest, PAIRS)
    size = trained.tokenizer.vocab_size
    return [np.append(rng.integers(UNK + 1, size, length), EOS).astype(np.int32) for length in lengths]


def reference_log_probs(
    trained: RestoredModel, precision: str, sources: Sequence[np.ndarray], targets: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Of each target token, given its source and the tokens before it, by the model as it was loaded."""
    dtype = "bfloat16" if precision == "bfloat16" else "float32"
    model = ModelDef(dataclasses.replace(trained.config.model, dtype=dtype), trained.tokenizer.vocab_size)
    run = jax.jit(functools.partial(jax_export.target_log_probs, model))
    found_BT = np.asarray(run(jax.device_get(trained.params), pad(sources), pad(targets)))
    return [row[: len(target)] for row, target in zip(found_BT, targets, strict=True)]


@contextlib.contextmanager
def atomic_directory(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder beside its place, moved there at the end of the block; if that fails nothing is left."""
    if folder.exists():
        raise UserError(f"--output={folder}: expected a folder that does not exist yet; name another, or remove it")
    partial = folder.parent / f"{folder.name}.partial"
    with user_error_on_oserror(f"--output={folder}"):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
