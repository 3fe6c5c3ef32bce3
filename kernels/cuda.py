"""The joint loss on a GPU: Triton kernels for the rows, between two products of the BLAS library.

The first product computes the logits of all branches in float32: the rounding of bfloat16 logits
exceeds a small RDA loss. Two kernels read them. One computes the statistics of the softmaxes, the
other the losses and the gradients of the logits, which replace the logits in memory, in the dtype
of the head. The last products compute the gradients of the hidden rows and of the head. Formulas:
`kernels/problem.py`.

With fewer rows than multiprocessors, several programs share the vocabulary of a row.

This file never waits for the device, so that CUDA graphs can capture it. Without CUDA,
TRITON_INTERPRET=1 runs the kernels on CPU tensors.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.problem import (
    IGNORE_INDEX,
    LOSSES,
    Problem,
    Result,
    Wanted,
    all_owned,
    counted,
    slots,
    spread,
)

BLOCK = 2048  # columns per step: 8 per thread and branch, so that no register spills
WARPS = 8
ALIGN = 64  # elements; products with rows of odd length are slow
FLOAT16_EXPONENT = 15  # scaled gradients of logits stay below 2^15; 2^16 overflows
STATISTICS = 8  # per row: max and sum of a, of b and of d, Σ e^(a - max)(a - b), max |a - b|

# Multiplications and additions are not fused: the default differs between Triton versions.
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False}


@triton.jit(do_not_specialize=["rows", "negatives"])  # else each number of rows compiles anew
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
    REACH: tl.constexpr,  # whether to compute max |a - b|
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

    # Loads go up to the stride, a multiple of 16, and not to the vocabulary, which has any size:
    # only then can Triton load vectors. `inside` masks the padding.
    share = tl.cdiv(tl.cdiv(stride, BLOCK), splits) * BLOCK
    stop = tl.minimum((split + 1) * share, stride)
    # A missing branch gets an empty range, so nothing is loaded.
    n_stop = tl.where(negative >= 0, stop, 0)
    b_stop = tl.where(exemplar >= 0, stop, 0)
    # Finite, since the difference of two infinities would be NaN.
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
            reach = tl.maximum(reach, tl.max(tl.abs(delta), 0))  # the padding has 0
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


@triton.jit(do_not_specialize=["rows", "negatives"])  # else each number of rows compiles anew
def gradient_kernel(
    logits,  # (rows + negatives + exemplars, stride) float32
    gradient,  # (.., gradient_stride) in the head's dtype, out; may share the memory of `logits`
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
    """Losses of one row, and the gradients of its logits over one share of the vocabulary."""
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

    # Shares of the vocabulary merge in a fixed order, so that every run gives the same bits.
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
        shrink = tl.exp(max_a - new_a)
        shrink_part = tl.exp(part_a - new_a)
        sum_a = sum_a * shrink + tl.load(at + 1, mask=counts, other=1.0) * shrink_part
        sum_delta = sum_delta * shrink + tl.load(at + 2, mask=counts, other=0.0) * shrink_part
        part_sum_b = tl.load(at + 4, mask=counts, other=1.0) * tl.exp(part_b - new_b)
        part_sum_d = tl.load(at + 6, mask=counts, other=1.0) * tl.exp(part_d - new_d)
        sum_b = sum_b * tl.exp(max_b - new_b) + part_sum_b
        sum_d = sum_d * tl.exp(max_d - new_d) + part_sum_d
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
        # The sums nearly agree, so the logarithm of their ratio is more accurate than the
        # difference of their logarithms.
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
            # Gradients are at most as wide as logits and may share their memory. The stores of this
            # step only overwrite columns that were read by now; the barrier waits for all threads.
            tl.debug_barrier()
            tl.store(a_out + columns, tl.where(use, of_a, 0.0), mask=columns < stop)
            tl.store(n_out + columns, tl.where(use, of_n, 0.0), mask=columns < n_stop)
            if EXEMPLAR_GRADIENT:
                q = tl.exp(b - max_b) / sum_b
                of_b = f_e * (q - hit)
                if not DETACH:
                    of_b += f_k * (q - p)
                tl.store(b_out + columns, tl.where(use, of_b, 0.0), mask=columns < b_stop)


class _Indexed(NamedTuple):
    """A problem with the row numbers and factors that the kernels read, on its device.

    negative_of, exemplar_of: (rows,) int64, the row's index in the branch, -1 for none
    factors: (4,) float32, f_v, f_e, f_k, f_c
    """

    problem: Problem
    negative_of: Tensor
    exemplar_of: Tensor
    factors: Tensor

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Base rows, negative rows, vocabulary."""
        return len(self.problem.hidden), len(self.problem.negative), len(self.problem.weight)

    @property
    def indices(self) -> tuple[Tensor, Tensor, Tensor]:
        """(rows,) each: labels, and the indices of the branches."""
        return self.problem.labels.contiguous(), self.negative_of, self.exemplar_of

    def stack(self, values: Tensor) -> Tensor:
        """Values (rows,) of base rows, for base, negative and exemplar rows in that order."""
        negatives, exemplars = len(self.problem.negative), len(self.problem.exemplar)
        return torch.cat(
            [
                values,
                spread(values, self.negative_of, negatives),
                spread(values, self.exemplar_of, exemplars),
            ]
        )


