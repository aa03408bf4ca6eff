"""Heat maps: the pixels are the weights, and every layer and head is there."""

import base64
import struct
import zlib

import numpy as np

from transformer.evaluation import heatmaps


def pixels(address):
    """What any PNG reader makes of it; filters other than 0 are not written."""
    data = base64.b64decode(address.removeprefix("data:image/png;base64,"))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    place, chunks = 8, {}
    while place < len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        body = data[place + 4 : place + 8 + length]
        assert struct.unpack(">I", data[place + 8 + length : place + 12 + length])[0] == zlib.crc32(body)
        chunks[body[:4]] = body[4:]
        place += 12 + length
    width, height, depth, colours = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert (depth, colours) == (8, 6)
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + 4 * width)
    assert not lines[:, 0].any()
    return lines[:, 1:].reshape(height, width, 4)


def test_a_pixel_is_as_opaque_as_its_weight():
    weights = np.array([[0.0, 1.0, 0.5], [0.25, 0.25, 1.2]], np.float32)
    result = pixels(heatmaps.png_data_uri(weights))
    np.testing.assert_array_equal(result[..., 3], [[0, 255, 128], [64, 64, 255]])
    assert (result[..., :3] == heatmaps.COLOR).all()


def test_each_layer_and_head_has_a_map_and_each_piece_a_label():
    weights = np.random.default_rng(0).dirichlet(np.ones(4), (3, 2, 5)).astype(np.float32)
    source, target = ["▁the", "▁c<t", "▁", "</s>"], ["▁die", "▁Kat", "ze", ".", "</s>"]
    page = heatmaps.attention_heatmaps("sentence 1", weights, source, target, layer=2)
    assert page.count('<button type="button" class="map"') == 3 * (2 + 1)
    for layer in (1, 2, 3):
        assert all(f'title="layer {layer}, head {head}"' in page for head in (1, 2))
    assert page.count('aria-pressed="true"') == 1
    assert page.count('class="piece"') == 4
    assert page.count('class="piece end"') == 5
    assert "c&lt;t" in page
    assert "c<t" not in page
    assert ">·die<" in page
    assert ">ze<" in page
    assert ">·<" in page
    assert heatmaps.png_data_uri(weights[1].mean(0)) in page
