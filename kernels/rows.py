"""The joint loss on a GPU: Triton row kernels between two products of the BLAS library.

One product makes the logits of all branches, in float32 (bfloat16 logits would be wrong by more
than a small RDA loss is large). Two kernels read them, one for the statistics of the softmaxes
and one for the gradients, which take the logits' place in memory, in the head's dtype. One
product brings them back to hidden rows. Formulas: `kernels/problem.py`.

Where rows are fewer than multiprocessors, several programs share the vocabulary of a row.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.problem import PARTS, Problem, Result, Wanted, all_owned, counted, slots, spread
from kernels.reference import IGNORE_INDEX

BLOCK = 2048  # columns a step: 8 per thread and branch, which leaves no register spilled
WARPS = 8
ALIGN = 64  # elements; a row of odd length would leave the fast paths of the products
FLOAT16_EXPONENT = 15  # scaled gradients of logits stay below 2^15, half of what overflows
STATISTICS = 8  # per row: max and sum of a, of b and of d, Σ e^(a - max)(a - b), max |a - b|

# Multiplications and additions are not contracted: the default differs between Triton versions.
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False}


@triton.jit(do_not_specialize=["rows", "negatives"])  # a kernel for each number of rows is slow
def statistics_kernel(
    logits,  # (rows + negatives + exemplars, stride) float32
    labels,  # (rows,) int64
    negative_of,  # (rows,) int64, -1 for none
    exemplar_of,
    partial,  # (rows, splits, STATISTICS) float32, out
    rows,
    negatives,
    vocab,
    stride,  # of logits, a multiple of ALIGN
    IGNORE: tl.constexpr,
    STATISTICS: tl.constexpr,
    REACH: tl.constexpr,  # whether max |a - b| is wanted
    BLOCK: tl.constexpr,
):
    """Online statistics of one row over one share of the vocabulary."""
    row = tl.program_id(0)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    if tl.load(labels + row) == IGNORE:
        return
    negative = tl.load(negative_of + row)
    exemplar = tl.load(exemplar_of + row)
    a_row = logits + row.to(tl.int64) * stride
    n_row = logits + (rows + tl.maximum(negative, 0)).to(tl.int64) * stride
    b_row = logits + (rows + negatives + tl.maximum(exemplar, 0)).to(tl.int64) * stride

    # Loads end with the padded row, whose length is a multiple of 16: up to the vocabulary itself,
    # of any length, they could not be made in vectors. What padding holds is cut off by `inside`.
    share = tl.cdiv(tl.cdiv(stride, BLOCK), splits) * BLOCK
    stop = tl.minimum((split + 1) * share, stride)
    # A branch that the row has not got ends before it begins: it is not read and costs nothing.
    n_stop = tl.where(negative >= 0, stop, 0)
    b_stop = tl.where(exemplar >= 0, stop, 0)
    # Finite, so that no difference of two of them is NaN.
    max_a = -1.0e30
    max_b = -1.0e30
    max_d = -1.0e30
    sum_a = 0.0
    sum_b = 0.0
    sum_d = 0.0
    sum_delta = 0.0
    reach = 0.0
    for start in range(split * share, stop, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocab
        a = tl.where(inside, tl.load(a_row + columns, mask=columns < stop, other=0.0), 0.0)
        n = tl.where(inside, tl.load(n_row + columns, mask=columns < n_stop, other=0.0), 0.0)
        b = tl.where(inside, tl.load(b_row + columns, mask=columns < b_stop, other=0.0), 0.0)
        delta = a - b
        if REACH:
            reach = tl.maximum(reach, tl.max(tl.abs(delta), 0))  # 0 in the padding
        d = tl.where(inside, a - n, -1.0e30)
        a = tl.where(inside, a, -1.0e30)
        b = tl.where(inside, b, -1.0e30)

        new_a = tl.maximum(max_a, tl.max(a, 0))
        new_b = tl.maximum(max_b, tl.max(b, 0))
        new_d = tl.maximum(max_d, tl.max(d, 0))
        shrink = tl.exp(max_a - new_a)
        e_a = tl.exp(a - new_a)
        sum_a = sum_a * shrink + tl.sum(e_a, 0)
        sum_delta = sum_delta * shrink + tl.sum(e_a * delta, 0)
        sum_b = sum_b * tl.exp(max_b - new_b) + tl.sum(tl.exp(b - new_b), 0)
        sum_d = sum_d * tl.exp(max_d - new_d) + tl.sum(tl.exp(d - new_d), 0)
        max_a = new_a
        max_b = new_b
        max_d = new_d

    out = partial + (row * splits + split) * STATISTICS
    tl.store(out, max_a)
    tl.store(out + 1, sum_a)
    tl.store(out + 2, sum_delta)
    tl.store(out + 3, max_b)
    tl.store(out + 4, sum_b)
    tl.store(out + 5, max_d)
    tl.store(out + 6, sum_d)
    if REACH:
        tl.store(out + 7, reach)


@triton.jit(do_not_specialize=["rows", "negatives"])  # a kernel for each number of rows is slow
def gradient_kernel(
    logits,  # (rows + negatives + exemplars, stride) float32
    gradient,  # (.., gradient_stride) in the head's dtype, out; may be the memory of `logits`
    labels,
    negative_of,
    exemplar_of,
    partial,  # (rows, splits, STATISTICS)
    factors,  # (4,) float32: response, exemplar, rda, crt, scaled for the head's dtype
    losses,  # (4, rows) float32, out
    rows,
    negatives,
    vocab,
    stride,
    gradient_stride,
    IGNORE: tl.constexpr,
    STATISTICS: tl.constexpr,
    SPLITS: tl.constexpr,
    GRADIENT: tl.constexpr,
    EXEMPLAR_GRADIENT: tl.constexpr,
    DETACH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Losses of one row, and its gradients over one share of the vocabulary."""
    row = tl.program_id(0)
    split = tl.program_id(1)
    label = tl.load(labels + row)
    negative = tl.load(negative_of + row)
    exemplar = tl.load(exemplar_of + row)
    has_n = negative >= 0
    has_b = exemplar >= 0
    n_number = (rows + tl.maximum(negative, 0)).to(tl.int64)
    b_number = (rows + negatives + tl.maximum(exemplar, 0)).to(tl.int64)
    a_row = logits + row.to(tl.int64) * stride
    n_row = logits + n_number * stride
    b_row = logits + b_number * stride
    valid = (label >= 0) & (label < vocab)
    counts = label != IGNORE

    # Shares of the vocabulary are merged in their order: every run gives the same bits.
    max_a = -1.0e30
    max_b = -1.0e30
    max_d = -1.0e30
    sum_a = 0.0
    sum_b = 0.0
    sum_d = 0.0
    sum_delta = 0.0
    for i in tl.static_range(SPLITS):
        at = partial + (row * SPLITS + i) * STATISTICS
        part_a = tl.load(at, mask=counts, other=0.0)
        part_b = tl.load(at + 3, mask=counts, other=0.0)
        part_d = tl.load(at + 5, mask=counts, other=0.0)
        new_a = tl.maximum(max_a, part_a)
        new_b = tl.maximum(max_b, part_b)
        new_d = tl.maximum(max_d, part_d)
        old = tl.exp(max_a - new_a)
        own = tl.exp(part_a - new_a)
        sum_a = sum_a * old + tl.load(at + 1, mask=counts, other=1.0) * own
        sum_delta = sum_delta * old + tl.load(at + 2, mask=counts, other=0.0) * own
        own_b = tl.load(at + 4, mask=counts, other=1.0) * tl.exp(part_b - new_b)
        own_d = tl.load(at + 6, mask=counts, other=1.0) * tl.exp(part_d - new_d)
        sum_b = sum_b * tl.exp(max_b - new_b) + own_b
        sum_d = sum_d * tl.exp(max_d - new_d) + own_d
        max_a = new_a
        max_b = new_b
        max_d = new_d
    mean_delta = sum_delta / sum_a

    if split == 0:
        a_y = tl.load(a_row + label, mask=valid, other=float("nan"))
        n_y = tl.load(n_row + label, mask=valid & has_n, other=0.0)
        b_y = tl.load(b_row + label, mask=valid & has_b, other=0.0)
        wrong = a_y - a_y  # 0, or NaN for a label outside the vocabulary
        response = max_a - a_y + tl.log(sum_a)
        alone = max_b - b_y + tl.log(sum_b) + wrong
        # One logarithm of a ratio near 1, not two of large sums: the branches nearly agree.
        rda = mean_delta - (max_a - max_b) - tl.log(sum_a / sum_b) + wrong
        crt = max_d - (a_y - n_y) + tl.log(sum_d)
        tl.store(losses + row, tl.where(counts, response, 0.0))
        tl.store(losses + rows + row, tl.where(counts & has_b, alone, 0.0))
        tl.store(losses + 2 * rows + row, tl.where(counts & has_b, rda, 0.0))
        tl.store(losses + 3 * rows + row, tl.where(counts & has_n, crt, 0.0))

    if GRADIENT:
        use = counts & valid
        f_v = tl.load(factors)
        f_e = tl.load(factors + 1)
        f_k = tl.where(has_b, tl.load(factors + 2), 0.0)
        f_c = tl.where(has_n, tl.load(factors + 3), 0.0)
        a_out = gradient + row.to(tl.int64) * gradient_stride
        n_out = gradient + n_number * gradient_stride
        b_out = gradient + b_number * gradient_stride
        share = tl.cdiv(tl.cdiv(stride, BLOCK), SPLITS) * BLOCK
        stop = tl.minimum((split + 1) * share, stride)
        n_stop = tl.where(has_n, stop, 0)
        b_stop = tl.where(has_b, stop, 0)
        for start in range(split * share, stop, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < vocab
            a = tl.load(a_row + columns, mask=columns < tl.where(use, stop, 0), other=0.0)
            n = tl.load(n_row + columns, mask=columns < tl.where(use, n_stop, 0), other=0.0)
            b = tl.load(b_row + columns, mask=columns < tl.where(use, b_stop, 0), other=0.0)
            a = tl.where(inside, a, 0.0)
            n = tl.where(inside, n, 0.0)
            b = tl.where(inside, b, 0.0)
            hit = tl.where(columns == label, 1.0, 0.0)
            p = tl.exp(a - max_a) / sum_a
            r = tl.exp(a - n - max_d) / sum_d
            of_n = f_c * (hit - r)
            of_a = f_v * (p - hit) + f_k * p * (a - b - mean_delta) - of_n
            # Gradients are half as wide as logits and may lie in their place: those of this step
            # reach back only, to columns that were read in this step or before, by all threads.
            tl.debug_barrier()
            tl.store(a_out + columns, tl.where(use, of_a, 0.0), mask=columns < stop)
            tl.store(n_out + columns, tl.where(use, of_n, 0.0), mask=columns < n_stop)
            if EXEMPLAR_GRADIENT:
                q = tl.exp(b - max_b) / sum_b
                of_b = f_e * (q - hit)
                if not DETACH:
                    of_b += f_k * (q - p)
                tl.store(b_out + columns, tl.where(use, of_b, 0.0), mask=columns < b_stop)


class _Rows(NamedTuple):
    """A problem as the kernels read it; nothing that it is made from waits for the device.

    negative_of, exemplar_of: (rows,) int64, the row's own row in the branch, -1 for none
    factors: (4,) float32, f_v, f_e, f_k, f_c
    """

    hidden: Tensor
    negative: Tensor
    exemplar: Tensor
    weight: Tensor
    labels: Tensor
    negative_of: Tensor
    exemplar_of: Tensor
    factors: Tensor
    detach_exemplar: bool


def triton_rows(problem: Problem, wanted: Wanted, row_scale: Tensor | None = None) -> Result:
    """Losses and gradients; `row_scale` (rows,) scales each row's part of the head's gradient."""
    hidden = problem.hidden
    float32 = {"dtype": torch.float32, "device": hidden.device}
    rows = _Rows(
        hidden,
        problem.negative,
        problem.exemplar,
        problem.weight,
        problem.labels,
        slots(problem.negative_rows, len(problem.negative), hidden),
        slots(problem.exemplar_rows, len(problem.exemplar), hidden),
        # no torch.tensor(weights): a copy from the host would break a graph capture
        torch.stack([torch.full((), w, **float32) for w in problem.weights]),
        problem.detach_exemplar,
    )
    if not problem.mean:
        return _summed(rows, wanted, row_scale)
    # Factors relative to one counted base row. 1/rows itself is applied to the finished
    # gradients: in it, float16 logits would underflow.
    numbers = _numbers(rows)
    rows = rows._replace(factors=rows.factors * numbers[0] / numbers)
    result = _summed(rows, wanted, row_scale)
    for gradient in result[1:]:
        if gradient is not None:
            gradient.div_(numbers[0])
    return result._replace(losses=result.losses.sum(dim=1) / numbers)


def _numbers(problem: _Rows) -> Tensor:
    """(4,) float32: how many rows count in each loss, 1 for none.

    The number of an absent branch, whose losses are zeros, is that of the base rows.
    """
    use = counted(problem.labels)
    base = use.sum()
    exemplar = (use & (problem.exemplar_of >= 0)).sum() if len(problem.exemplar) else base
    negative = (use & (problem.negative_of >= 0)).sum() if len(problem.negative) else base
    return torch.stack([base, exemplar, exemplar, negative]).clamp(min=1).float()


def _summed(problem: _Rows, wanted: Wanted, row_scale: Tensor | None) -> Result:
    """Losses (4, rows), and gradients of their sum weighted by the factors."""
    hidden, weight = problem.hidden, problem.weight
    rows, negatives, vocab = len(hidden), len(problem.negative), len(weight)
    float32 = {"dtype": torch.float32, "device": hidden.device}
    inputs = torch.cat([hidden, problem.negative, problem.exemplar])
    stride = -(-vocab // ALIGN) * ALIGN
    logits = torch.empty(len(inputs), stride, **float32)
    losses = torch.zeros(4, rows, **float32)
    splits = _splits(rows, hidden.device)
    gradient = _gradient_memory(logits, weight.dtype, in_place=splits == 1) if any(wanted) else None
    scales: list[Tensor] = []  # of the logits' gradients, undone after the products
    if rows:
        _product(inputs, weight.T, logits[:, :vocab])
        float16 = weight.dtype == torch.float16
        partial = _statistics(problem, logits, splits, reach=float16)
        if float16:
            scales.append(_gradient_scale(problem, partial))
            problem = problem._replace(factors=problem.factors * scales[0])
        with_exemplar = wanted.exemplar or wanted.weight
        _gradients(problem, logits, gradient, losses, partial, with_exemplar=with_exemplar)

    # A row that no base row owns (its number outside, or given twice) is a mistake that cannot be
    # raised without stalling the stream: its loss is NaN.
    for part, slot_of, branch in (
        (1, problem.exemplar_of, problem.exemplar),
        (2, problem.exemplar_of, problem.exemplar),
        (3, problem.negative_of, problem.negative),
    ):
        losses[part] += torch.where(all_owned(slot_of, len(branch)), 0.0, float("nan"))
    of_hidden = of_weight = None
    if gradient is not None:
        gradient = gradient[:, :vocab]
        # Unused rows have gradient 0, and are masked since 0 times a NaN would be NaN. A row
        # without owner, whose loss is NaN, has none: the head's gradient is then worthless too.
        labels = problem.labels
        unused = ~_of_all((labels >= 0) & (labels < vocab), problem)[:, None]
        if wanted.hidden or wanted.exemplar:
            kept = len(inputs) if wanted.exemplar else rows + negatives
            of_hidden = torch.empty(kept, hidden.shape[1], **float32)
            _product(gradient[:kept], weight, of_hidden)
            _unscale(of_hidden.masked_fill_(unused[:kept], 0), scales)
        if wanted.weight:
            if row_scale is not None:
                # Scaled to at most 1, for a mean over many rows would underflow in float16.
                largest = torch.cat([row_scale, row_scale.new_zeros(1)]).abs().amax()
                scales.append(_power_of_two(largest, 0))
                own = _of_all(row_scale * scales[-1], problem)
                inputs = (inputs * own[:, None]).to(weight.dtype)
            of_weight = torch.empty(weight.shape, **float32)
            _product(gradient.T, inputs.masked_fill(unused, 0), of_weight)
            _unscale(of_weight, scales)
    return Result(losses, of_hidden, of_weight)


def _statistics(problem: _Rows, logits: Tensor, splits: int, *, reach: bool) -> Tensor:
    """(rows, splits, STATISTICS), each share of the vocabulary's; nothing for ignored rows."""
    rows, negatives, vocab = len(problem.hidden), len(problem.negative), len(problem.weight)
    partial = logits.new_empty(rows, splits, STATISTICS)
    with _on(logits):
        statistics_kernel[rows, splits](
            logits, *_own(problem), partial, rows, negatives, vocab, logits.stride(0),
            IGNORE=IGNORE_INDEX, STATISTICS=STATISTICS, REACH=reach, BLOCK=_block(logits),
            **OPTIONS,
        )  # fmt: skip
    return partial


def _gradients(
    problem: _Rows,
    logits: Tensor,
    gradient: Tensor | None,
    losses: Tensor,
    partial: Tensor,
    *,
    with_exemplar: bool,
) -> None:
    """Fill the losses and, where there is memory for them, the gradients of the logits."""
    rows, negatives, vocab = len(problem.hidden), len(problem.negative), len(problem.weight)
    splits, out = partial.shape[1], logits if gradient is None else gradient
    with _on(logits):
        gradient_kernel[rows, splits](
            logits, out, *_own(problem), partial, problem.factors, losses, rows, negatives,
            vocab, logits.stride(0), out.stride(0),
            IGNORE=IGNORE_INDEX, STATISTICS=STATISTICS, SPLITS=splits,
            GRADIENT=gradient is not None, EXEMPLAR_GRADIENT=with_exemplar,
            DETACH=problem.detach_exemplar, BLOCK=_block(logits), **OPTIONS,
        )  # fmt: skip


def _own(problem: _Rows) -> tuple[Tensor, Tensor, Tensor]:
    return problem.labels.contiguous(), problem.negative_of, problem.exemplar_of


def _block(logits: Tensor) -> int:
    return min(BLOCK, triton.next_power_of_2(logits.stride(0)))


def _on(logits: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, whichever tensors it is given."""
    return torch.cuda.device(logits.device) if logits.is_cuda else nullcontext()


def _splits(rows: int, device: torch.device) -> int:
    """Programs per row: a power of two (each is a kernel of its own) that fills the device."""
    if device.type != "cuda" or rows == 0:
        return 1
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return 1 if rows >= processors else min(16, triton.next_power_of_2(-(-processors // rows)))


def _gradient_memory(logits: Tensor, dtype: torch.dtype, *, in_place: bool) -> Tensor:
    """Where gradients go: the logits' own memory, if one program reads and writes a whole row."""
    return logits.view(dtype) if in_place else torch.empty_like(logits, dtype=dtype)


def _gradient_scale(problem: _Rows, partial: Tensor) -> Tensor:
    """() power of two that the logits' gradients are multiplied by while float16 holds them.

    Those of a large vocabulary would underflow, those of far apart branches overflow:
    |da| <= f_v + f_c + f_k p |δ - E_p[δ]|, and no δ is further from the mean than 2 max |δ|.
    """
    f = problem.factors.abs()
    used = counted(problem.labels) & (problem.exemplar_of >= 0)
    reach = partial[:, :, STATISTICS - 1].amax(dim=1).where(used, 0).amax()
    return _power_of_two(f.sum() + 2 * f[PARTS.index("rda")] * reach, FLOAT16_EXPONENT)


def _power_of_two(largest: Tensor, exponent: int) -> Tensor:
    """() by which `largest` has to be multiplied to lie below 2^exponent, and above half of it."""
    _, own = torch.frexp(largest)
    return torch.ldexp(torch.ones_like(largest), exponent - own)


def _unscale(gradient: Tensor, scales: Iterable[Tensor]) -> None:
    for scale in scales:
        gradient.div_(scale)


def _product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = left @ right in float32, whatever the inputs' dtype."""
    if left.dtype == torch.float32:
        torch.mm(left, right, out=out)
    elif left.is_cuda:
        torch.mm(left, right, out_dtype=torch.float32, out=out)
    else:  # the interpreter's tensors: there is no such kernel on the CPU
        torch.mm(left.float(), right.float(), out=out)


def _of_all(values: Tensor, problem: _Rows) -> Tensor:
    """Values (rows,) of base rows, for the rows of all branches as they are stacked."""
    return torch.cat(
        [
            values,
            spread(values, problem.negative_of, len(problem.negative)),
            spread(values, problem.exemplar_of, len(problem.exemplar)),
        ]
    )
