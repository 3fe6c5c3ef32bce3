"""What a joint loss is computed from, and what an implementation returns.

    hidden rows   base        h_a (rows, hidden)         a = h_a Wᵀ    image and instruction
                  exemplar    h_b (exemplars, hidden)    b = h_b Wᵀ    the same with an exemplar
                  negative    h_n (negatives, hidden)    n = h_n Wᵀ    the same with a wrong image

With p, q, r = softmax of a, b, d = a - n, label y, δ = a - b, and lse = log-sum-exp, per row:

    response  lse_a - a_y                 exemplar  lse_b - b_y           (eq. 1, eq. 2)
    rda       KL(p||q) = E_p[δ] - lse_a + lse_b                           (eq. 3)
    crt       lse_d - d_y                                                 (eq. 5, 6)

    L  = f_v response + f_e exemplar + f_k rda + f_c crt
    da = f_v (p - e_y) + f_k p (δ - E_p[δ])     db = f_e (q - e_y) [+ f_k (q - p) if not detached]
    dd = f_c (r - e_y)
    dh_a = (da + dd) W     dh_b = db W     dh_n = -dd W
    dW = daᵀ h_a + dbᵀ h_b + ddᵀ (h_a - h_n)

Source: Bai et al. 2024, arXiv:2410.06456. We derived the gradients.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Reduction = Literal["mean", "none"]
IGNORE_INDEX = -100  # the label of prompt and padding positions, which enter no loss
LOSSES = ("response", "exemplar", "rda", "crt")


class Problem(NamedTuple):
    """The inputs of one joint loss, checked. An absent branch has zero rows.

    hidden, exemplar, negative: (rows, H), (exemplars, H), (negatives, H), all of one dtype
    exemplar_rows, negative_rows: int64; entry i is the base row that row i of the branch belongs
             to. Each base row occurs at most once. None: row i belongs to base row i.
    weight:  (vocab, H), the head
    labels:  (rows,) int64; IGNORE_INDEX marks rows that enter no loss
    loss_weights: of the losses in the total, in the order of LOSSES
    detach_exemplar: whether rda sends no gradient into the exemplar branch
    mean:    True: f = loss weight / counted rows of that loss, where 1/0 is 0.
             False: f = loss weight.
    """

    hidden: Tensor
    exemplar: Tensor
    exemplar_rows: Tensor | None
    negative: Tensor
    negative_rows: Tensor | None
    weight: Tensor
    labels: Tensor
    loss_weights: Sequence[float]
    detach_exemplar: bool
    mean: bool

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of logits and statistics: float32, or float64 for float64 inputs."""
        return torch.promote_types(self.hidden.dtype, torch.float32)


class Wanted(NamedTuple):
    """Which gradients to compute.

    hidden:   of the base rows and the negative rows
    exemplar: of the exemplar rows
    weight:   of the head
    """

    hidden: bool
    exemplar: bool
    weight: bool


class Result(NamedTuple):
    """What an implementation computes.

    losses: in nats and in the order of LOSSES: (4,) means, or (4, rows) without `mean`. Rows
            without a loss have 0.
    hidden: gradients of L, summed over the rows: (rows + negatives + exemplars, H), or
            (rows + negatives, H) if those of the exemplars are not wanted. None if no gradient
            of a row is wanted.
    weight: (vocab, H) gradient; None if it is not wanted

    An implementation that cannot raise for wrong values gives a row with a label outside the
    vocabulary NaN losses and a zero gradient.
    """

    losses: Tensor
    hidden: Tensor | None
    weight: Tensor | None


def slots(rows: Tensor | None, count: int, base: Tensor) -> Tensor:
    """The inverse of `rows`: (base rows,) int64, each base row's index in the branch, -1 for none.

    rows:  (count,) int64, the base row of each branch row; None: row i belongs to base row i
    count: number of rows of the branch
    base:  (base rows, ...), any tensor with one row per base row, on their device
    For duplicates the last wins; out-of-range numbers are ignored. Does not wait for the device.
    """
    base_rows = len(base)
    if not count:
        return torch.full((base_rows,), -1, device=base.device)
    number = torch.arange(count, device=base.device)
    if rows is None:
        return number
    inside = (rows >= 0) & (rows < base_rows)
    target = rows.where(inside, base_rows)  # out-of-range numbers share an extra slot, cut off
    inverse = torch.full((base_rows + 1,), -1, device=base.device)
    return inverse.scatter_reduce(0, target, number, "amax")[:base_rows]


def spread(values: Tensor, slot_of: Tensor, count: int) -> Tensor:
    """Values (base rows,) of base rows, moved to the `count` rows of a branch.

    slot_of: as `slots` returns it. A branch row that belongs to no base row gets 0.
    """
    target = slot_of.where(slot_of >= 0, count)  # rows without the branch share a slot, cut off
    return values.new_zeros(count + 1).scatter_(0, target, values)[:count]


def all_owned(slot_of: Tensor, count: int) -> Tensor:
    """() bool: whether each of the `count` rows of a branch belongs to a different base row.

    False if a row number is out of range or given twice. slot_of: as `slots` returns it.
    """
    return spread(torch.ones_like(slot_of, dtype=torch.bool), slot_of, count).all()


def counted(labels: Tensor) -> Tensor:
    """(rows,) bool: the rows that enter a loss."""
    return labels != IGNORE_INDEX


def check_values(problem: Problem) -> bool:
    """Check labels and row numbers; return whether every row is counted.

    Raises ValueError for a label outside the vocabulary and for a row number that is out of range
    or given twice. Not for tensors on CUDA: reading them would stall the stream.
    """
    vocab, base_rows = len(problem.weight), len(problem.hidden)
    outside = _outside(problem.labels, vocab)
    if len(outside) and len(wrong := outside[counted(outside)]):
        raise ValueError(
            f"label {int(wrong[0])} lies outside the vocabulary of {vocab}; "
            f"expected 0 to {vocab - 1}, or {IGNORE_INDEX} for an ignored row"
        )
    for name, rows in (
        ("exemplar_rows", problem.exemplar_rows),
        ("negative_rows", problem.negative_rows),
    ):
        if rows is None:
            continue
        if len(wrong := _outside(rows, base_rows)):
            raise ValueError(
                f"{name} contains {int(wrong[0])}, but hidden has {base_rows} rows; "
                f"expected 0 to {base_rows - 1}"
            )
        if len(rows) and rows.bincount().max() > 1:
            raise ValueError(f"{name} contains a row of hidden twice; expected each at most once")
    return len(outside) == 0


def _outside(numbers: Tensor, count: int) -> Tensor:
    """The numbers outside 0 to count - 1. Takes one pass in the usual case, where none is."""
    if len(numbers):
        least, most = map(int, numbers.aminmax())
        if least < 0 or most >= count:
            return numbers[(numbers < 0) | (numbers >= count)]
    return numbers[:0]
