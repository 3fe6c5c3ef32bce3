"""The joint loss on the CPU: chunks of rows, so that [rows, vocab] never exists as a whole.

The formulas stand in `kernels/problem.py`; here each line is a pass of PyTorch over a block of
logits that stays in a core's cache, in place wherever it can be.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.problem import Problem, RowResult, Wanted, counted

LOGIT_BYTES = 64 * 2**20  # at most, of all branches of a chunk together
MIN_ROWS = 32  # per branch; fewer would spend the time on reading the head
BLOCK_BYTES = 2**20  # of one branch's logits in a pass; a few of them fit into the L2 of a core


def chunked_rows(problem: Problem, wanted: Wanted, row_scale: Tensor | None = None) -> RowResult:
    """Losses and gradients; `row_scale` (rows,) scales each row's part of the head's gradient."""
    rows, negatives = len(problem.hidden), len(problem.negative)
    dtype, vocab = problem.dtype, len(problem.weight)
    weight = problem.weight.to(dtype)
    losses = torch.zeros(4, rows, dtype=dtype)
    hidden_gradient = weight_gradient = None
    if wanted.hidden or wanted.exemplar:
        kept = rows + negatives + (len(problem.exemplar) if wanted.exemplar else 0)
        hidden_gradient = torch.zeros(kept, problem.hidden.shape[1], dtype=dtype)
    if wanted.weight:
        weight_gradient = torch.zeros(weight.shape, dtype=dtype)

    branches = 1 + bool(negatives) + bool(len(problem.exemplar))
    size = max(MIN_ROWS, LOGIT_BYTES // (branches * vocab * dtype.itemsize))
    use = counted(problem.labels).nonzero()[:, 0]  # ignored rows are not even projected
    parts = max(1, -(-len(use) // size))  # of one size: each reads the whole head
    buffer = torch.empty(branches * -(-len(use) // parts), vocab, dtype=dtype)
    for chunk in use.tensor_split(parts):
        negative = _own(problem.negative_of, chunk, negatives)
        exemplar = _own(problem.exemplar_of, chunk, len(problem.exemplar))
        inputs = problem.hidden[chunk]
        for branch, own in ((problem.negative, negative), (problem.exemplar, exemplar)):
            if len(branch):
                inputs = torch.cat([inputs, branch[own.number]])
        inputs = inputs.to(dtype)
        logits = torch.mm(inputs, weight.T, out=buffer[: len(inputs)])
        losses[:, chunk] = _chunk(logits, problem, chunk, negative.at, exemplar.at, any(wanted))
        if hidden_gradient is not None:
            place = chunk
            if negatives:
                place = torch.cat([place, rows + negative.number])
            if wanted.exemplar:
                place = torch.cat([place, rows + negatives + exemplar.number])
            hidden_gradient[place] = logits[: len(place)] @ weight
        if weight_gradient is not None:
            if row_scale is not None:
                scale = row_scale[chunk]
                inputs *= torch.cat([scale, scale[negative.at], scale[exemplar.at]])[:, None]
            weight_gradient.addmm_(logits.T, inputs)
    return RowResult(losses, hidden_gradient, weight_gradient)


class _Own(NamedTuple):
    """The rows of a branch that belong to a chunk of base rows.

    at: (k,) their places among the chunk's base rows, ascending; number: (k,) in the branch
    """

    at: Tensor
    number: Tensor


def _own(slot_of: Tensor, chunk: Tensor, count: int) -> _Own:
    if not count:
        return _Own(chunk[:0], chunk[:0])
    number = slot_of[chunk]
    at = (number >= 0).nonzero()[:, 0]
    return _Own(at, number[at])


def _chunk(
    logits: Tensor,
    problem: Problem,
    chunk: Tensor,
    with_negative: Tensor,
    with_exemplar: Tensor,
    gradient: bool,
) -> Tensor:
    """Losses (4, chunk rows); turns the stacked logits into their gradients, in place."""
    base = len(chunk)
    labels = problem.labels[chunk]
    factors = problem.factors.tolist()
    losses = torch.zeros(4, base, dtype=logits.dtype)
    n_end, b_end = base, base + len(with_negative)
    size = max(1, BLOCK_BYTES // (logits.shape[1] * logits.itemsize))
    spare = logits.new_empty(min(size, base) if len(with_exemplar) else 0, logits.shape[1])
    for start in range(0, base, size):
        stop = min(start + size, base)
        with_n, with_b = (_within(at, start, stop) for at in (with_negative, with_exemplar))
        n_start, b_start = n_end, b_end
        n_end, b_end = n_start + len(with_n), b_start + len(with_b)
        block = _Block(
            a=logits[start:stop],
            n=logits[n_start:n_end],
            b=logits[b_start:b_end],
            with_n=with_n,
            with_b=with_b,
            y=labels[start:stop, None],
        )
        losses[:, start:stop], state = _losses(block, spare[: len(with_b)])
        if gradient:
            _gradients(block, state, factors, problem.detach_exemplar)
    return losses


def _within(at: Tensor, start: int, stop: int) -> Tensor:
    """Of ascending places those of a block, counted from its start."""
    return at[(at >= start) & (at < stop)] - start if len(at) else at


class _Block(NamedTuple):
    """Logits of a few base rows and of their rows in the other branches.

    with_n, with_b: which of the base rows have a negative, an exemplar
    """

    a: Tensor  # (rows, vocab)
    n: Tensor  # (with_n, vocab)
    b: Tensor  # (with_b, vocab)
    with_n: Tensor
    with_b: Tensor
    y: Tensor  # (rows, 1)

    def of_n(self, values: Tensor) -> Tensor:
        """The rows of `values` (rows, ...) that have a negative; no copy if all have."""
        return values if len(self.n) == len(self.a) else values[self.with_n]

    def of_b(self, values: Tensor) -> Tensor:
        return values if len(self.b) == len(self.a) else values[self.with_b]


class _State(NamedTuple):
    """What the gradients take over: sums of the exponentials, δ and its mean under p."""

    sum_a: Tensor  # (rows, 1)
    sum_b: Tensor
    sum_d: Tensor
    delta: Tensor  # (with_b, vocab)
    mean_delta: Tensor  # (with_b, 1)


def _losses(block: _Block, delta: Tensor) -> tuple[Tensor, _State]:
    """Losses (4, rows). Leaves exp(x - max) of a, b and d in the places of a, b and n."""
    a, n, b = block.a, block.n, block.b
    losses = torch.zeros(4, len(a), dtype=a.dtype)
    sum_b = sum_d = mean_delta = a.new_empty(0, 1)
    a_y = a.gather(1, block.y)
    if len(b):
        torch.sub(block.of_b(a), b, out=delta)
    if len(n):
        d = torch.sub(block.of_n(a), n, out=n)
        d_y = d.gather(1, block.of_n(block.y))
        max_d, sum_d = _exponentials(d)
        losses[3, block.with_n] = (max_d - d_y + sum_d.log())[:, 0]
    max_a, sum_a = _exponentials(a)
    losses[0] = (max_a - a_y + sum_a.log())[:, 0]
    if len(b):
        b_y = b.gather(1, block.of_b(block.y))
        max_b, sum_b = _exponentials(b)
        mean_delta = torch.linalg.vecdot(block.of_b(a), delta)[:, None] / block.of_b(sum_a)
        # One logarithm of a ratio near 1, not two of large sums: both nearly agree.
        rda = mean_delta - (block.of_b(max_a) - max_b) - (block.of_b(sum_a) / sum_b).log()
        losses[1, block.with_b] = (max_b - b_y + sum_b.log())[:, 0]
        losses[2, block.with_b] = rda[:, 0]
    return losses, _State(sum_a, sum_b, sum_d, delta, mean_delta)


def _exponentials(x: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum and sum of exp(x - maximum), (rows, 1) each; x becomes these exponentials."""
    top = x.amax(dim=-1, keepdim=True)
    x.sub_(top).exp_()
    return top, x.sum(dim=-1, keepdim=True)


