"""Attention heat maps as HTML: a large one with labels, and a thumbnail for each layer and head to select it.

L layers, H heads, T target tokens, S source tokens.
"""

import base64
import html
import struct
import zlib
from collections.abc import Sequence

import numpy as np

from transformer.data.tokenizer import SPACE

COLOR = (42, 111, 219)
CELL_PIXELS = 18  # pixels
MIN_SCALE = 0.75  # to which a large map shrinks where its column is narrow; beyond, it scrolls


def attention_heatmaps(
    title: str, weights_LHTS: np.ndarray, source: Sequence[str], target: Sequence[str], layer: int
) -> str:
    """The heat maps of one attention of a sentence: from target tokens to source tokens.

    Args:
      title: of the attention.
      weights_LHTS: attention.
      source, target: subword tokens in SentencePiece's notation.
      layer: whose mean over heads is enlarged at first, counted from 1.
    """
    means_LTS = weights_LHTS.mean(1)
    first = png_data_uri(means_LTS[layer - 1])
    rows = []
    for i, heads_HTS in enumerate(weights_LHTS):
        cells = [_thumbnail(png_data_uri(means_LTS[i]), f"layer {i + 1}, mean of heads", "mean", i + 1 == layer)]
        cells += [
            _thumbnail(png_data_uri(h), f"layer {i + 1}, head {j + 1}", f"head {j + 1}")
            for j, h in enumerate(heads_HTS)
        ]
        rows.append(f'<div class="layer"><span class="layer-name">layer {i + 1}</span>{"".join(cells)}</div>')
    return (
        f'<section class="attention"><h4>{html.escape(title)}</h4>'
        f'<p class="shown">layer {layer}, mean of heads</p>'
        f'<div class="scroll">{_labelled_heatmap(first, source, target)}</div>'
        f'<div class="scroll">{"".join(rows)}</div></section>'
    )


def _thumbnail(address: str, title: str, name: str, is_shown: bool = False) -> str:
    return (
        f'<button type="button" class="map" title="{title}" aria-pressed="{str(is_shown).lower()}">'
        f'<img src="{address}" alt="attention of {title}"><span>{name}</span></button>'
    )


def _labelled_heatmap(address: str, source: Sequence[str], target: Sequence[str]) -> str:
    """Source tokens above, target tokens to the left, a cell for each pair."""
    left, top = (10 + 7 * max((len(piece) for piece in pieces), default=0) for pieces in (target, source))
    map_width, map_height = CELL_PIXELS * len(source), CELL_PIXELS * len(target)
    width, height = left + map_width + 4, top + map_height + 4
    parts = [
        f'<image class="large" href="{address}" x="{left}" y="{top}" width="{map_width}" '
        f'height="{map_height}" preserveAspectRatio="none"/>',
        f'<rect class="frame" x="{left}" y="{top}" width="{map_width}" height="{map_height}"/>',
    ]
    for i, piece in enumerate(source):
        x = left + CELL_PIXELS * i + CELL_PIXELS / 2 + 4
        parts.append(
            f'<text class="piece" transform="translate({x} {top - 5}) rotate(-90)">{display_token(piece)}</text>'
        )
    for i, piece in enumerate(target):
        y = top + CELL_PIXELS * i + CELL_PIXELS / 2 + 4
        parts.append(f'<text class="piece end" x="{left - 5}" y="{y}">{display_token(piece)}</text>')
    size = f'width="{width}" viewBox="0 0 {width} {height}" style="min-width: {MIN_SCALE * width:.0f}px"'
    return f'<svg class="heat" {size} role="img">{"".join(parts)}</svg>'


def display_token(piece: str) -> str:
    """A subword token with a dot for the space before it, which shows where a word begins."""
    return html.escape(piece.replace(SPACE, "·"))


def png_data_uri(weights_TS: np.ndarray) -> str:
    """A PNG as a data URI, with a pixel of COLOR for each weight, whose opacity is the weight."""
    T, S = weights_TS.shape
    pixels = np.empty((T, S, 4), np.uint8)
    pixels[..., :3] = COLOR
    pixels[..., 3] = np.rint(np.clip(weights_TS, 0, 1) * 255)
    lines = np.concatenate([np.zeros((T, 1), np.uint8), pixels.reshape(T, 4 * S)], axis=1)  # each begins with filter 0
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        _png_chunk(kind, data)
        for kind, data in (
            (b"IHDR", struct.pack(">IIBBBBB", S, T, 8, 6, 0, 0, 0)),
            (b"IDAT", zlib.compress(lines.tobytes(), 9)),
            (b"IEND", b""),
        )
    )
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
