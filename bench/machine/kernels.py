"""Fused losses against what users would pick instead: milliseconds, memory, share of the limit.

Hidden rows of the response positions only; the head is frozen. `forward` runs with gradients
wanted, as in training; `both` is forward and backward. Ours computes its gradients in the forward
pass. `eager` makes logits for each loss, `eager_shared` once for all losses, `eager_functional`
also each log-softmax once, with PyTorch's own losses; `compile` and `compile_functional` are the
last two under torch.compile with static shapes. share_of_limit = time of the bare products
(and, on CUDA, of moving the row kernels' bytes once) divided by the time of `both`; the products
run in the same rounds. Every round takes other hidden rows and labels, the same for all.
A loss of at most 1 GFLOP is called twice in its turn: `milliseconds` is the second call, and
`milliseconds_cold` the first, which also pays for what others left in the caches. Those that share
most of their code, as all eager ones do, warm them for each other.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from bench.machine.peers import OPERATIONS, Inputs, Loss, peers
from bench.machine.speed import MIB, Clock, Spread, interleaved, peak_mib
from bench.machine.tables import Aim
from bench.suite import MachineSuite, Measured
from kernels.cpu import project

COLUMNS = (
    "device", "dtype", "operation", "implementation", "rows", "hidden", "vocab", "pass",
    "quantity", "value", "low", "high",
)  # fmt: skip
LARGE = {"InternVL2-2B": (2048, 92_553), "InternVL3-1B": (896, 151_674)}  # hidden, vocabulary
POCKET = (128, 1088)
CPU_TARGET = (512, 32_000)
ROWS = (128, 512, 2048, 8192)
SETS = 3  # of hidden rows and labels, taken in turn
SHORT = 1e9  # FLOP of the products, up to which a loss is called twice in its turn
LIGER = ("liger", "liger_one_chunk", "liger_distillation", "liger_distillation_one_chunk")
PIECE = 2**30  # bytes that are copied at once
WRONG = 0.1  # relative error of a loss or gradient from which an implementation is called wrong


def shapes(device: str) -> Iterator[tuple[torch.dtype, int, int, int]]:
    """dtype, rows, hidden, vocabulary."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
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
    """All operations at all shapes; what is known so far, after each of them."""
    if trace is not None:
        raise ValueError("suite kernels writes no trace; --trace goes with the suite step")
    found, missing = peers(device)
    if device == "cpu":
        missing["CUDA"] = "not measured: no GPU here; `python -m bench run kernels` on one does it"
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

    One that cannot run here, out of memory or by a fault of its own, goes into `failed` with its
    reason and stops no other; ours has to run.
    """
    torch.compiler.reset()  # one graph for each shape: what static shapes mean
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
    # made for each round: held between them, its memory would be missing for the others
    calls["limit"] = turn_of(lambda: clock(*limit(operation, sets[0], device)))
    samples = interleaved(calls)
    products_only = samples.pop("limit")
    passes_of_limit = len(products_only[0]) // (2 if short else 1)
    bare = Spread.of([sum(passes[-passes_of_limit:]) for passes in products_only]).value
    for name, rounds in samples.items():
        both = [sum(passes[-2:]) for passes in rounds]
        passes = {"forward": [r[-2] for r in rounds], "backward": [r[-1] for r in rounds]}
        for which, values in (passes | {"both": both}).items():
            spread = Spread.of(values)._asdict()
            yield {"implementation": name, "pass": which, "quantity": "milliseconds"} | spread
        same = {"implementation": name, "pass": "both", "low": None, "high": None}
        share = bare / Spread.of(both).value
        yield same | {"quantity": "share_of_limit", "value": share}
        if short:
            cold = Spread.of([sum(passes[:2]) for passes in rounds])._asdict()
            yield same | {"quantity": "milliseconds_cold"} | cold
        call = calls[name]
        yield same | {"quantity": "peak_mib", "value": peak_mib(call, device)}


def products(operation: str, dtype: torch.dtype) -> tuple[int, int]:
    """Of hidden rows and head: how many the loss needs, forward and backward."""
    # In float32 the logits of CRT are those of the hidden difference.
    crt = (1, 1) if dtype == torch.float32 else (2, 2)
    return {"cross_entropy": (1, 1), "rda": (2, 1), "crt": crt, "vitask": (3, 3)}[operation]


def work(operation: str, inputs: Inputs) -> tuple[float, float]:
    """FLOPs of the products, and bytes that the row kernels move: two reads, one write."""
    rows, hidden = inputs.hidden.shape
    vocab = len(inputs.weight)
    forward, backward = products(operation, inputs.weight.dtype)
    flops = 2.0 * rows * hidden * vocab * (forward + backward)
    written = backward * inputs.weight.itemsize
    return flops, float(rows * vocab * (2 * 4 * forward + written))


def limit(operation: str, inputs: Inputs, device: str) -> list[Callable[[], object]]:
    """The products alone, and on CUDA a copy that moves as many bytes as the row kernels."""
    rows, vocab = len(inputs.hidden), len(inputs.weight)
    forward, backward = products(operation, inputs.weight.dtype)
    x = torch.cat([*inputs[:forward]]).detach()
    padded = -(-vocab // 64) * 64  # rows of odd length would leave the fast products
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
        # Half of the bytes are read and half written, in pieces: memory is for the losses.
        bytes_copied = int(work(operation, inputs)[1] // 2)
        piece = torch.empty(min(bytes_copied, PIECE), dtype=torch.int8, device=device)
        target = torch.empty_like(piece)
        copies = -(-bytes_copied // len(piece))
        steps.append(lambda: [target.copy_(piece) for _ in range(copies)])
    return steps


def errors(device: str) -> dict[str, str]:
    """Of every implementation against float64, at a small shape in the dtype that is timed."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    inputs = Inputs.random(64, 128, 1000, dtype, device)
    exact = inputs._replace(
        hidden=inputs.hidden.detach().double().requires_grad_(),
        exemplar=inputs.exemplar.detach().double().requires_grad_(),
        negative=inputs.negative.detach().double().requires_grad_(),
        weight=inputs.weight.double(),
    )
    found, _ = peers(device)
    said = {}
    for name, peer in found.items():
        parts = []
        for operation, loss in peer.items():
            try:
                value, gradient = _with_gradient(loss, inputs)
            except Exception as error:  # whatever a peer raises; ours has to run
                if name == "ours":
                    raise
                parts.append(f"{operation} {type(error).__name__}")
                continue
            truth, true_gradient = _with_gradient(_truth(operation), exact)
            wrong = float((value.double() - truth).abs() / truth.abs())
            off = float((gradient.double() - true_gradient).norm() / true_gradient.norm())
            mark = " WRONG" if max(wrong, off) > WRONG else ""
            parts.append(f"{operation} {wrong:.1e} and {off:.1e}{mark}")
        said[name] = "; ".join(parts)
    return said


