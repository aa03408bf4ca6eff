"""Converts a trained model to CTranslate2 (https://opennmt.net/CTranslate2).

D model width, V vocabulary, T positions.
"""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any, cast

import jax
import numpy as np

from transformer.checkpoints.loading import RestoredModel
from transformer.config import DecodeConfig, ModelConfig
from transformer.data.tokenizer import BOS, EOS, PAD, UNK, Tokenizer
from transformer.export.jax_export import Score, max_positions
from transformer.models.layers import FeedForward, MultiHeadAttention, sinusoidal_position_encoding
from transformer.models.norm import Norm
from transformer.models.stack import unstack_layers
from transformer.models.transformer import Transformer
from transformer.runtime.errors import UserError
from transformer.runtime.logging import log_info

QUANTIZATIONS = ("float32", "int8")
SPECIALS = {PAD: "<pad>", BOS: "<s>", EOS: "</s>", UNK: "<unk>"}


def check(config: ModelConfig) -> None:
    """Checks that CTranslate2 supports the model.

    Raises:
      UserError: the width of keys or values differs from the model's, or queries and keys are normalized.
    """
    if config.qk_norm:
        raise UserError(
            "model.qk_norm = True: CTranslate2 normalizes queries and keys of an encoder-decoder model in another way; "
            "use --format=jax, or train with qk_norm = false"
        )
    for name in ("qkv_dim", "value_dim"):
        width = getattr(config, name)
        if width != config.emb_dim:
            raise UserError(
                f"model.{name} = {width}: CTranslate2 supports only keys and values of the model's width, "
                f"model.emb_dim = {config.emb_dim}; use --format=jax, or train with {name} = emb_dim"
            )


def write(trained: RestoredModel, folder: pathlib.Path, quantization: str) -> Score:
    """Writes model.bin, config.json and shared_vocabulary.json; returns a function that scores with these files.

    Raises:
      UserError: see `check` and `vocabulary`.
    """
    config = trained.config
    check(config.model)
    module = cast(Transformer, trained.model.bind(jax.device_get(trained.params)))
    spec = _empty_spec(config.model)
    _set_stack(spec.encoder, module, "source", max_positions(config))
    _set_stack(spec.decoder, module, "target", max_positions(config))
    spec.decoder.projection.weight = _embedding_table(module, "output")
    words = vocabulary(trained.tokenizer)
    spec.register_source_vocabulary(words)
    spec.register_target_vocabulary(words)
    spec.config.bos_token, spec.config.eos_token, spec.config.unk_token = (SPECIALS[i] for i in (BOS, EOS, UNK))
    spec.config.decoder_start_token = SPECIALS[BOS]
    spec.config.add_source_eos = True
    spec.config.layer_norm_epsilon = config.model.norm_epsilon
    spec.validate()
    spec.optimize(quantization=quantization)
    spec.save(str(folder))
    return functools.partial(score_with, folder, words, quantization)


