"""Machine suites: clock, memory, peers, and the files that they write."""

import json
import subprocess
import sys
from itertools import count
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.machine import kernels, peers, speed, step
from bench.machine.tables import run_machine_suite
from bench.suite import MACHINE_SUITES, machine_suite
from vitask.memory import Held

ROOT = Path(__file__).parents[2]
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


@given(st.lists(st.floats(0.1, 1e6), min_size=1, max_size=40))
def test_quantiles_surround_the_median(samples):
    value, low, high = speed.Spread.of(samples)
    assert min(samples) <= low <= value * (1 + 1e-12)
    assert value <= high * (1 + 1e-12)
    assert high <= max(samples) * (1 + 1e-12)


def test_variants_take_turns_and_the_first_round_is_not_kept():
    order, number = [], count()

    def variant(name):
        def call():
            order.append(name)
            return [float(next(number))]

        return call

    found = speed.interleaved(
        {"a": variant("a"), "b": variant("b")}, rounds=(2, 3), budget_seconds=0
    )
    assert order == ["a", "b"] * 3
    assert found == {"a": [[2.0], [4.0]], "b": [[3.0], [5.0]]}


def test_peak_memory_of_a_call():
    def call():
        first = torch.zeros(2**20, device=DEVICE)  # 4 MiB
        second = first + 1
        del first
        return second.sum().item()

    assert speed.peak_mib(call, DEVICE) == pytest.approx(8, rel=0.1)


def test_memory_of_long_work_excludes_memory_held_before():
    kept = torch.ones(2**24, device=DEVICE)  # 64 MiB, held before
    with Held() as held:
        work = kept + 1
        work = work * 2  # old and new at once: 128 MiB
    assert held.mib == pytest.approx(128, rel=0.1)
    freed = torch.ones(2**24, device=DEVICE)
    del freed, work
    with Held() as held:
        again = kept + 1  # reuses the freed memory
    assert held.mib == pytest.approx(64, rel=0.1)
    assert again.sum() > 0


