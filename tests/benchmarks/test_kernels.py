"""`pytest --benchmark-only tests/benchmarks`: every loss by every implementation, in groups.

Times forward and backward together. On the CPU at the sizes of the pocket VLM and of a language
model that a CPU can hold; on CUDA at InternVL3-1B's too. Ratios are read within a group.
"""

import pytest
import torch

from bench.peers import OPERATIONS, Inputs, peers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SHAPES = [(512, 128, 1088), (128, 512, 32_000)]  # rows, hidden, vocabulary
if DEVICE == "cuda":
    SHAPES.append((512, 896, 151_674))
NAMES = ("ours", "eager", "eager_shared", "eager_functional", "compile", "compile_functional",
         "torch_linear_cross_entropy", "liger", "liger_one_chunk", "cce")  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("implementation", NAMES)
def test_loss(benchmark, implementation, operation, shape):
    found, missing = peers(DEVICE)
    if implementation not in found:
        pytest.skip(missing[implementation])
    if operation not in found[implementation]:
        pytest.skip(f"{implementation} has no {operation}")
    torch.compiler.reset()
    inputs = Inputs.random(*shape, DTYPE, DEVICE)
    loss = found[implementation][operation]

    def step() -> None:
        loss(inputs).backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{operation} {shape}"
    benchmark.pedantic(step, rounds=7, warmup_rounds=2)