def _empty_spec(model: ModelConfig) -> Any:
    """The structure of the model in CTranslate2, without weights."""
    from ctranslate2 import specs

    activations = {"relu": "RELU", "gelu": "GELU", "geglu": "GELU", "silu": "SWISH", "swiglu": "SWISH"}
    block: dict[str, Any] = {
        "pre_norm": model.norm == "pre",
        "activation": specs.Activation[activations[model.activation]],
        "ffn_glu": model.is_gated,
        "rms_norm": model.norm_type == "rms",
    }
    if model.positions == "rotary":
        block |= {"rotary_dim": model.qkv_dim // model.num_heads, "rotary_interleave": False}
    return specs.TransformerSpec(
        specs.TransformerEncoderSpec(model.num_encoder_layers, model.num_heads, **block),
        specs.TransformerDecoderSpec(model.num_decoder_layers, model.num_heads, **block),
    )


def score_with(
    folder: pathlib.Path,
    words: Sequence[str],
    precision: str,
    sources: Sequence[np.ndarray],
    targets: Sequence[np.ndarray],
) -> list[np.ndarray]:
    """Log-probabilities of the tokens of each target, EOS included, by CTranslate2 on the CPU."""
    import ctranslate2

    program = ctranslate2.Translator(str(folder), device="cpu", compute_type=precision)
    tokens = [[[words[i] for i in ids[:-1]] for ids in side] for side in (sources, targets)]
    return [np.array(result.log_probs, np.float32) for result in program.score_batch(*tokens)]


def options(decode: DecodeConfig) -> dict[str, Any]:
    """Options of `translate_batch` for the same search as this config, as far as CTranslate2 can.

    CTranslate2 ends a search once `patience` × beam_size hypotheses have finished. A patience of 1 is our
    `early_stopping`; without it our search ends when no hypothesis could be better, and a patience of 3 finds nearly
    always the same. EOS counts in its length only if it is returned, and `min_decoding_length` is 1 by default.
    """
    if unsupported := unsupported_fields(decode):
        log_info(f"warning: CTranslate2 will not search as the config says: {'; '.join(unsupported)}")
    return {
        "beam_size": decode.beam_size,
        "length_penalty": decode.length_penalty,
        "patience": 1 if decode.early_stopping else 3,
        "no_repeat_ngram_size": decode.no_repeat_ngram,
        "return_end_token": True,
        "max_input_length": decode.max_source_tokens,
        "min_decoding_length": decode.min_length,
        "max_decoding_length": decode.max_target_tokens,
    }


def unsupported_fields(decode: DecodeConfig) -> list[str]:
    """Fields that CTranslate2 does not support, each with what it does instead; with a beam of one none matters."""
    if decode.method != "beam":
        return [f"decode.method = {decode.method}: these options search by beam"]
    if decode.beam_size == 1:
        return []
    unsupported = []
    if decode.length_penalty and decode.length_penalty_form != "length":
        unsupported.append(
            f"decode.length_penalty_form = {decode.length_penalty_form}: it divides by length^alpha alone, as "
            "--decode.length_penalty_form=length does here"
        )
    if decode.coverage_penalty:
        unsupported.append(f"decode.coverage_penalty = {decode.coverage_penalty}: these options set none")
    for name in ("min_length", "no_repeat_ngram"):
        if value := getattr(decode, name):
            unsupported.append(f"decode.{name} = {value}: it renormalizes the probabilities of the other tokens")
    return unsupported


def vocabulary(tokenizer: Tokenizer) -> list[str]:
    """The text of each id, all different."""
    words = tokenizer.pieces(range(tokenizer.vocab_size))
    for special, word in SPECIALS.items():
        words[special] = word
    duplicates = {word for word in words if words.count(word) > 1} if len(set(words)) < len(words) else set()
    if duplicates:
        raise UserError(
            f"the vocabulary writes several ids as {sorted(duplicates)}; CTranslate2 tells ids apart by how they are "
            "written; use --format=jax"
        )
    return words


def _set_stack(spec: Any, module: Transformer, side: str, positions: int) -> None:
    """Sets the weights of encoder (source) or decoder (target)."""
    config = module.config
    embeddings = spec.embeddings[0] if side == "source" else spec.embeddings
    embeddings.weight = _embedding_table(module, side)
    if config.positions == "sinusoidal":
        spec.position_encodings.encodings = sinusoidal_position_encoding(positions, config.emb_dim)
    elif config.positions == "learned":
        table = module.source_positions if side == "source" else module.target_positions
        spec.position_encodings.encodings = _array(table)
    stack = module.encoder if side == "source" else module.decoder
    for layer_spec, layer in zip(spec.layer, unstack_layers(stack), strict=True):
        _set_self_attention(layer_spec.self_attention, layer.attention)
        _set_norm(layer_spec.self_attention.layer_norm, layer.attention_residual.norm)
        if side == "target":
            _set_cross_attention(layer_spec.attention, layer.cross)
            _set_norm(layer_spec.attention.layer_norm, layer.cross_residual.norm)
        _set_mlp(layer_spec.ffn, layer.mlp)
        _set_norm(layer_spec.ffn.layer_norm, layer.mlp_residual.norm)
    if config.norm == "pre":
        _set_norm(spec.layer_norm, module.encoder_norm if side == "source" else module.decoder_norm)


def _set_self_attention(spec: Any, attention: MultiHeadAttention) -> None:
    """Fuses queries, keys and values into one matrix: [3 D, D]."""
    parts = (attention.query, attention.key, attention.value)
    _set_linear(spec.linear[0], np.concatenate([_heads(part) for part in parts]))
    _set_linear(spec.linear[1], _output(attention))


def _set_cross_attention(spec: Any, attention: MultiHeadAttention) -> None:
    _set_linear(spec.linear[0], _heads(attention.query))
    _set_linear(spec.linear[1], np.concatenate([_heads(attention.key), _heads(attention.value)]))
    _set_linear(spec.linear[2], _output(attention))


def _set_mlp(spec: Any, mlp: FeedForward) -> None:
    """CTranslate2 activates linear_0, and multiplies by linear_0_noact where there is a gate."""
    _set_linear(spec.linear_1, _array(mlp.kernel_out).T, mlp.bias_out)
    if mlp.kernel_gate is None:
        _set_linear(spec.linear_0, _array(mlp.kernel_in).T, mlp.bias_in)
    else:
        _set_linear(spec.linear_0, _array(mlp.kernel_gate).T, mlp.bias_gate)
        _set_linear(spec.linear_0_noact, _array(mlp.kernel_in).T, mlp.bias_in)


def _set_linear(spec: Any, weight: np.ndarray, bias: Any = None) -> None:
    """`weight` is [out, in]."""
    spec.weight = np.ascontiguousarray(weight)
    if bias is not None:
        spec.bias = _array(bias)


def _set_norm(spec: Any, norm: Norm) -> None:
    spec.gamma = _array(norm.scale)
    if norm.norm_type == "layer":
        spec.beta = np.zeros_like(spec.gamma) if norm.bias is None else _array(norm.bias)


def _heads(param: Any) -> np.ndarray:
    """[D, H, K] → [H K, D]."""
    kernel = _array(param)
    return kernel.reshape(len(kernel), -1).T


def _output(attention: MultiHeadAttention) -> np.ndarray:
    """[H, K, D] → [D, H K]."""
    kernel = _array(attention.out)
    return kernel.reshape(-1, kernel.shape[-1]).T


def _embedding_table(module: Transformer, name: str) -> np.ndarray:
    """[V, D]."""
    return _array(module.embeddings["shared" if module.config.share_embeddings else name].table)


def _array(param: Any) -> np.ndarray:
    return np.array(param[...], np.float32)  # a copy, which CTranslate2 may change
