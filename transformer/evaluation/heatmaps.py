"""Heat maps of attention as HTML: one large and labelled, and a small one for each layer and head to choose from.

L layers, H heads, T target tokens, S source tokens.
"""

import base64
import html
import struct
import zlib
from collections.abc import Sequence

import numpy as np

from transformer.data.tokenizer import SPACE

COLOUR = (42, 111, 219)
CELL = 18  # pixels


def sentence_maps(
    title: str, weights_LHTS: np.ndarray, source: Sequence[str], target: Sequence[str], layer: int
) -> str:
    """The maps of one sentence.

    Args:
      source, target: pieces, as SentencePiece writes them.
      layer: whose mean over heads is shown large at first, counted from 1.
    """
    means_LTS = weights_LHTS.mean(1)
    first = image(means_LTS[layer - 1])
    rows = []
    for i, heads_HTS in enumerate(weights_LHTS):
        cells = [_small(image(means_LTS[i]), f"layer {i + 1}, mean of heads", "mean", i + 1 == layer)]
        cells += [_small(image(h), f"layer {i + 1}, head {j + 1}", f"head {j + 1}") for j, h in enumerate(heads_HTS)]
        rows.append(f'<div class="layer"><span class="layer-name">layer {i + 1}</span>{"".join(cells)}</div>')
    return (
        f'<section class="attention"><h3>{html.escape(title)}</h3>'
        f'<p class="shown">layer {layer}, mean of heads</p>'
        f'<div class="scroll">{_large(first, source, target)}</div><div class="scroll">{"".join(rows)}</div></section>'
    )


def _small(address: str, title: str, name: str, is_shown: bool = False) -> str:
    return (
        f'<button type="button" class="map" title="{title}" aria-pressed="{str(is_shown).lower()}">'
        f'<img src="{address}" alt="attention of {title}"><span>{name}</span></button>'
    )


def _large(address: str, source: Sequence[str], target: Sequence[str]) -> str:
    """Source pieces above, target pieces to the left, a cell for each pair."""
    left, top = (10 + 7 * max((len(piece) for piece in pieces), default=0) for pieces in (target, source))
    width, height = left + CELL * len(source) + 4, top + CELL * len(target) + 4
    parts = [
        f'<image class="large" href="{address}" x="{left}" y="{top}" width="{CELL * len(source)}" '
        f'height="{CELL * len(target)}" preserveAspectRatio="none"/>',
        f'<rect class="frame" x="{left}" y="{top}" width="{CELL * len(source)}" height="{CELL * len(target)}"/>',
    ]
    for i, piece in enumerate(source):
        x = left + CELL * i + CELL / 2 + 4
        parts.append(f'<text class="piece" transform="translate({x} {top - 5}) rotate(-90)">{shown(piece)}</text>')
    for i, piece in enumerate(target):
        y = top + CELL * i + CELL / 2 + 4
        parts.append(f'<text class="piece end" x="{left - 5}" y="{y}">{shown(piece)}</text>')
    return f'<svg class="heat" width="{width}" height="{height}" role="img">{"".join(parts)}</svg>'


def shown(piece: str) -> str:
    """A piece for people: its space as ␣ only where nothing else is in it."""
    return html.escape(piece.replace(SPACE, " ").strip() or "␣")


def image(weights_TS: np.ndarray) -> str:
    """A PNG with a pixel for each weight, as an address: COLOUR, as opaque as the weight, for any background."""
    T, S = weights_TS.shape
    pixels = np.empty((T, S, 4), np.uint8)
    pixels[..., :3] = COLOUR
    pixels[..., 3] = np.rint(np.clip(weights_TS, 0, 1) * 255)
    lines = np.concatenate([np.zeros((T, 1), np.uint8), pixels.reshape(T, 4 * S)], axis=1)  # each begins with filter 0
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        _chunk(kind, data)
        for kind, data in (
            (b"IHDR", struct.pack(">IIBBBBB", S, T, 8, 6, 0, 0, 0)),
            (b"IDAT", zlib.compress(lines.tobytes(), 9)),
            (b"IEND", b""),
        )
    )
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