@pytest.mark.parametrize("implementation", ["ours", "eager", "eager_shared", "eager_functional"])
@pytest.mark.parametrize("operation", peers.OPERATIONS)
def test_implementations_compute_the_same_loss_and_gradient(implementation, operation):
    inputs = peers.Inputs.random(9, 8, 50, torch.float32, "cpu")
    assert all(branch.is_leaf for branch in inputs[:3])  # none is part of another's graph
    found = peers.peers("cpu")[0][implementation][operation]
    value, gradient = kernels._with_gradient(found, inputs)
    truth, expected = kernels._with_gradient(peers.REFERENCE[operation], inputs)
    torch.testing.assert_close(value, truth, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_every_peer_is_found_or_missing_with_a_reason():
    found, missing = peers.peers(DEVICE)
    assert not set(found) & set(missing)
    named = {
        "ours", "eager", "eager_shared", "eager_functional", "compile", "compile_functional",
        "torch_linear_cross_entropy", "liger", "liger_one_chunk", "liger_distillation",
        "liger_distillation_one_chunk", "cce",
    }  # fmt: skip
    assert set(found) | set(missing) == named
    assert all(missing.values())


@pytest.fixture
def quick(monkeypatch):
    """Suites at sizes that take milliseconds, two rounds."""
    monkeypatch.setattr(
        speed.interleaved, "__kwdefaults__", {"rounds": (2, 2), "budget_seconds": 0}
    )
    dtype = torch.bfloat16 if CUDA else torch.float32
    monkeypatch.setattr(kernels, "shapes", lambda device: [(dtype, 8, 16, 40)])
    real = peers.peers

    def without_compiling(device):
        found, missing = real(device)
        for name in ("compile", "compile_functional"):
            found.pop(name, None)
        return found, missing | {"compile": "left out of this test"}

    monkeypatch.setattr(kernels, "peers", without_compiling)
    monkeypatch.setattr(step, "ON", {DEVICE: (("tiny", 2),)})
    monkeypatch.setitem(step.SHAPES, "tiny", step.Shape("qwen2", 16, 16, 1, 2, 1, 64, 3))


@pytest.mark.parametrize("name", MACHINE_SUITES)
def test_a_machine_suite_writes_its_three_files(name, quick, tmp_path):
    said = []
    written = run_machine_suite(name, tmp_path, command="python -m bench", note=said.append)
    table, page, stamp = written
    assert {path.suffix for path in written} == {".csv", ".md", ".json"}
    assert sorted(table.parent.iterdir()) == sorted(written)
    assert table.stem == speed.slug(speed.device_name())
    columns = machine_suite(name).columns
    assert table.read_text().splitlines()[0] == ",".join(columns)
    frame = pd.read_csv(table)
    spread = frame[frame.low.notna()]
    assert (spread.low <= spread.value * 1.001).all()
    assert (spread.value <= spread.high * 1.001).all()
    assert (frame.value > 0).all()
    noted = json.loads(stamp.read_text())
    assert {"torch", "triton"} <= set(noted["versions"])
    assert noted["commit"]
    if not CUDA:
        assert "not measured" in noted["missing"]["CUDA"]
        assert any(reached is None for *_, reached in noted["targets"])
        assert "not measured" in page.read_text()
    assert said


def test_a_trace_is_written_on_request(quick, tmp_path):
    trace = tmp_path / "trace.json"
    list(step.measure(DEVICE, lambda text: None, trace))
    assert json.loads(trace.read_text())["traceEvents"]
    with pytest.raises(ValueError, match="goes with the suite step"):
        list(kernels.measure(DEVICE, lambda text: None, trace))


@pytest.mark.parametrize("short", [True, False])
def test_short_losses_run_twice_per_turn_and_report_both_times(short, monkeypatch):
    few = {"rounds": (3, 3), "budget_seconds": 0}
    monkeypatch.setattr(speed.interleaved, "__kwdefaults__", few)
    monkeypatch.setattr(kernels, "SHORT", 1e9 if short else 0)
    sets = peers.Inputs.random(4, 8, 20, torch.float32, "cpu").redrawn(2)
    seen = []

    def loss(inputs):
        seen.append(inputs is sets[0])
        return peers.OURS["rda"](inputs)

    rows = list(kernels.compare({"ours": loss}, "rda", sets, "cpu", {}))
    calls = (1 + 3 + 2) * (2 if short else 1)  # to warm up, rounds, memory
    assert seen == [number % 2 == 0 for number in range(calls)]
    cold = [row for row in rows if row["quantity"] == "milliseconds_cold"]
    assert len(cold) == short
    assert all(row["pass"] == "both" and row["low"] <= row["value"] <= row["high"] for row in cold)


def test_a_failing_peer_is_named_and_the_others_still_run(monkeypatch):
    def broken(inputs):
        raise torch.OutOfMemoryError("no room\nfor details")

    few = {"rounds": (2, 2), "budget_seconds": 0}
    monkeypatch.setattr(speed.interleaved, "__kwdefaults__", few)
    inputs = peers.Inputs.random(4, 8, 20, torch.float32, "cpu")
    losses = {"ours": peers.OURS["rda"], "theirs": broken}
    failed = {}
    rows = list(kernels.compare(losses, "rda", [inputs], "cpu", failed))
    assert {row["implementation"] for row in rows} == {"ours"}
    assert failed == {"theirs": "OutOfMemoryError: no room"}


def test_columns_are_fixed():
    assert ",".join(kernels.COLUMNS) == (
        "device,dtype,operation,implementation,rows,hidden,vocab,pass,quantity,value,low,high"
    )
    assert ",".join(step.COLUMNS) == "device,dtype,shape,batch,variant,quantity,value,low,high"


def test_token_counts_match_the_tokens_that_the_model_reads(quick):
    bench = step.Bench(step.SHAPES["tiny"], 2, torch.float32, "cpu")
    read: list[int] = []
    inner = bench.vlm.model.model.language_model
    inner.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["inputs_embeds"][..., 0].numel()),
        with_kwargs=True,
    )
    for name, variant in bench.variants().items():
        read.clear()
        variant()
        assert sum(read) == bench.tokens()[name], name


def test_kernels_suite_imports_without_the_data_libraries():
    blocked = ("medmnist", "timm", "sklearn", "accelerate", "peft", "transformers")
    code = (
        f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
        "import bench.machine.kernels, bench.machine.tables\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
