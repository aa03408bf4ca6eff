"""Exports a trained model as two functions that JAX runs without this package: `translate` and `score` (jax.export).

Both take the params as a dict of arrays, which are in a file beside them, and ids of any number of rows and any width;
one file holds the program for CPU, CUDA and TPU.

B rows, S source length, T target length or longest translation, N beams, V vocabulary, D model width.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from transformer.checkpoints.loading import RestoredModel
from transformer.config import Config
from transformer.data.batching import pad
from transformer.decoding.decode import DecodeInputs, decode
from transformer.models.layers import sinusoidal_position_encoding
from transformer.models.loss import target_log_probs
from transformer.models.registry import ModelDef, Params
from transformer.runtime.errors import UserError
from transformer.runtime.files import write_atomic

PLATFORMS = ("cpu", "cuda", "tpu")
POSITIONS = 2048  # least rows of a table of sinusoids; CTranslate2 itself cuts sources at 1,024 by default
PARAMS_FILE, PIECES_FILE = "params.npz", "pieces.json"

Score = Callable[[Sequence[np.ndarray], Sequence[np.ndarray]], list[np.ndarray]]


def write(trained: RestoredModel, folder: pathlib.Path, dtype: str) -> Score:
    """Writes translate.jax, score.jax, params.npz and pieces.json; returns a function that scores with these files.

    Args:
      dtype: in which the programs compute, in place of `model.dtype`.

    Raises:
      UserError: the method samples, which would need a random key for each sentence.
    """
    config = trained.config
    if config.decode.method != "beam":
        raise UserError(
            f"decode.method = {config.decode.method}: the exported program searches by beam; add --decode.method=beam"
        )
    model, params = with_position_table(config, trained.tokenizer.vocab_size, jax.device_get(trained.params), dtype)
    flat = {"/".join(map(str, path)): leaf for path, leaf in traverse_util.flatten_dict(params).items()}
    np.savez(folder / PARAMS_FILE, **flat)
    rows, width, length = jax.export.symbolic_shape("rows, width, length")
    shapes = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in flat.items()}
    source_BS, target_BT = (jax.ShapeDtypeStruct((rows, size), np.int32) for size in (width, length))

    def translate(flat: dict[str, Any], source_BS: jax.Array) -> dict[str, jax.Array]:
        beams = config.decode.beam_size
        return decode((model,), config.decode, beams, (unflatten(flat),), DecodeInputs(source_BS))._asdict()

    def score(flat: dict[str, Any], source_BS: jax.Array, target_BT: jax.Array) -> jax.Array:
        logits_BTV = model.bind(unflatten(flat))(source_BS, target_BT)
        return target_log_probs(logits_BTV, target_BT)

    for function, arguments in ((translate, (source_BS,)), (score, (source_BS, target_BT))):
        exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)(shapes, *arguments)
        write_atomic(folder / f"{function.__name__}.jax", bytes(exported.serialize()))
    pieces = trained.tokenizer.pieces(range(trained.tokenizer.vocab_size))
    write_atomic(folder / PIECES_FILE, json.dumps(pieces, ensure_ascii=False) + "\n")
    return functools.partial(score_with, folder)


def max_positions(config: Config) -> int:
    """The most tokens of a sentence of an exported model that looks positions up in a table."""
    if config.model.positions == "learned":
        return config.model.max_positions
    return max(POSITIONS, config.decode.max_target_tokens)


def with_position_table(config: Config, vocab_size: int, params: Params, dtype: str) -> tuple[ModelDef, Params]:
    """The model in a form that supports symbolic shapes: plain attention, positions looked up in a table."""
    fields: dict[str, Any] = {"attention": "plain", "dtype": dtype}
    if config.model.positions == "sinusoidal":
        rows = max_positions(config)
        table_TD = sinusoidal_position_encoding(rows, config.model.emb_dim)
        params = {**params, "source_positions": table_TD, "target_positions": table_TD}
        fields |= {"positions": "learned", "max_positions": rows}
    return ModelDef(dataclasses.replace(config.model, **fields), vocab_size), params


def unflatten(flat: dict[str, Any]) -> Params:
    """Nests params by path; a number in a path is the index of a layer."""
    paths = {tuple(int(part) if part.isdecimal() else part for part in name.split("/")): name for name in flat}
    return traverse_util.unflatten_dict({path: flat[name] for path, name in paths.items()})


def score_with(folder: pathlib.Path, sources: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Log-probabilities of the tokens of each target by the exported program."""
    with np.load(folder / PARAMS_FILE) as arrays:
        params = dict(arrays)
    program = jax.export.deserialize(bytearray((folder / "score.jax").read_bytes()))
    log_probs_BT = np.asarray(program.call(params, pad(sources), pad(targets)))
    return [row[: len(target)] for row, target in zip(log_probs_BT, targets, strict=True)]
