"""The joint loss on the CPU, by chunks of rows, so that [rows, vocab] never exists as a whole.

`kernels/problem.py` states the formulas. Here each line is one PyTorch pass over a block of logits
that fits the cache of a core, in place where possible. The head has no bias, so the logits
d = a - n are those of the rows h_a - h_n, computed in float32; n itself is not needed.

For a small loss, the fixed cost of each PyTorch call dominates. Counts and factors are therefore
Python numbers, and rows that are already in order are not gathered.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.problem import Problem, Result, Wanted, check_values, counted, slots

LOGIT_BYTES = 64 * 2**20  # limit for the logits of a chunk, unless MIN_ROWS need more
CACHED_BYTES = 8 * 2**20  # of logits that stay in the last-level cache until they are gradients
MIN_ROWS = 32  # per branch; with fewer rows, reading the head takes most of the time
BLOCK_BYTES = 4 * 2**20  # of the logits of one branch in a pass; the last-level cache fits several
TILE_BYTES = 2 * 2**20  # of the head in one product; a larger tile leaves the cache between rows


class _Branch(NamedTuple):
    """Rows of a branch, hidden rows or logits, in the order of their base rows.

    rows: (k, ...)
    at:   (k,) ascending indices of their base rows; None: every base row has the branch, or none
    """

    rows: Tensor
    at: Tensor | None = None

    @property
    def size(self) -> int:
        return self.rows.shape[0]

    def of(self, values: Tensor) -> Tensor:
        """Select from `values` (base rows, ...) those with the branch; a view if all have it."""
        return values[: self.size] if self.at is None else values[self.at]

    def put(self, target: Tensor, values: Tensor) -> None:
        """Write `values` (k, ...) to the branch's base rows in `target` (base rows, ...)."""
        if self.at is None:
            target[: self.size] = values
        else:
            target[self.at] = values

    def between(self, start: int, stop: int) -> tuple["_Branch", slice]:
        """The part that belongs to base rows start to stop - 1, and its slice of `rows`."""
        if self.at is None:
            part = slice(start, min(stop, self.size))
            whole = part.start == 0 and part.stop == self.size
            return self if whole else _Branch(self.rows[part]), part
        part = slice(*torch.searchsorted(self.at, torch.tensor([start, stop])).tolist())
        return _Branch(self.rows[part], self.at[part] - start), part


class _CountedRows(NamedTuple):
    """A problem without its ignored rows. Fields as in `Problem`.

    factors: f_v, f_e, f_k, f_c; with `mean` relative to one base row
    """

    hidden: Tensor
    labels: Tensor
    negative: _Branch
    exemplar: _Branch
    weight: Tensor
    factors: Sequence[float]
    detach_exemplar: bool
    dtype: torch.dtype


def compute(problem: Problem, wanted: Wanted, row_scale: Tensor | None = None) -> Result:
    """Losses and gradients; `row_scale` (rows,) scales each row's part of the head's gradient.

    Raises ValueError for labels and row numbers that are out of range, and for rows given twice.
    """
    hidden, labels, base = problem.hidden, problem.labels, None
    if not check_values(problem):  # ignored rows are not even projected
        base = counted(labels).nonzero()[:, 0]
        hidden = hidden[base]
        row_scale = None if row_scale is None else row_scale[base]
    negative, negative_at = _in_order(problem.negative, problem.negative_rows, base, labels)
    exemplar, exemplar_at = _in_order(problem.exemplar, problem.exemplar_rows, base, labels)
    counts = [max(1, n) for n in (len(hidden), exemplar.size, exemplar.size, negative.size)]
    factors = problem.loss_weights
    if problem.mean:  # relative to one base row: usually 1, which saves a pass over the logits
        factors = [w * counts[0] / count for w, count in zip(factors, counts, strict=True)]

    rows = _CountedRows(
        hidden=hidden,
        labels=labels if base is None else labels[base],
        negative=negative,
        exemplar=exemplar,
        weight=problem.weight,
        factors=factors,
        detach_exemplar=problem.detach_exemplar,
        dtype=problem.dtype,
    )
    losses, row_gradient, head_gradient = _compute_counted(rows, wanted, row_scale)
    if problem.mean:
        losses = losses.sum(dim=1).div_(losses.new_tensor(counts))
        for gradient in (row_gradient, head_gradient):
            if gradient is not None and counts[0] > 1:
                gradient.div_(counts[0])
    elif base is not None:
        losses = losses.new_zeros(4, len(labels)).index_copy_(1, base, losses)
    moved = base is not None or negative_at is not None or exemplar_at is not None
    if row_gradient is not None and moved:
        stacked = [(problem.hidden, base), (problem.negative, negative_at)]
        if wanted.exemplar:
            stacked.append((problem.exemplar, exemplar_at))
        row_gradient = _as_given(row_gradient, stacked)
    return Result(losses, row_gradient, head_gradient)


