"""The benchmark's keys, and that its figures are of real tokens."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import ROOT, small_config
from transformer import benchmark
from transformer.data.batching import Batch

SIZES = [
    *("family", "dtype", "emb_dim", "mlp_dim", "num_layers", "encoder_layers", "decoder_layers", "num_heads"),
    *("vocab_size", "batch_tokens"),
]
SPEED = [
    "params",
    "target_tokens_per_s",
    "step_ms",
    "flops_per_step",
    "flops_per_s",
    "compile_s",
    "peak_memory_mb",
    "device",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "keys"),
    [
        ([], SPEED),
        (
            ["--input", "--config.data.subword_dropout=0.3"],
            ["input_target_tokens_per_s", "subword_dropout_fallback_share"],
        ),
    ],
)
def test_it_prints_the_documented_keys(tmp_path, flags, keys):
    words = ["red", "green", "blue", "old", "new", "house", "tree"]
    rng = np.random.default_rng(0)
    for side in ("en", "de"):
        lines = (" ".join(rng.choice(words, rng.integers(2, 9))) for _ in range(200))
        (tmp_path / f"train.{side}").write_text("".join(f"{line}\n" for line in lines))
    overrides = [
        *("model.num_layers=1", "model.emb_dim=16", "model.mlp_dim=16", "train.batch_tokens=256", "mesh.data=1"),
        *("data.num_buckets=2", "data.vocab_size=285", f"data.dir={tmp_path}", f"data.data_dir={tmp_path}/prepared"),
    ]
    command = [sys.executable, "-m", "transformer.benchmark", "--config=configs/text.py", "--num_steps=10", *flags]
    command += [f"--config.{override}" for override in overrides]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    row = json.loads(result.stdout.splitlines()[-1])
    assert list(row) == [*keys, *SIZES]
    assert all(row[key] > 0 for key in keys if key not in ("device", "subword_dropout_fallback_share"))
    assert 0 <= row.get("subword_dropout_fallback_share", 0) < 0.05
    assert [row[key] for key in SIZES] == ["attention", "float32", 16, 16, 1, 1, 1, 4, 285, 256]


def test_heads_are_those_of_attention_alone():
    assert benchmark.sizes(small_config(model={"family": "recurrent", "num_heads": 8, "mlp_dim": 2048}), 300) == {
        "family": "recurrent",
        "dtype": "float32",
        "emb_dim": 16,
        "mlp_dim": None,
        "num_layers": 2,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "num_heads": None,
        "vocab_size": 300,
        "batch_tokens": 256,
    }


def test_padding_is_not_counted():
    batch = Batch(np.ones((2, 3), np.int32), np.array([[5, 6, 2], [7, 2, 0]], np.int32))
    assert benchmark.real_tokens(batch) == 5
