"""The joint loss on the CPU: chunks of rows, so that [rows, vocab] never exists as a whole.

The formulas stand in `kernels/problem.py`; here each line is a pass of PyTorch over a block of
logits that stays in a core's cache, in place wherever it can be. As the head has no bias, the
logits d = a - n are those of the rows h_a - h_n: computed in float32, n itself is not needed.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.problem import Problem, RowResult, Wanted, counted

LOGIT_BYTES = 64 * 2**20  # of all branches of a chunk together, unless MIN_ROWS need more
MIN_ROWS = 32  # per branch; fewer would spend the time on reading the head
BLOCK_BYTES = 4 * 2**20  # of one branch's logits in a pass; a few of them fit into the last cache
TILE_BYTES = 2 * 2**20  # of the head in one product: more would be read from memory again and again


def chunked_rows(problem: Problem, wanted: Wanted, row_scale: Tensor | None = None) -> RowResult:
    """Losses and gradients; `row_scale` (rows,) scales each row's part of the head's gradient."""
    use = counted(problem.labels)
    if use.all():
        return _counted_rows(problem, wanted, row_scale)
    # Ignored rows are not even projected: without them, and zeros in their places.
    few = problem._replace(
        hidden=problem.hidden[use],
        labels=problem.labels[use],
        negative_of=problem.negative_of[use],
        exemplar_of=problem.exemplar_of[use],
    )
    result = _counted_rows(few, wanted, None if row_scale is None else row_scale[use])
    losses = result.losses.new_zeros(4, len(use))
    losses[:, use] = result.losses
    gradient = result.hidden
    if gradient is not None:
        of_hidden = gradient.new_zeros(problem.hidden.shape)
        of_hidden[use] = gradient[: len(few.hidden)]
        gradient = torch.cat([of_hidden, gradient[len(few.hidden) :]])
    return RowResult(losses, gradient, result.weight)


def _counted_rows(problem: Problem, wanted: Wanted, row_scale: Tensor | None) -> RowResult:
    """`chunked_rows` where no row is ignored."""
    rows, negatives = len(problem.hidden), len(problem.negative)
    dtype, weight = problem.dtype, problem.weight
    vocab = len(weight)
    losses = torch.zeros(4, rows, dtype=dtype)
    hidden_gradient = weight_gradient = None
    if wanted.hidden or wanted.exemplar:
        kept = rows + negatives + (len(problem.exemplar) if wanted.exemplar else 0)
        hidden_gradient = torch.zeros(kept, problem.hidden.shape[1], dtype=dtype)
    if wanted.weight:
        weight_gradient = torch.zeros(weight.shape, dtype=dtype)

    branches = 1 + bool(negatives) + bool(len(problem.exemplar))
    size = chunk_rows(rows, branches * vocab * dtype.itemsize)
    buffer = torch.empty(branches * min(size, rows), vocab, dtype=dtype)
    for start in range(0, rows, size):
        chunk = slice(start, min(start + size, rows))
        negative = _own(problem.negative_of[chunk], negatives)
        exemplar = _own(problem.exemplar_of[chunk], len(problem.exemplar))
        base = inputs = problem.hidden[chunk].to(dtype)
        if negatives:
            difference = base[negative.at] - problem.negative[negative.number].to(dtype)
            inputs = torch.cat([inputs, difference])
        split = len(inputs)
        if len(problem.exemplar):
            inputs = torch.cat([inputs, problem.exemplar[exemplar.number].to(dtype)])
        logits = project(inputs, weight, buffer[: len(inputs)])
        labels = problem.labels[chunk]
        losses[:, chunk] = _chunk(logits, problem, wanted, labels, negative.at, exemplar.at)
        if hidden_gradient is not None:
            of_inputs = back(logits[: None if wanted.exemplar else split], weight)
            of_base = hidden_gradient[chunk]
            of_base.copy_(of_inputs[: len(base)])
            if negatives:
                of_difference = of_inputs[len(base) : split]
                of_base.index_add_(0, negative.at, of_difference)
                hidden_gradient[rows + negative.number] = -of_difference
            if wanted.exemplar:
                hidden_gradient[rows + negatives + exemplar.number] = of_inputs[split:]
        if weight_gradient is not None:
            if row_scale is not None:
                scale = row_scale[chunk]
                scales = torch.cat([scale, scale[negative.at], scale[exemplar.at]])
                inputs = inputs * scales[:, None]
            weight_gradient.addmm_(logits.T, inputs)
    return RowResult(losses, hidden_gradient, weight_gradient)


def chunk_rows(rows: int, row_bytes: int) -> int:
    """Base rows of a chunk: as many as LOGIT_BYTES hold, but MIN_ROWS at least, and chunks of one
    size, for each of them reads the whole head. row_bytes: of one row's logits in all branches."""
    most = max(MIN_ROWS, LOGIT_BYTES // row_bytes)
    chunks = max(1, -(-rows // most))
    return max(MIN_ROWS, -(-rows // chunks))


def project(inputs: Tensor, weight: Tensor, logits: Tensor) -> Tensor:
    """`logits` (rows, vocab) = inputs (rows, hidden) weightᵀ, a tile of the head at a time.

    One product with the whole head takes up to half as long again: the library packs all of it.
    """
    for tile, part in _tiles(weight, logits.dtype):
        torch.mm(inputs, part.T, out=logits[:, tile])
    return logits


def back(gradient: Tensor, weight: Tensor) -> Tensor:
    """gradient (rows, vocab) weight: (rows, hidden), in the gradient's dtype.

    A head of 16 bits is widened a tile at a time: as a whole it would be twice its own size.
    """
    if weight.dtype == gradient.dtype:
        return gradient @ weight
    total = gradient.new_zeros(len(gradient), weight.shape[1])
    for tile, part in _tiles(weight, gradient.dtype):
        total.addmm_(gradient[:, tile], part)
    return total


def _tiles(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Which rows of the head, and these in the dtype that is computed in."""
    size = max(1, TILE_BYTES // max(1, weight.shape[1] * dtype.itemsize))
    for start in range(0, len(weight), size):
        tile = slice(start, start + size)
        yield tile, weight[tile].to(dtype)


class _Own(NamedTuple):
    """The rows of a branch that belong to a chunk of base rows.

    at: (k,) their places among the chunk's base rows, ascending; number: (k,) in the branch
    """

    at: Tensor
    number: Tensor


def _own(number: Tensor, count: int) -> _Own:
    if not count:
        return _Own(number[:0], number[:0])
    at = (number >= 0).nonzero()[:, 0]
    return _Own(at, number[at])


class _Block(NamedTuple):
    """Logits of a few base rows and of their rows in the other branches.

    with_d, with_b: which of the base rows have a negative, an exemplar
    """

    a: Tensor  # (rows, vocab)
    d: Tensor  # (with_d, vocab), a - n
    b: Tensor  # (with_b, vocab)
    with_d: Tensor
    with_b: Tensor
    y: Tensor  # (rows, 1)

    def of_d(self, values: Tensor) -> Tensor:
        """The rows of `values` (rows, ...) that have a negative; no copy if all have."""
        return values if len(self.d) == len(self.a) else values[self.with_d]

    def of_b(self, values: Tensor) -> Tensor:
        return values if len(self.b) == len(self.a) else values[self.with_b]


def _chunk(
    logits: Tensor,
    problem: Problem,
    wanted: Wanted,
    labels: Tensor,
    with_negative: Tensor,
    with_exemplar: Tensor,
) -> Tensor:
    """Losses (4, chunk rows); turns the stacked logits into their gradients, in place."""
    base = len(labels)
    factors = problem.factors.tolist()
    losses = torch.zeros(4, base, dtype=logits.dtype)
    d_end, b_end = base, base + len(with_negative)
    size = max(1, BLOCK_BYTES // (logits.shape[1] * logits.itemsize))
    spare = logits.new_empty(min(size, base) if len(with_exemplar) else 0, logits.shape[1])
    for start in range(0, base, size):
        stop = min(start + size, base)
        with_d, with_b = (_within(at, start, stop) for at in (with_negative, with_exemplar))
        d_start, b_start = d_end, b_end
        d_end, b_end = d_start + len(with_d), b_start + len(with_b)
        block = _Block(
            a=logits[start:stop],
            d=logits[d_start:d_end],
            b=logits[b_start:b_end],
            with_d=with_d,
            with_b=with_b,
            y=labels[start:stop, None],
        )
        delta = spare[: len(with_b)]
        mean_delta = _losses(block, delta, losses[:, start:stop])
        if any(wanted):
            _gradients(
                block,
                delta,
                mean_delta,
                factors,
                of_exemplar=wanted.exemplar or wanted.weight,
                detach=problem.detach_exemplar,
            )
    return losses


def _within(at: Tensor, start: int, stop: int) -> Tensor:
    """Of ascending places those of a block, counted from its start."""
    return at[(at >= start) & (at < stop)] - start if len(at) else at


def _losses(block: _Block, delta: Tensor, losses: Tensor) -> Tensor:
    """Fill the losses (4, rows). Leaves p, r and q in the places of a, d and b, and δ in its own.

    Returns E_p[δ] (with_b, 1).
    """
    a, d, b = block.a, block.d, block.b
    if len(b):
        torch.sub(block.of_b(a), b, out=delta)
    losses[0], peak_a, share_a = _softmax(a, block.y)
    if len(d):
        losses[3, block.with_d], _, _ = _softmax(d, block.of_d(block.y))
    if not len(b):
        return a.new_empty(0, 1)
    losses[1, block.with_b], peak_b, share_b = _softmax(b, block.of_b(block.y))
    mean_delta = torch.linalg.vecdot(block.of_b(a), delta)
    # One logarithm of a ratio near 1, not two of large sums: both nearly agree.
    log_ratio = (share_b / block.of_b(share_a)).log()
    losses[2, block.with_b] = mean_delta - (block.of_b(peak_a) - peak_b) - log_ratio
    return mean_delta[:, None]


def _softmax(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (rows, vocab) becomes softmax(x); lse(x) - x_y, the largest x and its share, (rows,) each.

    The largest share is 1 / sum(exp(x - max)): no pass of its own for the sum.
    """
    own = x.gather(1, y)[:, 0]
    peak = x.amax(dim=-1)
    share = torch.softmax(x, dim=-1, out=x).amax(dim=-1)
    return peak - own - share.log(), peak, share


def _gradients(
    block: _Block,
    delta: Tensor,
    mean_delta: Tensor,
    factors: list[float],
    *,
    of_exemplar: bool,
    detach: bool,
) -> None:
    """Turn p, r and q (only `of_exemplar`) into da, dd and db, in place; δ is used up."""
    a, d, b, y = block.a, block.d, block.b, block.y
    f_v, f_e, f_k, f_c = factors
    if len(d):
        _scale(d, f_c)
        _subtract_label(d, f_c, block.of_d(y))
    if of_exemplar and len(b):
        _scale(b, f_e if detach else f_e + f_k)
        if not detach:
            b.sub_(block.of_b(a), alpha=f_k)
        _subtract_label(b, f_e, block.of_b(y))
    if not (len(b) and f_k):
        _scale(a, f_v)
    else:
        # p ⊙ (f_v + f_k (δ - E_p[δ]))
        _scale(delta, f_k)
        slope = delta.sub_(f_k * mean_delta - f_v)
        if len(b) == len(a):
            a.mul_(slope)
        else:
            with_b = block.of_b(a).mul_(slope)
            _scale(a, f_v)
            a[block.with_b] = with_b
    _subtract_label(a, f_v, y)


def _scale(x: Tensor, factor: float) -> None:
    if factor != 1:  # a pass less in the usual case
        x.mul_(factor)


def _subtract_label(x: Tensor, factor: float, y: Tensor) -> None:
    """x (rows, vocab) - factor e_y, in place."""
    x.scatter_add_(1, y, x.new_full(y.shape, -factor))