def _in_order(
    branch: Tensor, rows: Tensor | None, base: Tensor | None, labels: Tensor
) -> tuple[_Branch, Tensor | None]:
    """The counted rows of a branch, and their indices in it; None: all rows, in the given order.

    rows: the base row of each branch row; base: the counted base rows; None: all
    """
    if not len(branch) or (rows is None and base is None):
        return _Branch(branch), None
    if rows is None:
        assert base is not None
        return _Branch(branch[base]), base
    number = slots(rows, len(branch), labels)
    if base is not None:
        number = number[base]
    at = (number >= 0).nonzero()[:, 0]
    every, number = len(at) == len(number), number[at]
    return _Branch(branch[number], None if every else at), number


def _as_given(gradient: Tensor, stacked: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
    """Gradients of counted rows, moved to the places of these among all rows; 0 elsewhere."""
    places, total = [], 0
    for rows, number in stacked:
        places.append((torch.arange(len(rows)) if number is None else number) + total)
        total += len(rows)
    full = gradient.new_zeros(total, gradient.shape[1])
    return full.index_copy_(0, torch.cat(places), gradient)


def _compute_counted(
    rows: _CountedRows, wanted: Wanted, row_scale: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Losses (4, rows); gradients of the base, negative and exemplar rows; that of the head."""
    count, negatives, exemplars = len(rows.hidden), rows.negative.size, rows.exemplar.size
    weight, dtype = rows.weight, rows.dtype
    vocab, width = weight.shape
    losses = torch.zeros(4, count, dtype=dtype)
    row_gradient = head_gradient = None
    if wanted.hidden or wanted.exemplar:
        stacked = count + negatives + (exemplars if wanted.exemplar else 0)
        row_gradient = torch.empty(stacked, width, dtype=dtype)
    if wanted.weight:
        head_gradient = torch.zeros(weight.shape, dtype=dtype)

    branches = 1 + bool(negatives) + bool(exemplars)
    size = chunk_rows(count, branches * vocab * dtype.itemsize, weight.nbytes)
    buffer = torch.empty(branches * min(size, count), vocab, dtype=dtype)
    for start in range(0, count, size):
        stop = min(start + size, count)
        negative, negative_part = rows.negative.between(start, stop)
        exemplar, exemplar_part = rows.exemplar.between(start, stop)
        base = inputs = rows.hidden[start:stop].to(dtype)
        if negatives:
            inputs = torch.cat([base, negative.of(base) - negative.rows.to(dtype)])
        if exemplars:
            inputs = torch.cat([inputs, exemplar.rows.to(dtype)])
        a_end = stop - start
        d_end = a_end + negative.size
        logits = project(inputs, weight, buffer[: d_end + exemplar.size])
        chunk = _Logits(
            a=logits[:a_end],
            d=_Branch(logits[a_end:d_end], negative.at) if negatives else negative,
            b=_Branch(logits[d_end:], exemplar.at) if exemplars else exemplar,
            y=rows.labels[start:stop, None],
        )
        _chunk(chunk, rows, wanted, losses[:, start:stop])
        if row_gradient is not None:
            end = d_end + exemplar.size if wanted.exemplar else d_end
            only = a_end == count  # the only chunk: its rows are stacked as the result is
            of_inputs = row_gradient if only else torch.empty(end, width, dtype=dtype)
            back(logits[:end], weight, of_inputs)
            _share_difference(of_inputs[:a_end], of_inputs[a_end:d_end], negative)
            if not only:
                row_gradient[start:stop] = of_inputs[:a_end]
                row_gradient[count:][negative_part] = of_inputs[a_end:d_end]
                if wanted.exemplar:
                    row_gradient[count + negatives :][exemplar_part] = of_inputs[d_end:]
        if head_gradient is not None:
            if row_scale is not None:
                scale = row_scale[start:stop]
                scales = torch.cat([scale, negative.of(scale), exemplar.of(scale)])
                inputs = inputs * scales[:, None]
            head_gradient.addmm_(logits.T, inputs)
    return losses, row_gradient, head_gradient


def _share_difference(of_base: Tensor, of_difference: Tensor, negative: _Branch) -> None:
    """Pass the gradient of h_a - h_n on, in place: add it to that of h_a, negate it for h_n."""
    if negative.size == 0:
        return
    if negative.at is None:
        of_base.add_(of_difference)
    else:
        of_base.index_add_(0, negative.at, of_difference)
    of_difference.neg_()


def chunk_rows(rows: int, row_bytes: int, head_bytes: int) -> int:
    """Base rows per chunk, at least MIN_ROWS; all chunks but the last have this size.

    Each chunk reads the whole head, so a chunk's logits may take as many bytes as the head. With a
    small head they may fill the cache. They never take more than LOGIT_BYTES.
    row_bytes: the logits of one base row in all branches
    """
    limit = min(LOGIT_BYTES, max(CACHED_BYTES, head_bytes))
    most = max(MIN_ROWS, limit // row_bytes)
    chunks = max(1, -(-rows // most))
    return max(MIN_ROWS, -(-rows // chunks))


def project(inputs: Tensor, weight: Tensor, logits: Tensor) -> Tensor:
    """`logits` (rows, vocab) = inputs (rows, hidden) weightᵀ, computed per tile of the head.

    One product with a whole large head takes up to 1.5 times as long: the library packs all of it.
    """
    if weight.nbytes <= TILE_BYTES and weight.dtype == logits.dtype:
        return torch.mm(inputs, weight.T, out=logits)
    for tile, part in _tiles(weight, logits.dtype):
        torch.mm(inputs, part.T, out=logits[:, tile])
    return logits


def back(gradient: Tensor, weight: Tensor, of_inputs: Tensor) -> None:
    """`of_inputs` (rows, hidden) = gradient (rows, vocab) weight.

    A 16-bit head is converted tile by tile: a converted copy of all of it would be twice its size.
    """
    if weight.dtype == gradient.dtype:
        torch.mm(gradient, weight, out=of_inputs)
        return
    of_inputs.zero_()
    for tile, part in _tiles(weight, gradient.dtype):
        of_inputs.addmm_(gradient[:, tile], part)


def _tiles(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the head's rows, each with these rows in the dtype of the computation."""
    size = max(1, TILE_BYTES // max(1, weight.shape[1] * dtype.itemsize))
    for start in range(0, len(weight), size):
        tile = slice(start, start + size)
        yield tile, weight[tile].to(dtype)


class _Logits(NamedTuple):
    """Logits of some base rows (rows, vocab) and of their branches; d is a - n."""

    a: Tensor
    d: _Branch
    b: _Branch
    y: Tensor  # (rows, 1)

    def between(self, start: int, stop: int) -> "_Logits":
        d, b = (branch.between(start, stop)[0] for branch in (self.d, self.b))
        return _Logits(self.a[start:stop], d, b, self.y[start:stop])


def _chunk(chunk: _Logits, rows: _CountedRows, wanted: Wanted, losses: Tensor) -> None:
    """Fill the losses (4, chunk rows) and turn the logits into their gradients, by blocks."""
    count, vocab = chunk.a.shape
    size = min(count, max(1, BLOCK_BYTES // (vocab * chunk.a.itemsize)))
    spare = chunk.a.new_empty(size, vocab) if chunk.b.size else chunk.b.rows
    for start in range(0, count, size):
        block = chunk.between(start, start + size) if size < count else chunk
        delta = spare[: block.b.size]
        mean_delta = _losses(block, delta, losses[:, start : start + size])
        if any(wanted):
            of_exemplar = wanted.exemplar or wanted.weight
            _gradients(block, delta, mean_delta, rows, of_exemplar=of_exemplar)


def _losses(block: _Logits, delta: Tensor, losses: Tensor) -> Tensor:
    """Fill the losses (4, rows) and return E_p[δ] (rows with b, 1).

    Overwrites a, d and b with p, r and q, and `delta` with δ.
    """
    a, d, b, y = block
    if b.size:
        torch.sub(b.of(a), b.rows, out=delta)
    losses[0], peak_a, share_a = _softmax(a, y)
    if d.size:
        d.put(losses[3], _softmax(d.rows, d.of(y))[0])
    if not b.size:
        return delta  # without rows
    loss, peak_b, share_b = _softmax(b.rows, b.of(y))
    b.put(losses[1], loss)
    mean_delta = torch.linalg.vecdot(b.of(a), delta)
    # The sums nearly agree, so the logarithm of their ratio is more accurate than the difference
    # of their logarithms.
    log_ratio = (share_b / b.of(share_a)).log_()
    b.put(losses[2], mean_delta - (b.of(peak_a) - peak_b) - log_ratio)
    return mean_delta[:, None]


def _softmax(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Overwrite x (rows, vocab) with softmax(x); return three (rows,) tensors.

    They are the losses lse(x) - x_y, the largest x, and its probability. The latter is
    1 / sum(exp(x - max)), so that the sum needs no separate pass.
    """
    x_y = x.gather(1, y).squeeze(1)
    peak = x.amax(dim=-1)
    share = torch.softmax(x, dim=-1, out=x).amax(dim=-1)
    return peak - x_y - share.log(), peak, share


def _gradients(
    block: _Logits, delta: Tensor, mean_delta: Tensor, rows: _CountedRows, *, of_exemplar: bool
) -> None:
    """Turn p, r and q (only `of_exemplar`) into da, dd and db, in place; overwrites δ."""
    a, d, b, y = block
    f_v, f_e, f_k, f_c = rows.factors
    if d.size:
        _scale(d.rows, f_c)
        _subtract_label(d.rows, f_c, d.of(y))
    if of_exemplar and b.size:
        _scale(b.rows, f_e if rows.detach_exemplar else f_e + f_k)
        if not rows.detach_exemplar:
            b.rows.sub_(b.of(a), alpha=f_k)
        _subtract_label(b.rows, f_e, b.of(y))
    if not (b.size and f_k):
        _scale(a, f_v)
    else:
        # p ⊙ (f_v + f_k (δ - E_p[δ]))
        _scale(delta, f_k)
        slope = delta.sub_(f_k * mean_delta - f_v)
        if b.at is None:
            a.mul_(slope)
        else:
            with_b = b.of(a).mul_(slope)
            _scale(a, f_v)
            a[b.at] = with_b
    _subtract_label(a, f_v, y)


def _scale(x: Tensor, factor: float) -> None:
    if factor != 1:  # usually 1, which saves a pass
        x.mul_(factor)


def _subtract_label(x: Tensor, factor: float, y: Tensor) -> None:
    """x (rows, vocab) - factor e_y, in place."""
    if factor:
        x.scatter_(1, y, -factor, reduce="add")
