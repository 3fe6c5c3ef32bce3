"""Fused losses against those users might pick instead: milliseconds, memory, share of the limit.

The rows are hidden rows of response positions, and the head is frozen. `forward` runs with
gradients enabled, as in training; `both` is forward and backward. Ours computes its gradients in
the forward pass. `eager` makes logits for each loss, `eager_shared` once for all losses;
`eager_functional` also makes each log-softmax once and uses PyTorch's losses. `compile` and
`compile_functional` are the last two under torch.compile with static shapes.
share_of_limit is the time of the bare products (and, on CUDA, of one copy of the bytes that the row
kernels move) divided by the time of `both`; the products run in the same rounds. Successive calls
cycle through three sets of hidden rows and labels, the same for all implementations.
Losses of at most 1 GFLOP run twice in each turn: `milliseconds` is the second call and
`milliseconds_cold` the first, which meets the caches as the previous implementation left them.
Implementations that share most of their code, as all eager ones do, warm them for each other.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.machine.peers import OPERATIONS, REFERENCE, Inputs, Loss, peers
from bench.machine.speed import DTYPES, MIB, Clock, figure, interleaved, peak_mib
from bench.machine.tables import Aim, check
from bench.suite import MachineSuite, Measured
from kernels.cpu import project
from vitask.errors import InputError

COLUMNS = (
    "device", "dtype", "operation", "implementation", "rows", "hidden", "vocab", "pass",
    "quantity", "value", "low", "high",
)  # fmt: skip
LARGE = {"InternVL2-2B": (2048, 92_553), "InternVL3-1B": (896, 151_674)}  # hidden, vocabulary
POCKET = (128, 1088)
CPU_TARGET = (512, 32_000)
ROWS = (128, 512, 2048, 8192)
SETS = 3  # sets of hidden rows and labels, used in turn
SHORT = 1e9  # a loss whose products take at most so many FLOP runs twice in its turn
LIGER = ("liger", "liger_one_chunk", "liger_distillation", "liger_distillation_one_chunk")
PIECE = 2**30  # most bytes copied at once
WRONG = 0.1  # a relative error of loss or gradient above this marks an implementation as wrong


def shapes(device: str) -> Iterator[tuple[torch.dtype, int, int, int]]:
    """Yields dtype, rows, hidden, vocabulary."""
    dtype = DTYPES[device]
    for rows in ROWS:
        yield dtype, rows, *POCKET
    if device == "cpu":
        yield dtype, 512, *CPU_TARGET
    for hidden, vocab in LARGE.values():
        for rows in ROWS if device == "cuda" else (128,):
            yield dtype, rows, hidden, vocab


def measure(
    device: str, note: Callable[[str], None], trace: Path | None = None
) -> Iterator[Measured]:
    """Measures all operations at all shapes; yields the results so far after each shape."""
    if trace is not None:
        raise InputError("suite kernels writes no trace; --trace goes with the suite step")
    found, missing = peers(device)
    rows: list[dict[str, Any]] = []
    notes = {"relative error of the loss and of its gradient": errors(device)}
    for dtype, count, hidden, vocab in shapes(device):
        sets = Inputs.random(count, hidden, vocab, dtype, device).redrawn(SETS)
        for operation in OPERATIONS:
            flops, moved = work(operation, sets[0])
            note(f"kernels: {operation}, {count} rows, {hidden} hidden, {vocab} vocabulary")
            same = {
                "device": device,
                "dtype": str(dtype).removeprefix("torch."),
                "operation": operation,
                "rows": count,
                "hidden": hidden,
                "vocab": vocab,
                "caption": f"Limit: {flops / 1e9:.1f} GFLOP, {moved / MIB:.0f} MiB moved.",
            }
            mine = {name: peer[operation] for name, peer in found.items() if operation in peer}
            failed: dict[str, str] = {}
            rows += [same | row for row in compare(mine, operation, sets, device, failed)]
            for name, why in failed.items():
                missing[f"{name}: {operation}, {count} × {hidden} × {vocab}"] = why
        yield Measured(rows, missing, targets(rows), notes)


def compare(
    losses: dict[str, Loss],
    operation: str,
    sets: Sequence[Inputs],
    device: str,
    failed: dict[str, str],
) -> Iterator[dict[str, Any]]:
    """Rows of one operation at one shape; all implementations take turns with the bare limit.

    A peer that fails goes into `failed` with its reason, and the others still run; ours must run.
    """
    torch.compiler.reset()  # a graph per shape, as shapes are static
    clock = Clock(device)
    short = work(operation, sets[0])[0] <= SHORT

    def turn_of(once: Callable[[], list[float]]) -> Callable[[], list[float]]:
        return (lambda: once() + once()) if short else once

    def timed(loss: Loss) -> Callable[[], list[float]]:
        made: list[Tensor] = []
        turn = cycle(sets)

        def call() -> list[float]:
            made.clear()
            inputs = next(turn)
            for leaf in inputs[:3]:
                leaf.grad = None
            return clock(lambda: made.append(loss(inputs)), lambda: made[0].backward())

        return turn_of(call)

    calls = {name: timed(loss) for name, loss in losses.items()}
    for name in [name for name in calls if name != "ours"]:
        try:
            calls[name]()
        except Exception as error:  # whatever a peer raises
            first = (str(error).splitlines() or [""])[0]
            failed[name] = f"{type(error).__name__}: {first[:120]}"
            del calls[name]
    # The limit's tensors are made anew each round, so the losses have their memory in between.
    calls["limit"] = turn_of(lambda: clock(*limit(operation, sets[0], device)))
    samples = {name: np.array(rounds) for name, rounds in interleaved(calls).items()}
    bare = samples.pop("limit")
    limit_ms = np.median(bare[:, bare.shape[1] // 2 if short else 0 :].sum(axis=1))
    for name, passes in samples.items():
        both = passes[:, -2:].sum(axis=1)
        times = {"forward": passes[:, -2], "backward": passes[:, -1], "both": both}
        figures = [(which, figure("milliseconds", values)) for which, values in times.items()]
        figures.append(("both", figure("share_of_limit", limit_ms / np.median(both))))
        if short:
            figures.append(("both", figure("milliseconds_cold", passes[:, :2].sum(axis=1))))
        figures.append(("both", figure("peak_mib", peak_mib(calls[name], device))))
        yield from ({"implementation": name, "pass": which} | row for which, row in figures)


def products(operation: str, dtype: torch.dtype) -> tuple[int, int]:
    """How many products of hidden rows and head the loss needs, forward and backward."""
    # In float32 one product of the hidden difference gives the logits of CRT.
    crt = (1, 1) if dtype == torch.float32 else (2, 2)
    return {"cross_entropy": (1, 1), "rda": (2, 1), "crt": crt, "vitask": (3, 3)}[operation]


def work(operation: str, inputs: Inputs) -> tuple[float, float]:
    """FLOP of the products, and bytes that the row kernels move: two reads, one write."""
    rows, hidden = inputs.hidden.shape
    vocab = len(inputs.weight)
    forward, backward = products(operation, inputs.weight.dtype)
    flops = 2.0 * rows * hidden * vocab * (forward + backward)
    written = backward * inputs.weight.itemsize
    return flops, float(rows * vocab * (2 * 4 * forward + written))


def limit(operation: str, inputs: Inputs, device: str) -> list[Callable[[], object]]:
    """The bare products, and on CUDA a copy that moves as many bytes as the row kernels."""
    rows, vocab = len(inputs.hidden), len(inputs.weight)
    forward, backward = products(operation, inputs.weight.dtype)
    x = torch.cat([*inputs[:forward]]).detach()
    padded = -(-vocab // 64) * 64  # rows of odd length would miss the fast products
    gradient = torch.randn(backward * rows, padded, device=device).to(x.dtype)[:, :vocab]
    logits = torch.empty(forward * rows, padded, device=device)[:, :vocab]
    steps: list[Callable[[], object]] = [
        lambda: (
            project(x, inputs.weight, logits)  # faster than one product with the whole head
            if device == "cpu"
            else torch.mm(x, inputs.weight.T, out_dtype=torch.float32, out=logits)
        ),
        lambda: gradient @ inputs.weight,
    ]
    if device == "cuda":
        # A copy reads half of the bytes and writes half; pieces leave the memory to the losses.
        bytes_copied = int(work(operation, inputs)[1] // 2)
        piece = torch.empty(min(bytes_copied, PIECE), dtype=torch.int8, device=device)
        target = torch.empty_like(piece)
        copies = -(-bytes_copied // len(piece))
        steps.append(lambda: [target.copy_(piece) for _ in range(copies)])
    return steps


def errors(device: str) -> dict[str, str]:
    """Every implementation's errors against float64, at a small shape in the timed dtype."""
    inputs = Inputs.random(64, 128, 1000, DTYPES[device], device)
    branches = (branch.detach().double().requires_grad_() for branch in inputs[:3])
    exact = Inputs._make([*branches, inputs.weight.double(), inputs.labels])
    found, _ = peers(device)
    said = {}
    for name, peer in found.items():
        parts = []
        for operation, loss in peer.items():
            try:
                value, gradient = _with_gradient(loss, inputs)
            except Exception as error:  # peers raise anything; ours must run
                if name == "ours":
                    raise
                parts.append(f"{operation} {type(error).__name__}")
                continue
            truth, true_gradient = _with_gradient(REFERENCE[operation], exact)
            wrong = float((value.double() - truth).abs() / truth.abs())
            off = float((gradient.double() - true_gradient).norm() / true_gradient.norm())
            mark = " WRONG" if max(wrong, off) > WRONG else ""
            parts.append(f"{operation} {wrong:.1e} and {off:.1e}{mark}")
        said[name] = "; ".join(parts)
    return said