def compute(problem: Problem, wanted: Wanted, row_scale: Tensor | None = None) -> Result:
    """Losses and gradients; `row_scale` (rows,) scales each row's part of the head's gradient."""
    hidden = problem.hidden
    float32 = {"dtype": torch.float32, "device": hidden.device}
    indexed = _Indexed(
        problem,
        slots(problem.negative_rows, len(problem.negative), hidden),
        slots(problem.exemplar_rows, len(problem.exemplar), hidden),
        # torch.tensor(loss_weights) would copy from the host, which breaks a graph capture.
        torch.stack([torch.full((), w, **float32) for w in problem.loss_weights]),
    )
    if not problem.mean:
        return _summed(indexed, wanted, row_scale)
    # The factors are relative to one counted base row. Dividing the finished gradients by the
    # number of these keeps float16 gradients of logits from underflowing.
    counts = _counts(indexed)
    indexed = indexed._replace(factors=indexed.factors * counts[0] / counts)
    result = _summed(indexed, wanted, row_scale)
    for gradient in result[1:]:
        if gradient is not None:
            gradient.div_(counts[0])
    return result._replace(losses=result.losses.sum(dim=1) / counts)


def _counts(indexed: _Indexed) -> Tensor:
    """(4,) float32: the number of counted rows of each loss, 1 for none.

    An absent branch has the number of the base rows; its losses are zeros.
    """
    problem = indexed.problem
    use = counted(problem.labels)
    base = use.sum()
    exemplar = (use & (indexed.exemplar_of >= 0)).sum() if len(problem.exemplar) else base
    negative = (use & (indexed.negative_of >= 0)).sum() if len(problem.negative) else base
    return torch.stack([base, exemplar, exemplar, negative]).clamp(min=1).float()


