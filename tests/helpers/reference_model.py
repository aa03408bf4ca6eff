"""The Transformer and its variants in NumPy, one sentence pair and one head at a time, in float64: slow and obvious.

S source length, T target length, D model width, H heads, K width per head, V vocabulary.
"""

import cmath
import math
from typing import Any, NamedTuple

import numpy as np

from transformer.config import ModelConfig
from transformer.data.tokenizer import BOS


class Forward(NamedTuple):
    """Logits of each target token, and the attention weights of encoder, decoder and from decoder to source."""

    logits_TV: np.ndarray
    encoder_LHSS: np.ndarray
    decoder_LHTT: np.ndarray
    cross_LHTS: np.ndarray


def forward(params: Any, config: ModelConfig, source_S: np.ndarray, target_T: np.ndarray) -> Forward:
    """Runs a model with these params, layers not stacked; ids end in EOS and have no padding."""
    encoder, decoder, cross = [], [], []
    x_SD = embed(params, config, "source", source_S)
    for layer in params["encoder"].values():

        def attend_to_itself(x, layer=layer):
            return attention(x, x, layer["attention"], config, encoder, rotary=config.positions == "rotary")

        x_SD = residual(x_SD, attend_to_itself, layer["attention_residual"], config)
        x_SD = residual(
            x_SD, lambda x, layer=layer: feed_forward(x, layer["mlp"], config), layer["mlp_residual"], config
        )
    if config.norm == "pre":
        x_SD = norm(x_SD, params["encoder_norm"], config)
    x_TD = embed(params, config, "target", np.append(BOS, target_T[:-1]))
    for layer in params["decoder"].values():

        def attend_to_past(x, layer=layer):
            rotary = config.positions == "rotary"
            return attention(x, x, layer["attention"], config, decoder, rotary=rotary, causal=True)

        def attend_to_source(x, layer=layer):
            return attention(x, x_SD, layer["cross"], config, cross)

        x_TD = residual(x_TD, attend_to_past, layer["attention_residual"], config)
        x_TD = residual(x_TD, attend_to_source, layer["cross_residual"], config)
        x_TD = residual(
            x_TD, lambda x, layer=layer: feed_forward(x, layer["mlp"], config), layer["mlp_residual"], config
        )
    if config.norm == "pre":
        x_TD = norm(x_TD, params["decoder_norm"], config)
    logits_TV = x_TD @ table(params, config, "output").T
    return Forward(logits_TV, *(np.array(weights) for weights in (encoder, decoder, cross)))


def table(params: Any, config: ModelConfig, name: str) -> np.ndarray:
    """An embedding matrix [V, D]."""
    return array(params["embeddings"]["shared" if config.share_embeddings else name]["table"])


def embed(params: Any, config: ModelConfig, side: str, ids: np.ndarray) -> np.ndarray:
    """Embeddings scaled by √D, with sinusoidal or learned positions."""
    x = table(params, config, side)[ids] * math.sqrt(config.emb_dim)
    for position, row in enumerate(x):
        if config.positions == "learned":
            row += array(params[f"{side}_positions"])[position]
        elif config.positions == "sinusoidal":
            for column in range(config.emb_dim):
                angle = position / 10000 ** ((column - column % 2) / config.emb_dim)
                row[column] += math.cos(angle) if column % 2 else math.sin(angle)
    return x


def residual(x: np.ndarray, sublayer: Any, params: Any, config: ModelConfig) -> np.ndarray:
    """Post-norm or pre-norm."""
    if config.norm == "post":
        return norm(x + sublayer(x), params["norm"], config)
    return x + sublayer(norm(x, params["norm"], config))


def norm(x: np.ndarray, params: Any, config: ModelConfig) -> np.ndarray:
    """LayerNorm or RMSNorm of each row."""
    out = np.empty_like(x)
    for index in np.ndindex(x.shape[:-1]):
        row = x[index] - x[index].mean() if config.norm_type == "layer" else x[index]
        out[index] = row / math.sqrt(np.square(row).mean() + config.norm_epsilon) * array(params["scale"])
    return out + array(params["bias"]) if "bias" in params else out


def activation(x: np.ndarray, name: str) -> np.ndarray:
    """relu, gelu or silu of each element."""
    function = {
        "relu": lambda z: max(z, 0.0),
        "gelu": lambda z: z * (1 + math.erf(z / math.sqrt(2))) / 2,
        "silu": lambda z: z / (1 + math.exp(-z)),
    }[name]
    return np.vectorize(function)(x)


def feed_forward(x: np.ndarray, params: Any, config: ModelConfig) -> np.ndarray:
    """Two matrices, or three with a gate."""

    def affine(x, name):
        return x @ array(params[f"kernel_{name}"]) + array(params.get(f"bias_{name}", 0.0))

    gate = {"swiglu": "silu", "geglu": "gelu"}.get(config.activation)
    hidden = affine(x, "in")
    hidden = activation(affine(x, "gate"), gate) * hidden if gate else activation(hidden, config.activation)
    return affine(hidden, "out")


def attention(
    x_TD: np.ndarray,
    memory_SD: np.ndarray,
    params: Any,
    config: ModelConfig,
    weights: list,
    rotary: bool = False,
    causal: bool = False,
) -> np.ndarray:
    """Attention head by head; appends its weights [H, T, S]."""
    query, key, value, out = (array(params[name]) for name in ("query", "key", "value", "out"))
    heads, result = [], np.zeros_like(x_TD)
    for head in range(config.num_heads):
        q_TK, k_SK, v_SK = x_TD @ query[:, head], memory_SD @ key[:, head], memory_SD @ value[:, head]
        if config.qk_norm:
            q_TK, k_SK = norm(q_TK, params["query_norm"], config), norm(k_SK, params["key_norm"], config)
        if rotary:
            q_TK, k_SK = rotated(q_TK), rotated(k_SK)
        weights_TS = np.zeros((len(q_TK), len(k_SK)))
        for t, q_K in enumerate(q_TK):
            visible = t + 1 if causal else len(k_SK)
            scores = np.exp(k_SK[:visible] @ q_K / math.sqrt(len(q_K)))
            weights_TS[t, :visible] = scores / scores.sum()
        heads.append(weights_TS)
        result += weights_TS @ v_SK @ out[head]
    weights.append(heads)
    return result


def rotated(x_TK: np.ndarray) -> np.ndarray:
    """Each pair of columns j and j + K/2 as a complex number, times e^(i · position · 10000^(-2j/K))."""
    half, out = x_TK.shape[1] // 2, np.empty_like(x_TK)
    for position, row in enumerate(x_TK):
        for j in range(half):
            turned = complex(row[j], row[j + half]) * cmath.exp(1j * position / 10000 ** (j / half))
            out[position, j], out[position, j + half] = turned.real, turned.imag
    return out


def array(param: Any) -> np.ndarray:
    """In float64."""
    return np.asarray(param, np.float64)
