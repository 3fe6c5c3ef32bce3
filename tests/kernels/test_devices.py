"""The Triton kernels on GPUs: compiled for several, run on one if it is present."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import linear_vitask
from tests.kernels.cases import assert_as_good_as_torch, draw, run

ROOT = Path(__file__).parents[2]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
# InternVL2-2B and InternVL3-1B: hidden, vocabulary
SHAPES = pytest.mark.parametrize("shape", [(2048, 92_553), (896, 151_674)], ids=["2B", "1B"])


TARGETS = pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
Usage = dict[str, dict[str, dict[str, int]]]


def compile_all(cache: Path, *arguments: str) -> Usage:
    """The `usage` of every kernel on every target."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.kernels.compiled", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Usage:
    return compile_all(tmp_path_factory.mktemp("triton"))


@pytest.fixture(scope="module")
def oversized(tmp_path_factory) -> Usage:
    return compile_all(tmp_path_factory.mktemp("triton"), "oversized")


@pytest.mark.long
@TARGETS
def test_spilled_registers_are_detected(target, oversized):
    assert oversized[target]["statistics"]["spilled"] > 0


@TARGETS
def test_kernels_compile_without_spilling_registers(target, compiled):
    usage = compiled[target]
    assert len(usage) == 16
    assert {name: u for name, u in usage.items() if u["spilled"]} == {}
    assert all(u["registers"] > 0 for u in usage.values())


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_logits_are_read_and_gradients_written_in_vectors_at_any_vocabulary(target, compiled):
    usage = compiled[target]
    assert usage["statistics"]["vector loads"] >= 6  # 8 logits per thread in three branches
    writing = [name for name in usage if name.startswith("gradient") and "alone" not in name]
    for name in writing:
        assert usage[name]["vector loads"] >= 6, name
        assert usage[name]["vector stores"] >= 2, name


@needs_cuda
@SHAPES
@pytest.mark.parametrize("rows", [1, 37, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_errors_are_at_most_twice_torchs_at_the_size_of_large_models(shape, rows, dtype):
    hidden, vocab = shape
    case = draw(rows, vocab, hidden, dtype=dtype, negatives=0.75, ignored=0.1)
    assert_as_good_as_torch(case.to("cuda"), None)


@needs_cuda
@SHAPES
def test_graph_capture_replays_a_step(shape):
    hidden, vocab = shape
    case = draw(64, vocab, hidden, dtype=torch.bfloat16, negatives=0.5).to("cuda")
    leaves = [case.hidden, case.exemplar, case.negative]

    def step() -> list[torch.Tensor]:
        inputs = [leaf.detach().requires_grad_() for leaf in leaves]
        loss = linear_vitask(
            inputs[0], case.weight, case.labels, exemplar_hidden=inputs[1],
            negative_hidden=inputs[2], negative_rows=case.negative_rows,
        ).total  # fmt: skip
        return [loss, *torch.autograd.grad(loss, inputs)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for leaf in leaves:  # other inputs at the same addresses
        leaf.copy_(torch.randn_like(leaf))
    graph.replay()
    for replayed, fresh in zip(captured, step(), strict=True):
        assert torch.equal(replayed, fresh)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("trained_head", [False, True], ids=["frozen head", "trained head"])
def test_step_does_not_wait_for_the_device(dtype, reduction, trained_head):
    case = draw(64, 1000, 32, dtype=dtype, negatives=0.5).to("cuda")
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_(trained_head)
    above = torch.ones((64,) if reduction == "none" else (), device="cuda")
    try:
        torch.cuda.set_sync_debug_mode("error")
        linear_vitask(
            hidden, weight, case.labels, exemplar_hidden=case.exemplar, reduction=reduction,
            negative_hidden=case.negative, negative_rows=case.negative_rows,
        ).total.backward(above)  # fmt: skip
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize("rows", [64, 512])  # several programs per row, and one
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_run_gives_the_same_bits_at_a_whole_vocabulary(rows, reduction):
    case = draw(rows, 92_553, 64, dtype=torch.bfloat16, negatives=0.5, reduction=reduction)
    first, second = (run(case.to("cuda"), None).values for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@needs_cuda
def test_compiled_step_equals_the_eager_one():
    case = draw(64, 5003, 32, dtype=torch.bfloat16).to("cuda")

    def step(hidden: torch.Tensor) -> torch.Tensor:
        return linear_vitask(
            hidden, case.weight, case.labels, exemplar_hidden=case.exemplar,
            negative_hidden=case.negative,
        ).total  # fmt: skip

    gradients = []
    for function in (step, torch.compile(step, fullgraph=True)):
        hidden = case.hidden.detach().requires_grad_()
        function(hidden).backward()
        gradients.append(hidden.grad)
    assert torch.equal(*gradients)


@needs_cuda
def test_memory_beyond_the_inputs_is_one_copy_of_the_logits():
    rows, vocab, width = 512, 92_553, 256
    case = draw(rows, vocab, width, dtype=torch.bfloat16).to("cuda")
    hidden = case.hidden.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_vitask(
        hidden, case.weight, case.labels, exemplar_hidden=case.exemplar,
        negative_hidden=case.negative,
    ).total.backward()  # fmt: skip
    logits = 3 * rows * (vocab + 64) * 4
    assert torch.cuda.max_memory_allocated() - before < 1.1 * logits
