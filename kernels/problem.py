"""What a joint loss is computed from, and what an implementation gives back.

    hidden rows   base        h_a (rows, hidden)         a = h_a Wᵀ    image and instruction
                  exemplar    h_b (exemplars, hidden)    b = h_b Wᵀ    the same with exemplar
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

Source: Bai et al. 2024, arXiv:2410.06456; the gradients are ours.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.reference import IGNORE_INDEX

PARTS = ("response", "exemplar", "rda", "crt")


class Problem(NamedTuple):
    """The rows of one joint loss; branches that are absent have no rows.

    hidden, exemplar, negative: (rows, H), (exemplars, H), (negatives, H), one dtype
    exemplar_rows, negative_rows: int64 numbers of the base rows that a branch's rows belong to,
             each once; None: to all of them, in order
    weight:  (vocab, H), the head
    labels:  (rows,) int64, IGNORE_INDEX for rows that count nowhere
    weights: of the losses in the total, in the order of PARTS
    detach_exemplar: whether rda sends no gradient into the exemplar branch
    mean:    f = weight / (counted rows of the loss), 1/0 being 0; otherwise f = weight
    """

    hidden: Tensor
    exemplar: Tensor
    exemplar_rows: Tensor | None
    negative: Tensor
    negative_rows: Tensor | None
    weight: Tensor
    labels: Tensor
    weights: Sequence[float]
    detach_exemplar: bool
    mean: bool

    @property
    def dtype(self) -> torch.dtype:
        """What logits and statistics are computed in: float32, or float64 when given float64."""
        return torch.promote_types(self.hidden.dtype, torch.float32)


class Wanted(NamedTuple):
    """Which gradients are computed: of hidden and negative rows, of exemplar rows, of the head."""

    hidden: bool
    exemplar: bool
    weight: bool


class Result(NamedTuple):
    """What an implementation computes.

    losses: (4,) means, or (4, rows) without `mean`: in the order of PARTS, 0 where there is none
    hidden: (rows + negatives + exemplars, H) gradients of L summed over the rows; without the
            exemplars' if these are not wanted, None if no gradient of a row is
    weight: (vocab, H) gradient, None if it is not wanted
    Rows with a label outside the vocabulary, which only an implementation that cannot stop to
    raise meets, have NaN losses and no gradient.
    """

    losses: Tensor
    hidden: Tensor | None
    weight: Tensor | None


def slots(rows: Tensor | None, count: int, base: Tensor) -> Tensor:
    """The inverse of `rows`: for each base row its number in the branch, -1 for none.

    rows: (count,) int64 numbers of the base rows that have the branch; None: all, in order.
    base: (rows, ...), whatever has as many rows, on their device.
    Of a row that is named twice the last counts, a number outside counts nowhere. Nothing here
    waits for the device.
    """
    of = len(base)
    if not count:
        return torch.full((of,), -1, device=base.device)
    number = torch.arange(count, device=base.device)
    if rows is None:
        return number
    inside = (rows >= 0) & (rows < of)
    target = rows.where(inside, of)  # what points outside goes into a slot of its own
    inverse = torch.full((of + 1,), -1, device=base.device)
    return inverse.scatter_reduce(0, target, number, "amax")[:of]


def spread(values: Tensor, slot_of: Tensor, count: int) -> Tensor:
    """Values (rows,) of base rows, for the `count` rows of a branch; 0 for rows without owner."""
    target = slot_of.where(slot_of >= 0, count)  # rows without the branch share a slot, cut off
    return values.new_zeros(count + 1).scatter_(0, target, values)[:count]


def all_owned(slot_of: Tensor, count: int) -> Tensor:
    """() bool: whether each of the `count` rows of a branch is some base row's own. One is not if
    its number lies outside, or was given twice."""
    return spread(torch.ones_like(slot_of, dtype=torch.bool), slot_of, count).all()


def counted(labels: Tensor) -> Tensor:
    """(rows,) bool: the rows that are part of a loss."""
    return labels != IGNORE_INDEX


def check_values(
    labels: Tensor,
    weight: Tensor,
    hidden: Tensor,
    exemplar_rows: Tensor | None,
    negative_rows: Tensor | None,
) -> bool:
    """ValueError for labels and row numbers that name nothing. Whether every row counts.

    Not for CUDA: a look there would stall the stream.
    """
    outside = _outside(labels, len(weight))
    if len(outside) and len(wrong := outside[counted(outside)]):
        raise ValueError(
            f"label {int(wrong[0])} lies outside the vocabulary of {len(weight)}; "
            f"expected 0 to {len(weight) - 1}, or {IGNORE_INDEX} for an ignored row"
        )
    for name, rows in (("exemplar_rows", exemplar_rows), ("negative_rows", negative_rows)):
        if rows is None:
            continue
        if len(wrong := _outside(rows, len(hidden))):
            raise ValueError(
                f"{name} names row {int(wrong[0])} of hidden, which has {len(hidden)} rows"
            )
        if len(rows) and rows.bincount().max() > 1:
            raise ValueError(f"{name} names a row of hidden twice; expected each once")
    return len(outside) == 0


def _outside(numbers: Tensor, count: int) -> Tensor:
    """Those that are not 0 to count - 1; one pass in the usual case, where all are."""
    if len(numbers):
        least, most = map(int, numbers.aminmax())
        if least < 0 or most >= count:
            return numbers[(numbers < 0) | (numbers >= count)]
    return numbers[:0]