def _summed(indexed: _Indexed, wanted: Wanted, row_scale: Tensor | None) -> Result:
    """Losses (4, rows), and the gradients of their sum weighted by the factors."""
    problem = indexed.problem
    hidden, weight = problem.hidden, problem.weight
    rows, negatives, vocab = indexed.sizes
    float32 = {"dtype": torch.float32, "device": hidden.device}
    inputs = torch.cat([hidden, problem.negative, problem.exemplar])
    stride = -(-vocab // ALIGN) * ALIGN
    logits = torch.empty(len(inputs), stride, **float32)
    losses = torch.zeros(4, rows, **float32)
    splits = _splits(rows, hidden.device)
    gradient = _gradient_memory(logits, weight.dtype, in_place=splits == 1) if any(wanted) else None
    scales: list[Tensor] = []  # of the gradients of the logits; undone after the products
    if rows:
        _product(inputs, weight.T, logits[:, :vocab])
        float16 = weight.dtype == torch.float16
        partial = _statistics(indexed, logits, splits, reach=float16)
        if float16:
            scales.append(_gradient_scale(indexed, partial))
            indexed = indexed._replace(factors=indexed.factors * scales[0])
        with_exemplar = wanted.exemplar or wanted.weight
        _gradients(indexed, logits, gradient, losses, partial, with_exemplar=with_exemplar)
    _mark_wrong_rows(indexed, losses)

    of_hidden = of_weight = None
    if gradient is not None:
        gradient = gradient[:, :vocab]
        # Ignored rows have gradient 0, but are masked all the same, since 0 times NaN is NaN. A
        # branch row that belongs to no base row is masked too: its loss is NaN, and the gradient
        # of the head means nothing then.
        labels = problem.labels
        unused = ~indexed.stack((labels >= 0) & (labels < vocab))[:, None]
        if wanted.hidden or wanted.exemplar:
            stacked = len(inputs) if wanted.exemplar else rows + negatives
            of_hidden = torch.empty(stacked, hidden.shape[1], **float32)
            _product(gradient[:stacked], weight, of_hidden)
            _unscale(of_hidden.masked_fill_(unused[:stacked], 0), scales)
        if wanted.weight:
            if row_scale is not None:
                # Scaled to at most 1: those of a mean over many rows would underflow in float16.
                largest = torch.cat([row_scale, row_scale.new_zeros(1)]).abs().amax()
                scales.append(_power_of_two(largest, 0))
                factor = indexed.stack(row_scale * scales[-1])
                inputs = (inputs * factor[:, None]).to(weight.dtype)
            of_weight = torch.empty(weight.shape, **float32)
            _product(gradient.T, inputs.masked_fill(unused, 0), of_weight)
            _unscale(of_weight, scales)
    return Result(losses, of_hidden, of_weight)


def _mark_wrong_rows(indexed: _Indexed, losses: Tensor) -> None:
    """Set the losses of a branch to NaN if a row number is out of range or given twice.

    Raising an error instead would stall the stream.
    """
    problem = indexed.problem
    for name, slot_of, branch in (
        ("exemplar", indexed.exemplar_of, problem.exemplar),
        ("rda", indexed.exemplar_of, problem.exemplar),
        ("crt", indexed.negative_of, problem.negative),
    ):
        wrong = torch.where(all_owned(slot_of, len(branch)), 0.0, float("nan"))
        losses[LOSSES.index(name)] += wrong


def _statistics(indexed: _Indexed, logits: Tensor, splits: int, *, reach: bool) -> Tensor:
    """(rows, splits, STATISTICS), one per share of the vocabulary; not filled for ignored rows."""
    rows = indexed.sizes[0]
    partial = logits.new_empty(rows, splits, STATISTICS)
    with _on(logits):
        statistics_kernel[rows, splits](
            logits, *indexed.indices, partial, *indexed.sizes, logits.stride(0),
            IGNORE=IGNORE_INDEX, STATISTICS=STATISTICS, REACH=reach, BLOCK=_block(logits),
            **OPTIONS,
        )  # fmt: skip
    return partial


def _gradients(
    indexed: _Indexed,
    logits: Tensor,
    gradient: Tensor | None,
    losses: Tensor,
    partial: Tensor,
    *,
    with_exemplar: bool,
) -> None:
    """Fill the losses and, unless `gradient` is None, the gradients of the logits."""
    rows, splits = partial.shape[:2]
    out = logits if gradient is None else gradient
    with _on(logits):
        gradient_kernel[rows, splits](
            logits, out, *indexed.indices, partial, indexed.factors, losses, *indexed.sizes,
            logits.stride(0), out.stride(0),
            IGNORE=IGNORE_INDEX, STATISTICS=STATISTICS, SPLITS=splits,
            GRADIENT=gradient is not None, EXEMPLAR_GRADIENT=with_exemplar,
            DETACH=indexed.problem.detach_exemplar, BLOCK=_block(logits), **OPTIONS,
        )  # fmt: skip


def _block(logits: Tensor) -> int:
    return min(BLOCK, triton.next_power_of_2(logits.stride(0)))


def _on(logits: Tensor) -> AbstractContextManager[object]:
    """Make the device of `logits` current: Triton ignores where its tensors are."""
    return torch.cuda.device(logits.device) if logits.is_cuda else nullcontext()


def _splits(rows: int, device: torch.device) -> int:
    """Programs per row that fill the device: a power of two, since each number compiles anew."""
    if device.type != "cuda" or rows == 0:
        return 1
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return 1 if rows >= processors else min(16, triton.next_power_of_2(-(-processors // rows)))


def _gradient_memory(logits: Tensor, dtype: torch.dtype, *, in_place: bool) -> Tensor:
    """Memory for gradients: that of the logits, if one program reads and writes a whole row."""
    return logits.view(dtype) if in_place else torch.empty_like(logits, dtype=dtype)


def _gradient_scale(indexed: _Indexed, partial: Tensor) -> Tensor:
    """() power of two that multiplies the gradients of the logits while they are float16.

    Without it, those of a large vocabulary underflow, and those of distant branches overflow:
    |da| <= f_v + f_c + f_k p |δ - E_p[δ]|, where no δ is further from the mean than 2 max |δ|.
    """
    f = indexed.factors.abs()
    used = counted(indexed.problem.labels) & (indexed.exemplar_of >= 0)
    reach = partial[:, :, STATISTICS - 1].amax(dim=1).where(used, 0).amax()
    return _power_of_two(f.sum() + 2 * f[LOSSES.index("rda")] * reach, FLOAT16_EXPONENT)


def _power_of_two(largest: Tensor, exponent: int) -> Tensor:
    """() factor that brings `largest` below 2^exponent, and to at least half of that."""
    _, exponent_of_largest = torch.frexp(largest)
    return torch.ldexp(torch.ones_like(largest), exponent - exponent_of_largest)


def _unscale(gradient: Tensor, scales: Iterable[Tensor]) -> None:
    for scale in scales:
        gradient.div_(scale)


def _product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = left @ right in float32, for any dtype of the inputs."""
    if left.dtype == torch.float32:
        torch.mm(left, right, out=out)
    elif left.is_cuda:
        torch.mm(left, right, out_dtype=torch.float32, out=out)
    else:  # in the interpreter: the CPU has no such kernel
        torch.mm(left.float(), right.float(), out=out)
