"""Compares one LSTM layer, forward and backward, with that of PyTorch on the same CPU.

    python -m benchmarks.recurrence_speed [--batch=64] [--length=32] [--width=512] [--torch=PYTHON]

PyTorch is not a dependency: --torch names the Python of an environment that has it, which runs in its own process.
Both are timed alternately, three times; the result is the median of the ratios. The last line of stdout is
one JSON object.
"""

import json
import statistics
import subprocess
import sys

from transformer.command_line import command_parser, positive_int, reexec_with_malloc_settings, run
from transformer.runtime import environment
from transformer.runtime.errors import UserError
from transformer.runtime.logging import log_info

TORCH = """
import statistics, sys, time, torch
batch, length, width, repeats, threads = map(int, sys.argv[1:])
torch.set_num_threads(threads)
layer = torch.nn.LSTM(width, width, batch_first=True)
x = torch.randn(batch, length, width, requires_grad=True)
times = []
for _ in range(repeats + 2):
    layer.zero_grad()
    x.grad = None
    start = time.perf_counter()
    layer(x)[0].sum().backward()
    times.append(time.perf_counter() - start)
print(1000 * statistics.median(times[2:]))
"""
REPEATS = 15


def main(argv: list[str]) -> None:
    """Parses the flags, measures alternately and prints."""
    parser = command_parser("python -m benchmarks.recurrence_speed", __doc__)
    parser.add_argument("--batch", type=positive_int, default=64, help="sentences")
    parser.add_argument("--length", type=positive_int, default=32, help="steps")
    parser.add_argument("--width", type=positive_int, default=512, help="of input and state")
    parser.add_argument("--torch", default=sys.executable, help="a Python that has PyTorch (default: this one)")
    args = parser.parse_args(argv[1:])
    sizes = [args.batch, args.length, args.width]
    rows = []
    for _ in range(3):
        rows.append((ours_ms(*sizes), torch_ms(args.torch, sizes)))
        log_info(
            f"ours {rows[-1][0]:.1f} ms, PyTorch {rows[-1][1]:.1f} ms: {rows[-1][1] / rows[-1][0]:.2f} of its speed"
        )
    ratio = statistics.median(torch / own for own, torch in rows)
    print(json.dumps({"ours_ms": [r[0] for r in rows], "torch_ms": [r[1] for r in rows], "speed": round(ratio, 2)}))


def ours_ms(batch: int, length: int, width: int) -> float:
    """Median milliseconds of one forward and backward pass."""
    import jax

    from benchmarks.timing import seconds_of
    from transformer.models.lstm import LstmWeights, lstm

    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (batch, length, width))
    input_kernel, recurrent_kernel = (jax.random.normal(key, (width, 4 * width)) * width**-0.5 for key in keys[1:])
    weights = LstmWeights(input_kernel, recurrent_kernel, jax.numpy.zeros(4 * width))
    gradient = jax.jit(jax.grad(lambda weights, x: lstm(x, weights).sum(), (0, 1)))
    times = [seconds_of(gradient, weights, x) for _ in range(REPEATS + 2)]
    return 1000 * statistics.median(times[2:])


def torch_ms(python: str, sizes: list[int]) -> float:
    """Median milliseconds of torch.nn.LSTM with a thread for each core."""
    numbers = [str(number) for number in (*sizes, REPEATS, environment.available_cpus())]
    process = subprocess.run([python, "-c", TORCH, *numbers], capture_output=True, text=True)
    if process.returncode:
        last = (process.stderr.strip().splitlines() or [""])[-1]
        raise UserError(f"--torch={python}: expected a Python that has PyTorch, got: {last}")
    return float(process.stdout)


if __name__ == "__main__":
    reexec_with_malloc_settings()
    run(main)
