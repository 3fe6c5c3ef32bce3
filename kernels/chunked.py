"""The joint loss on the CPU: chunks of rows, so that [rows, vocab] never exists as a whole.

The formulas stand in `kernels/problem.py`; here each line is a pass of PyTorch over a block of
logits that stays in a core's cache, in place wherever it can be. As the head has no bias, the
logits d = a - n are those of the rows h_a - h_n: computed in float32, n itself is not needed.

A small loss takes as long as the calls of its operations: numbers are Python's own, and what
stands in order already is not gathered.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.problem import Problem, Result, Wanted, check_values, counted, slots

LOGIT_BYTES = 64 * 2**20  # of all branches of a chunk together, unless MIN_ROWS need more
CACHED_BYTES = 8 * 2**20  # of logits that stay in the last cache until they have become gradients
MIN_ROWS = 32  # per branch; fewer would spend the time on reading the head
BLOCK_BYTES = 4 * 2**20  # of one branch's logits in a pass; a few of them fit into the last cache
TILE_BYTES = 2 * 2**20  # of the head in one product: more would be read from memory again and again


class _Branch(NamedTuple):
    """Rows of a branch, hidden or logits, in the order of their base rows.

    rows: (k, ...)
    at:   (k,) places of their base rows, ascending; None: every base row has one, or none has
    """

    rows: Tensor
    at: Tensor | None = None

    @property
    def size(self) -> int:
        return self.rows.shape[0]

    def of(self, values: Tensor) -> Tensor:
        """The `values` (base rows, ...) of those that have the branch; no copy if all have."""
        return values[: self.size] if self.at is None else values[self.at]

    def put(self, target: Tensor, values: Tensor) -> None:
        """`values` (k, ...) into their places of `target` (base rows, ...)."""
        if self.at is None:
            target[: self.size] = values
        else:
            target[self.at] = values

    def between(self, start: int, stop: int) -> tuple["_Branch", slice]:
        """What belongs to these base rows, and where in `rows` it lies."""
        if self.at is None:
            own = slice(start, min(stop, self.size))
            whole = own.start == 0 and own.stop == self.size
            return self if whole else _Branch(self.rows[own]), own
        own = slice(*torch.searchsorted(self.at, torch.tensor([start, stop])).tolist())
        return _Branch(self.rows[own], self.at[own] - start), own


class _Rows(NamedTuple):
    """The rows that count, and what their losses count. Fields as in `Problem`."""

    hidden: Tensor
    labels: Tensor
    negative: _Branch
    exemplar: _Branch
    weight: Tensor
    factors: Sequence[float]  # f_v, f_e, f_k, f_c
    detach_exemplar: bool
    dtype: torch.dtype


def chunked_rows(problem: Problem, wanted: Wanted, row_scale: Tensor | None = None) -> Result:
    """Losses and gradients; `row_scale` (rows,) scales each row's part of the head's gradient.

    Raises ValueError for labels and row numbers that name nothing.
    """
    hidden, labels, base = problem.hidden, problem.labels, None
    if not check_values(
        labels, problem.weight, hidden, problem.exemplar_rows, problem.negative_rows
    ):  # ignored rows are not even projected
        base = counted(labels).nonzero()[:, 0]
        hidden = hidden[base]
        row_scale = None if row_scale is None else row_scale[base]
    negative, of_negative = _in_order(problem.negative, problem.negative_rows, base, labels)
    exemplar, of_exemplar = _in_order(problem.exemplar, problem.exemplar_rows, base, labels)
    counts = [max(1, n) for n in (len(hidden), exemplar.size, exemplar.size, negative.size)]
    factors = problem.weights
    if problem.mean:  # relative to one base row: in the usual case 1, a pass less over the logits
        factors = [w * counts[0] / count for w, count in zip(factors, counts, strict=True)]

    rows = _Rows(
        hidden, labels if base is None else labels[base], negative, exemplar, problem.weight,
        factors, problem.detach_exemplar, problem.dtype,
    )  # fmt: skip
    losses, row_gradient, head_gradient = _counted_rows(rows, wanted, row_scale)
    if problem.mean:
        losses = losses.sum(dim=1).div_(losses.new_tensor(counts))
        for gradient in (row_gradient, head_gradient):
            if gradient is not None and counts[0] > 1:
                gradient.div_(counts[0])
    elif base is not None:
        losses = losses.new_zeros(4, len(labels)).index_copy_(1, base, losses)
    moved = base is not None or of_negative is not None or of_exemplar is not None
    if row_gradient is not None and moved:
        stacked = [(problem.hidden, base), (problem.negative, of_negative)]
        if wanted.exemplar:
            stacked.append((problem.exemplar, of_exemplar))
        row_gradient = _as_given(row_gradient, stacked)
    return Result(losses, row_gradient, head_gradient)


def _in_order(
    branch: Tensor, rows: Tensor | None, base: Tensor | None, labels: Tensor
) -> tuple[_Branch, Tensor | None]:
    """The rows of a branch that count, and their numbers in the branch; None: all, as they are.

    rows: numbers of the base rows that they belong to; base: of those that count; None: all
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
    """Gradients of the rows that count, in the places of these among all; 0 for the others."""
    places, total = [], 0
    for rows, number in stacked:
        places.append((torch.arange(len(rows)) if number is None else number) + total)
        total += len(rows)
    full = gradient.new_zeros(total, gradient.shape[1])
    return full.index_copy_(0, torch.cat(places), gradient)


