"""Writes an exported model and verifies its log-probabilities against those of the original."""

import dataclasses
import importlib.util
import json
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from transformer.checkpoints.loading import RestoredModel
from transformer.data.tokenizer import EOS, UNK
from transformer.decoding.scorer import Scorer
from transformer.export import ctranslate2, jax_export
from transformer.export.jax_export import Score
from transformer.models.registry import ModelDef
from transformer.runtime.errors import UserError
from transformer.runtime.files import write_atomic

NEEDS = {"ctranslate2": "ctranslate2", "jax": "flatbuffers"}
PAIRS, MAX_TOKENS = 24, 40  # random sentence pairs that are scored, and the most tokens of a sentence

# Largest and mean difference of a token's log-probability, in nats. int8 is expected to differ: its tolerances only
# tell rounding from a broken model. It differs most on x86 CPUs without VNNI, where sums of two products saturate.
TOLERANCES = {"float32": (1e-3, 1e-4), "bfloat16": (1.0, 0.1), "int8": (3.0, 0.5)}


class Differences(NamedTuple):
    """Largest and mean difference between log-probabilities of the exported and the original model, in nats a token."""

    largest: float
    mean: float


def check_installed(format_name: str, flag: str) -> None:
    """Raises a UserError if the package of a format is missing; `flag` selected the format."""
    if importlib.util.find_spec(NEEDS[format_name]) is None:
        raise UserError(f"{flag} needs the package {NEEDS[format_name]}: pip install {NEEDS[format_name]}")


def write(
    trained: RestoredModel, folder: pathlib.Path, format_name: str, quantization: str = "float32"
) -> dict[str, Any]:
    """Writes the model, its tokenizer and export.json into an existing folder; returns the content of export.json.

    Raises:
      UserError: the format cannot express the model, or the exported model computes other log-probabilities.
    """
    family = trained.config.model.family
    if family != "attention":
        raise UserError(f"model.family = {family}: expected attention, the one family that can be exported")
    trained.tokenizer.save(folder)
    precision = quantization if format_name == "ctranslate2" else trained.config.model.dtype
    # An accelerator rounds products of float32 to TF32 or bfloat16 by default, in the JAX format too.
    is_exact = precision == "float32" and (format_name == "ctranslate2" or jax.default_backend() == "cpu")
    if not is_exact:  # the wide tolerance would hide a small mistake
        with tempfile.TemporaryDirectory(dir=folder.parent) as exact, jax.default_matmul_precision("highest"):
            compare(trained, "float32", write_program(trained, pathlib.Path(exact), format_name, "float32"), "float32")
    with jax.default_matmul_precision("highest" if format_name == "ctranslate2" else None):
        tolerance = "bfloat16" if precision == "float32" and not is_exact else precision
        differences = compare(trained, precision, write_program(trained, folder, format_name, precision), tolerance)
    summary = {
        "format": format_name,
        "precision": precision,
        "steps": trained.steps,
        "largest_difference": differences.largest,
        "mean_difference": differences.mean,
        "longest": None if trained.config.model.positions == "rotary" else jax_export.max_positions(trained.config),
        "decode": dataclasses.asdict(trained.config.decode),
    }
    if format_name == "ctranslate2":
        summary["translate_batch"] = ctranslate2.options(trained.config.decode)
    else:
        summary["jax"] = jax.__version__
    write_atomic(folder / "export.json", json.dumps(summary, indent=1) + "\n")
    return summary


def write_program(trained: RestoredModel, folder: pathlib.Path, format_name: str, precision: str) -> Score:
    """Writes the model in this precision into an existing folder; returns a function that scores with it."""
    if format_name == "ctranslate2":
        return ctranslate2.write(trained, folder, precision)
    return jax_export.write(trained, folder, precision)


def compare(trained: RestoredModel, precision: str, score: Score, tolerance_of: str) -> Differences:
    """Compares the log-probabilities that `score` and the original model give to random sentence pairs.

    Args:
      precision: in which the original model computes.
      tolerance_of: the precision whose tolerance holds.

    Raises:
      UserError: they differ by more than that.
    """
    sources, targets = random_sentences(trained, seed=0), random_sentences(trained, seed=1)
    pairs = zip(score(sources, targets), reference_log_probs(trained, precision, sources, targets), strict=True)
    errors = np.concatenate([np.abs(actual - expected) for actual, expected in pairs])
    differences = Differences(float(errors.max()), float(errors.mean()))
    tolerance = Differences(*TOLERANCES[tolerance_of])
    if not (differences.largest <= tolerance.largest and differences.mean <= tolerance.mean):
        raise UserError(
            f"the exported model gives other log-probabilities: expected differences of at most {tolerance.largest} "
            f"nats a token, {tolerance.mean} on average, got {differences.largest:.3g} and {differences.mean:.3g}; "
            "nothing was exported. Try another version of the package, or another --format"
        )
    return differences


def random_sentences(trained: RestoredModel, seed: int) -> list[np.ndarray]:
    """Ids of ordinary subword tokens with EOS at the end."""
    rng = np.random.default_rng(seed)
    max_tokens = min(MAX_TOKENS, trained.config.decode.max_source_tokens)
    lengths = rng.integers(1, max_tokens, PAIRS)
    size = trained.tokenizer.vocab_size
    return [np.append(rng.integers(UNK + 1, size, length), EOS).astype(np.int32) for length in lengths]


def reference_log_probs(
    trained: RestoredModel, precision: str, sources: Sequence[np.ndarray], targets: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Log-probabilities of the target tokens by the original model, given the source and the tokens before."""
    dtype = "bfloat16" if precision == "bfloat16" else "float32"
    model = ModelDef(dataclasses.replace(trained.config.model, dtype=dtype), trained.tokenizer.vocab_size)
    scorer = Scorer([model], trained.tokenizer, trained.mesh)
    return scorer.log_probs([trained.params], sources, targets, trained.config.decode)