def _with_gradient(loss: Loss, inputs: Inputs) -> tuple[Tensor, Tensor]:
    value = loss(inputs)
    (gradient,) = torch.autograd.grad(value, inputs.hidden)
    return value.detach(), gradient


def targets(rows: list[dict[str, Any]]) -> list[tuple[str, str, bool | None]]:
    """Aims for the joint loss, with their results."""
    joint = {"operation": "vitask", "pass": "both"}
    eager, compiled = ("eager_shared",), ("compile",)
    memory = "of the peak memory of eager_shared"
    cpu = joint | {"device": "cpu"} | dict(zip(("hidden", "vocab"), CPU_TARGET, strict=True))
    where = "on a CPU, 512 × 512 × 32,000"
    aims = [
        Aim(f"1.5 × eager_shared {where}", "ours", eager, 1.5, cpu),
        Aim(f"1.2 × compile {where}", "ours", compiled, 1.2, cpu),
        Aim(f"no target: eager_functional {where}", "ours", ("eager_functional",), 1.0, cpu),
        Aim(f"no target: compile_functional {where}", "ours", ("compile_functional",), 1.0, cpu),
        Aim(f"0.2 {memory} {where}", "ours", eager, 0.2, cpu, "peak_mib", most=True),
    ]
    for (name, (hidden, vocab)), aim in zip(LARGE.items(), (1.8, 2.5), strict=True):
        gpu = joint | {"device": "cuda", "hidden": hidden, "vocab": vocab}
        where = f"on a GPU, {name}, 512 rows or more"
        share = f"0.8 of the limit on a GPU, {name}, 2048 rows or more"
        aims += [
            Aim(f"{aim} × eager_shared {where}", "ours", eager, aim, gpu, least_rows=512),
            Aim(f"1.2 × compile {where}", "ours", compiled, 1.2, gpu, least_rows=512),
            Aim(f"1.3 × the best of Liger {where}", "ours", LIGER, 1.3, gpu, least_rows=512),
            Aim(f"0.3 {memory} {where}", "ours", eager, 0.3, gpu, "peak_mib", True, 512),
            Aim(share, "ours", (), 0.8, gpu, "share_of_limit", least_rows=2048),
        ]
    return check(aims, rows, "implementation", "rows")


SUITE = MachineSuite(COLUMNS, __doc__ or "", measure)
