"""The training step of a Transformer in PyTorch, to measure beside ours: the same sizes, batch and arithmetic.

    python benchmarks/torch_transformer.py --emb_dim=1024 --mlp_dim=4096 --num_heads=16 --dropout_rate=0.3

It imports nothing of this project, so that any Python with PyTorch runs it. It has every advantage: torch.compile,
flash attention, autocast to bfloat16, fused Adam, no padding mask, and one batch that stays on the device. The last
line of stdout is one JSON object; the median of three rounds.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PAD, BOS, WORDS = 0, 1, 4
EPSILON = 1e-6  # of LayerNorm


class Attention(nn.Module):
    """Multi-head attention without biases."""

    def __init__(self, emb_dim: int, num_heads: int, is_cross: bool):
        super().__init__()
        self.num_heads, self.is_cross = num_heads, is_cross
        if is_cross:
            self.query, self.key_value = (
                nn.Linear(emb_dim, emb_dim, bias=False),
                nn.Linear(emb_dim, 2 * emb_dim, bias=False),
            )
        else:
            self.query_key_value = nn.Linear(emb_dim, 3 * emb_dim, bias=False)
        self.out = nn.Linear(emb_dim, emb_dim, bias=False)

    def forward(self, x: Tensor, memory: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if self.is_cross:
            qkv = (self.query(x), *self.key_value(memory).chunk(2, -1))
        else:
            qkv = self.query_key_value(x).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in qkv)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        return self.out(attended.transpose(1, 2).flatten(-2))


class Layer(nn.Module):
    """Post-norm, of the encoder or of the decoder."""

    def __init__(self, sizes: argparse.Namespace, is_decoder: bool):
        super().__init__()
        self.dropout_rate, self.is_decoder = sizes.dropout_rate, is_decoder
        self.attention = Attention(sizes.emb_dim, sizes.num_heads, is_cross=False)
        self.cross = Attention(sizes.emb_dim, sizes.num_heads, is_cross=True) if is_decoder else None
        self.mlp = nn.Sequential(
            nn.Linear(sizes.emb_dim, sizes.mlp_dim), nn.ReLU(), nn.Linear(sizes.mlp_dim, sizes.emb_dim)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(sizes.emb_dim, eps=EPSILON) for _ in range(3 if is_decoder else 2))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        x = self.norms[0](x + self.dropout(self.attention(x, is_causal=self.is_decoder)))
        if self.cross is not None:
            x = self.norms[1](x + self.dropout(self.cross(x, memory)))
        return self.norms[-1](x + self.dropout(self.mlp(x)))

    def dropout(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout_rate, self.training)


class Transformer(nn.Module):
    """Encoder and decoder with one embedding, which is the output's too; returns the loss."""

    def __init__(self, sizes: argparse.Namespace):
        super().__init__()
        self.sizes = sizes
        self.embedding = nn.Embedding(sizes.vocab_size, sizes.emb_dim)
        nn.init.normal_(self.embedding.weight, std=sizes.emb_dim**-0.5)
        self.encoder = nn.ModuleList(Layer(sizes, is_decoder=False) for _ in range(sizes.num_layers))
        self.decoder = nn.ModuleList(Layer(sizes, is_decoder=True) for _ in range(sizes.num_layers))
        rates = torch.exp(-torch.arange(0, sizes.emb_dim, 2) * (9.2103 / sizes.emb_dim))  # ln 10,000
        angles = torch.arange(sizes.length)[:, None] * rates[None]
        self.register_buffer("positions", torch.stack((angles.sin(), angles.cos()), -1).flatten(1))

    def embed(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) * self.sizes.emb_dim**0.5 + self.positions
        return F.dropout(x, self.sizes.dropout_rate, self.training)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory = self.embed(source)
        for layer in self.encoder:
            memory = layer(memory)
        x = self.embed(F.pad(target[:, :-1], (1, 0), value=BOS))
        for layer in self.decoder:
            x = layer(x, memory)
        logits = F.linear(x, self.embedding.weight).float().flatten(0, 1)
        return F.cross_entropy(logits, target.flatten(), ignore_index=PAD, label_smoothing=0.1)


def make_update(model: nn.Module, sizes: argparse.Namespace, device: str) -> Callable[[], Tensor]:
    """A training step on a batch of its own."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.98), eps=1e-9, fused=device == "cuda")
    shape = (sizes.rows, sizes.length)
    source, target = (torch.randint(WORDS, sizes.vocab_size, shape, device=device) for _ in range(2))
    program = torch.compile(model) if device == "cuda" else model

    def update() -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            loss = program(source, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return update


def seconds_of(update: Callable[[], Tensor], count: int) -> float:
    """Of so many updates; reading the last loss waits for all of them."""
    since = time.perf_counter()
    for _ in range(count):
        loss = update()
    loss.item()
    return time.perf_counter() - since


def kernels_of(update: Callable[[], Tensor], repeats: int) -> list[tuple[str, float, float]]:
    """Name, milliseconds and count of each kernel of an update on a GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        seconds_of(update, repeats)
    events = [(one.key, one.device_time_total / 1000 / repeats, one.count / repeats) for one in profile.key_averages()]
    return sorted(events, key=lambda event: -event[1])


def main() -> None:
    """Reads the flags, measures, prints."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/torch_transformer.py",
        description=(__doc__ or "").split("\n")[0],
        allow_abbrev=False,
    )
    defaults = {"num_layers": 6, "emb_dim": 512, "mlp_dim": 2048, "num_heads": 8, "vocab_size": 37_000}
    for name, value in {**defaults, "rows": 624, "length": 40, "num_steps": 20}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default: {value:,}")
    parser.add_argument("--dropout_rate", type=float, default=0.1)
    sizes = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = Transformer(sizes).to(device)
    update = make_update(model, sizes, device)
    compile_s = seconds_of(update, 3)
    rounds = [seconds_of(update, sizes.num_steps) / sizes.num_steps for _ in range(3)]
    step_s = statistics.median(rounds)
    row = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "params": sum(param.numel() for param in model.parameters()),
        "compile_s": round(compile_s, 1),
        "step_ms": round(1000 * step_s, 3),
        "rounds_ms": [round(1000 * seconds, 3) for seconds in rounds],
        "slots_per_s": round(sizes.rows * sizes.length / step_s),
        "peak_memory_mb": round(torch.cuda.max_memory_allocated() / 2**20) if device == "cuda" else None,
        "kernels": kernels_of(update, 3) if device == "cuda" else [],
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