def _gradients(block: _Block, state: _State, factors: list[float], detach: bool) -> None:
    """Turn the exponentials in the places of a, b and n into da + dd, db and -dd."""
    a, n, b, y = block.a, block.n, block.b, block.y
    f_v, f_e, f_k, f_c = factors
    if not len(b):
        a.mul_(f_v / state.sum_a)
    else:
        sum_a = block.of_b(state.sum_a)
        b.mul_((f_e if detach else f_e + f_k) / state.sum_b)
        if not detach:
            b.sub_(block.of_b(a) * (f_k / sum_a))
        b.scatter_add_(1, block.of_b(y), b.new_full((len(b), 1), -f_e))
        # da = p ⊙ (f_v + f_k (δ - E_p[δ])) - f_v e_y
        slope = state.delta.mul_(f_k / sum_a).add_((f_v - f_k * state.mean_delta) / sum_a)
        if len(b) == len(a):
            a.mul_(slope)
        else:
            with_b = block.of_b(a).mul_(slope)
            a.mul_(f_v / state.sum_a)
            a[block.with_b] = with_b
    a.scatter_add_(1, y, a.new_full((len(a), 1), -f_v))
    if not len(n):
        return
    n.mul_(-f_c / state.sum_d)
    n.scatter_add_(1, block.of_n(y), n.new_full((len(n), 1), f_c))
    if len(n) == len(a):
        a.sub_(n)
    else:
        a.index_add_(0, block.with_n, n, alpha=-1)