def _truth(operation: str) -> Loss:
    """The reference in the dtype of its inputs."""
    from kernels import linear_cross_entropy, linear_crt, linear_rda, linear_vitask

    chosen: dict[str, Any] = {"implementation": "reference"}
    return {
        "cross_entropy": lambda x: linear_cross_entropy(x.hidden, x.weight, x.labels, **chosen),
        "rda": lambda x: linear_rda(x.hidden, x.exemplar, x.weight, x.labels, **chosen),
        "crt": lambda x: linear_crt(x.hidden, x.negative, x.weight, x.labels, **chosen),
        "vitask": lambda x: linear_vitask(
            x.hidden, x.weight, x.labels,
            exemplar_hidden=x.exemplar, negative_hidden=x.negative, **chosen,
        ).total,
    }[operation]  # fmt: skip


def _with_gradient(loss: Loss, inputs: Inputs) -> tuple[Tensor, Tensor]:
    value = loss(inputs)
    (gradient,) = torch.autograd.grad(value, inputs.hidden)
    return value.detach(), gradient


def targets(rows: list[dict[str, Any]]) -> list[tuple[str, str, bool | None]]:
    """Aims of the joint loss, and results."""
    same = {"operation": "vitask", "pass": "both"}
    cpu = same | {"device": "cpu"} | dict(zip(("hidden", "vocab"), CPU_TARGET, strict=True))
    where = "on a CPU, 512 × 512 × 32,000"
    aims = [
        Aim(f"{text} {where}", "ours", (name,), aim, cpu)
        for text, name, aim in (
            ("1.5 × eager_shared", "eager_shared", 1.5),
            ("1.2 × compile", "compile", 1.2),
            ("no target: eager_functional", "eager_functional", 1.0),
            ("no target: compile_functional", "compile_functional", 1.0),
        )
    ]
    memory = "of the peak memory of eager_shared"
    eager = ("eager_shared",)
    aims.append(Aim(f"0.2 {memory} {where}", "ours", eager, 0.2, cpu, "peak_mib", most=True))
    for (name, (hidden, vocab)), aim in zip(LARGE.items(), (1.8, 2.5), strict=True):
        gpu = same | {"device": "cuda", "hidden": hidden, "vocab": vocab}
        where = f"on a GPU, {name}, 512 rows or more"
        aims += [
            Aim(f"{aim} × eager_shared {where}", "ours", eager, aim, gpu, least_rows=512),
            Aim(f"1.2 × compile {where}", "ours", ("compile",), 1.2, gpu, least_rows=512),
            Aim(f"1.3 × the best of Liger {where}", "ours", LIGER, 1.3, gpu, least_rows=512),
            Aim(
                f"0.3 {memory} {where}", "ours", eager, 0.3, gpu, "peak_mib",
                most=True, least_rows=512,
            ),
            Aim(
                f"0.8 of the limit on a GPU, {name}, 2048 rows or more", "ours", (), 0.8, gpu,
                "share_of_limit", least_rows=2048,
            ),
        ]  # fmt: skip
    frame = pd.DataFrame(rows)
    return [aim.check(frame, "implementation", "rows") for aim in aims]


SUITE = MachineSuite(COLUMNS, __doc__ or "", measure)
