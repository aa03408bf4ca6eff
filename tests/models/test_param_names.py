"""Names and shapes of params are part of the checkpoint format: a change here breaks old checkpoints."""

import pytest
from flax import nnx

from transformer.config import ModelConfig
from transformer.models.registry import ModelDef

SIZES = {"emb_dim": 8, "num_heads": 2, "qkv_dim": 8, "value_dim": 16, "mlp_dim": 32, "max_positions": 6}
EMBEDDINGS = "embeddings/source/table 20x8 embeddings/target/table 20x8 embeddings/output/table 20x8"
NORM = "{0}/scale 8 {0}/bias 8"
ATTENTION = "{0}/query 8x2x4 {0}/key 8x2x4 {0}/value 8x2x8 {0}/out 2x8x8"
MLP = "{0}/kernel_in 8x32 {0}/bias_in 32 {0}/kernel_out 32x8 {0}/bias_out 8"
ENCODER_LAYER = [
    (ATTENTION, "encoder/0/attention"),
    (NORM, "encoder/0/attention_residual/norm"),
    (MLP, "encoder/0/mlp"),
    (NORM, "encoder/0/mlp_residual/norm"),
]
DECODER_LAYER = [
    *((text, name.replace("encoder", "decoder")) for text, name in ENCODER_LAYER),
    (ATTENTION, "decoder/0/cross"),
    (NORM, "decoder/0/cross_residual/norm"),
]
TRANSFORMER = [*ENCODER_LAYER, *DECODER_LAYER]
ATTENTIONS = ("encoder/0/attention", "decoder/0/attention", "decoder/0/cross")
QK_NORM = "{0}/query_norm/scale 4 {0}/key_norm/scale 4"
GATE = "{0}/kernel_gate 8x32 {0}/bias_gate 32"
LSTM = "{0}/kernel_in 8x{2} {0}/kernel_state {1}x{2} {0}/bias {2}"


def described(entries):
    words = " ".join(text.format(*names) for text, *names in entries).split()
    return dict(zip(words[::2], words[1::2], strict=True))


@pytest.mark.parametrize(
    ("fields", "entries"),
    [
        ({"norm": "post"}, TRANSFORMER),
        (
            {"norm": "pre", "qk_norm": True, "positions": "learned", "activation": "swiglu"},
            [
                *TRANSFORMER,
                (NORM, "encoder_norm"),
                (NORM, "decoder_norm"),
                *((QK_NORM, name) for name in ATTENTIONS),
                (GATE, "encoder/0/mlp"),
                (GATE, "decoder/0/mlp"),
                ("source_positions 6x8 target_positions 6x8",),
            ],
        ),
        (
            {"family": "recurrent"},
            [
                (LSTM, "forward", 4, 16),
                (LSTM, "backward", 4, 16),
                (LSTM, "lowest", 8, 32),
                ("attention/query 8x8 attention/key 8x8 out 16x8",),
            ],
        ),
        (
            {"family": "convolutional", "positions": "learned"},
            [
                ("{0}/kernel 3x8x16 {0}/bias 16", "encoder/0/convolution"),
                ("{0}/kernel 3x8x16 {0}/bias 16", "decoder/0/convolution"),
                ("decoder/0/attention/query 8x8 decoder/0/attention/key 8x8 decoder/0/out 8x8",),
                ("source_positions 6x8 target_positions 6x8",),
            ],
        ),
    ],
)
def test_params_have_the_names_of_old_checkpoints(fields, entries):
    model = ModelDef(ModelConfig(num_layers=1, share_embeddings=False, **SIZES, **fields), 20)
    shapes = {
        "/".join(map(str, path)): "x".join(map(str, param.shape))
        for path, param in nnx.to_flat_state(model.abstract_params)
    }
    assert shapes == described([(EMBEDDINGS,), *entries])
    shared = ModelDef(ModelConfig(num_layers=1, share_embeddings=True, **SIZES, **fields), 20)
    assert list(shared.abstract_params["embeddings"]) == ["shared"]