def _counted_rows(
    rows: _Rows, wanted: Wanted, row_scale: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Losses (4, rows); gradients of the base, negative and exemplar rows; that of the head."""
    count, negatives, exemplars = len(rows.hidden), rows.negative.size, rows.exemplar.size
    weight, dtype = rows.weight, rows.dtype
    vocab, width = weight.shape
    losses = torch.zeros(4, count, dtype=dtype)
    row_gradient = head_gradient = None
    if wanted.hidden or wanted.exemplar:
        kept = count + negatives + (exemplars if wanted.exemplar else 0)
        row_gradient = torch.empty(kept, width, dtype=dtype)
    if wanted.weight:
        head_gradient = torch.zeros(weight.shape, dtype=dtype)

    branches = 1 + bool(negatives) + bool(exemplars)
    size = chunk_rows(count, branches * vocab * dtype.itemsize, weight.nbytes)
    buffer = torch.empty(branches * min(size, count), vocab, dtype=dtype)
    for start in range(0, count, size):
        stop = min(start + size, count)
        negative, own_negative = rows.negative.between(start, stop)
        exemplar, own_exemplar = rows.exemplar.between(start, stop)
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
            only = a_end == count  # chunk: its rows stand as all of them do
            of_inputs = row_gradient if only else torch.empty(end, width, dtype=dtype)
            back(logits[:end], weight, of_inputs)
            _share_difference(of_inputs[:a_end], of_inputs[a_end:d_end], negative)
            if not only:
                row_gradient[start:stop] = of_inputs[:a_end]
                row_gradient[count:][own_negative] = of_inputs[a_end:d_end]
                if wanted.exemplar:
                    row_gradient[count + negatives :][own_exemplar] = of_inputs[d_end:]
        if head_gradient is not None:
            if row_scale is not None:
                scale = row_scale[start:stop]
                scales = torch.cat([scale, negative.of(scale), exemplar.of(scale)])
                inputs = inputs * scales[:, None]
            head_gradient.addmm_(logits.T, inputs)
    return losses, row_gradient, head_gradient


def _share_difference(of_base: Tensor, of_difference: Tensor, negative: _Branch) -> None:
    """The gradient of h_a - h_n, in place: to h_a it is added, of h_n it becomes the negative."""
    if negative.size == 0:
        return
    if negative.at is None:
        of_base.add_(of_difference)
    else:
        of_base.index_add_(0, negative.at, of_difference)
    of_difference.neg_()


def chunk_rows(rows: int, row_bytes: int, head_bytes: int) -> int:
    """Base rows of a chunk, MIN_ROWS at least; all chunks but the last have as many.

    Each chunk reads the head: logits of as many bytes as the head are worth that, and of a small
    head as many as the cache holds, but never more than LOGIT_BYTES.
    row_bytes: of one row's logits in all branches
    """
    limit = min(LOGIT_BYTES, max(CACHED_BYTES, head_bytes))
    most = max(MIN_ROWS, limit // row_bytes)
    chunks = max(1, -(-rows // most))
    return max(MIN_ROWS, -(-rows // chunks))


def project(inputs: Tensor, weight: Tensor, logits: Tensor) -> Tensor:
    """`logits` (rows, vocab) = inputs (rows, hidden) weightᵀ, a tile of the head at a time.

    One product with a whole large head takes up to half as long again: the library packs all of it.
    """
    if weight.nbytes <= TILE_BYTES and weight.dtype == logits.dtype:
        return torch.mm(inputs, weight.T, out=logits)
    for tile, part in _tiles(weight, logits.dtype):
        torch.mm(inputs, part.T, out=logits[:, tile])
    return logits


def back(gradient: Tensor, weight: Tensor, of_inputs: Tensor) -> None:
    """`of_inputs` (rows, hidden) = gradient (rows, vocab) weight.

    A head of 16 bits is widened a tile at a time: as a whole it would be twice its own size.
    """
    if weight.dtype == gradient.dtype:
        torch.mm(gradient, weight, out=of_inputs)
        return
    of_inputs.zero_()
    for tile, part in _tiles(weight, gradient.dtype):
        of_inputs.addmm_(gradient[:, tile], part)


def _tiles(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Which rows of the head, and these in the dtype that is computed in."""
    size = max(1, TILE_BYTES // max(1, weight.shape[1] * dtype.itemsize))
    for start in range(0, len(weight), size):
        tile = slice(start, start + size)
        yield tile, weight[tile].to(dtype)


class _Logits(NamedTuple):
    """Logits of some base rows (rows, vocab) and of their rows in the branches: d is a - n."""

    a: Tensor
    d: _Branch
    b: _Branch
    y: Tensor  # (rows, 1)

    def between(self, start: int, stop: int) -> "_Logits":
        d, b = (branch.between(start, stop)[0] for branch in (self.d, self.b))
        return _Logits(self.a[start:stop], d, b, self.y[start:stop])


def _chunk(chunk: _Logits, rows: _Rows, wanted: Wanted, losses: Tensor) -> None:
    """Fill the losses (4, chunk rows); logits become their gradients, in place, by blocks."""
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
    """Fill the losses (4, rows). Leaves p, r and q in the places of a, d and b, and δ in its own.

    Returns E_p[δ] (with_b, 1).
    """
    a, d, b, y = block
    if b.size:
        torch.sub(b.of(a), b.rows, out=delta)
    losses[0], peak_a, share_a = _softmax(a, y)
    if d.size:
        d.put(losses[3], _softmax(d.rows, d.of(y))[0])
    if not b.size:
        return delta  # of no rows
    loss, peak_b, share_b = _softmax(b.rows, b.of(y))
    b.put(losses[1], loss)
    mean_delta = torch.linalg.vecdot(b.of(a), delta)
    # One logarithm of a ratio near 1, not two of large sums: both nearly agree.
    log_ratio = (share_b / b.of(share_a)).log_()
    b.put(losses[2], mean_delta - (b.of(peak_a) - peak_b) - log_ratio)
    return mean_delta[:, None]


def _softmax(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (rows, vocab) becomes softmax(x); lse(x) - x_y, the largest x and its share, (rows,) each.

    The largest share is 1 / sum(exp(x - max)): no pass of its own for the sum.
    """
    own = x.gather(1, y).squeeze(1)
    peak = x.amax(dim=-1)
    share = torch.softmax(x, dim=-1, out=x).amax(dim=-1)
    return peak - own - share.log(), peak, share


def _gradients(
    block: _Logits, delta: Tensor, mean_delta: Tensor, rows: _Rows, *, of_exemplar: bool
) -> None:
    """Turn p, r and q (only `of_exemplar`) into da, dd and db, in place; δ is used up."""
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
    if factor != 1:  # a pass less in the usual case
        x.mul_(factor)


def _subtract_label(x: Tensor, factor: float, y: Tensor) -> None:
    """x (rows, vocab) - factor e_y, in place."""
    if factor:
        x.scatter_(1, y, -factor, reduce="add")
