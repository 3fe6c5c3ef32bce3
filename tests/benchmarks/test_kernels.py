"""Time every loss in every implementation: `pytest --benchmark-only tests/benchmarks`.

It measures forward, backward and both, at the shapes of `python -m bench run kernels`. The extra
information of `both` has the peak memory. Compare times only within a group. Everything takes an
hour on two cores; select with -k, for example `-k "vitask and pocket and both"`.
"""

import pytest
import torch

from bench.machine.kernels import CPU_TARGET, LARGE, POCKET, shapes
from bench.machine.peers import OPERATIONS, Inputs, peers
from bench.machine.speed import peak_mib

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("ours", "eager", "eager_shared", "eager_functional", "compile", "compile_functional",
         "torch_linear_cross_entropy", "liger", "liger_one_chunk", "liger_distillation",
         "liger_distillation_one_chunk", "cce")  # fmt: skip
PLACES = {POCKET: "pocket", CPU_TARGET: "mid"} | {shape: name for name, shape in LARGE.items()}


def named(shape):
    _, rows, hidden, vocab = shape
    return f"{PLACES[hidden, vocab]} {rows} rows"


@pytest.mark.parametrize("which", ["forward", "backward", "both"])
@pytest.mark.parametrize("shape", list(shapes(DEVICE)), ids=named)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("implementation", NAMES)
def test_loss(benchmark, implementation, operation, shape, which):
    found, missing = peers(DEVICE)
    if implementation not in found:
        pytest.skip(missing[implementation])
    if operation not in found[implementation]:
        pytest.skip(f"{implementation} has no {operation}")
    torch.compiler.reset()
    dtype, *sizes = shape
    inputs = Inputs.random(*sizes, dtype, DEVICE)
    loss = found[implementation][operation]

    def forward():
        value = loss(inputs)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return value

    def backward(value):
        value.backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    def both():
        backward(forward())

    benchmark.group = f"{operation}, {named(shape)}, {which}"
    often = {"rounds": 5, "warmup_rounds": 1}
    if which == "backward":
        benchmark.pedantic(backward, setup=lambda: ((forward(),), {}), **often)
    else:
        benchmark.pedantic(forward if which == "forward" else both, **often)
    if which == "both":
        benchmark.extra_info["peak_mib"] = peak_mib(both, DEVICE)
