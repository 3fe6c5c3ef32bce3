"""Losses over hidden rows and the head of the language model, without keeping the logits.

Each of the four operations checks its arguments, builds one `Problem` (the joint loss of
`kernels/problem.py` with the branches and loss weights that it needs) and hands that to an
implementation. Losses are in nats: the mean over the counted rows, or per row with
`reduction="none"`. They are computed in float32, or in float64 for float64 inputs.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels import reference
from kernels.joint import joint_loss
from kernels.problem import Problem, Reduction, check_values

Implementation = Literal["reference", "cpu", "triton"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as Triton reads it, at import

# Each returns the total () and the losses (4,), or (rows,) and (4, rows) without `mean`.
IMPLEMENTATIONS: dict[Implementation, Callable[[Problem], tuple[Tensor, Tensor]]] = {
    "reference": reference.joint_loss,
    "cpu": partial(joint_loss, module="cpu"),
    "triton": partial(joint_loss, module="cuda"),
}


class VITaskLosses(NamedTuple):
    """The total to minimise, and its four losses without gradient; nats per token.

    Shapes: () for the mean, (rows,) with `reduction="none"`.
    """

    total: Tensor
    response: Tensor
    exemplar: Tensor
    rda: Tensor
    crt: Tensor


def linear_cross_entropy(
    hidden: Float[Tensor, "rows hidden"],
    weight: Float[Tensor, "vocab hidden"],
    labels: Int[Tensor, " rows"],
    *,
    reduction: Reduction = "mean",
    implementation: Implementation | None = None,
) -> Float[Tensor, "*rows"]:
    """Next-token cross-entropy of hidden Wᵀ: `kernels.reference.response_loss` (eq. 1, 2).

    Shape () for the mean, (rows,) with `reduction="none"`; in nats. Gradients flow into `hidden`,
    and into `weight` if it requires one.

    implementation: "reference" (plain PyTorch, whole logits), "cpu" (chunks of rows) or "triton";
    None chooses by device.

    Raises ValueError for inputs that do not fit together. Labels on CUDA are not checked: a row
    with a label outside the vocabulary has loss NaN and a zero gradient.
    """
    problem = _problem(hidden, weight, labels, (1.0, 0.0, 0.0, 0.0), reduction)
    total, _ = _losses(problem, implementation)
    return total


def linear_rda(
    hidden: Float[Tensor, "rows hidden"],
    exemplar_hidden: Float[Tensor, "rows hidden"],
    weight: Float[Tensor, "vocab hidden"],
    labels: Int[Tensor, " rows"],
    *,
    detach_exemplar: bool = True,
    reduction: Reduction = "mean",
    implementation: Implementation | None = None,
) -> Float[Tensor, "*rows"]:
    """KL(softmax(hidden Wᵀ) || softmax(exemplar_hidden Wᵀ)): `kernels.reference.rda_loss` (eq. 3).

    The exemplar side is a constant, for `exemplar_hidden` and for `weight`, unless
    `detach_exemplar=False`. Result, implementations and errors as in `linear_cross_entropy`.
    """
    _same_rows("exemplar_hidden", exemplar_hidden, hidden)
    problem = _problem(
        hidden, weight, labels, (0.0, 0.0, 1.0, 0.0), reduction,
        exemplar_hidden=exemplar_hidden, detach_exemplar=detach_exemplar,
    )  # fmt: skip
    total, _ = _losses(problem, implementation)
    return total


def linear_crt(
    hidden: Float[Tensor, "rows hidden"],
    negative_hidden: Float[Tensor, "rows hidden"],
    weight: Float[Tensor, "vocab hidden"],
    labels: Int[Tensor, " rows"],
    *,
    reduction: Reduction = "mean",
    implementation: Implementation | None = None,
) -> Float[Tensor, "*rows"]:
    """Cross-entropy of softmax(hidden Wᵀ - negative_hidden Wᵀ): `kernels.reference.crt_loss`.

    Gradients flow into both (eq. 5, 6). Result, implementations and errors as in
    `linear_cross_entropy`.
    """
    _same_rows("negative_hidden", negative_hidden, hidden)
    if implementation != "reference" and hidden.dtype in (torch.float32, torch.float64):
        # The head has no bias, so the cross-entropy of the hidden difference is the same loss for
        # half the products. A difference of 16-bit rows would be rounded to 16 bits, which costs
        # errors up to 1e-3 in the logits.
        _check_head(hidden, weight, labels)
        difference = hidden - _branch("negative", negative_hidden, None, hidden)
        problem = _problem(difference, weight, labels, (1.0, 0.0, 0.0, 0.0), reduction)
    else:
        problem = _problem(
            hidden, weight, labels, (0.0, 0.0, 0.0, 1.0), reduction, negative_hidden=negative_hidden
        )
    total, _ = _losses(problem, implementation)
    return total


def linear_vitask(
    hidden: Float[Tensor, "rows hidden"],
    weight: Float[Tensor, "vocab hidden"],
    labels: Int[Tensor, " rows"],
    *,
    exemplar_hidden: Float[Tensor, "exemplars hidden"] | None = None,
    exemplar_rows: Int[Tensor, " exemplars"] | None = None,
    negative_hidden: Float[Tensor, "negatives hidden"] | None = None,
    negative_rows: Int[Tensor, " negatives"] | None = None,
    rda_weight: float = 1.0,
    crt_weight: float = 1.0,
    detach_exemplar: bool = True,
    reduction: Reduction = "mean",
    implementation: Implementation | None = None,
) -> VITaskLosses:
    """Van + EP + α RDA + β CRT from one projection of all rows (Bai et al. 2024, eq. 1 to 6).

    exemplar_rows, negative_rows: int64; the row of `hidden` that each row of the branch belongs
    to, each at most once (None: row i belongs to row i). A row without a branch costs nothing
    there. Each loss is the mean over its counted rows, 0 if there are none. Only `total` carries a
    gradient. Units and shapes: see `VITaskLosses`.

    implementation: "reference" (plain PyTorch, whole logits), "cpu" (chunks of rows) or "triton";
    None chooses by device.

    Raises ValueError for inputs that do not fit together. Values on CUDA are not checked, nor are
    those of "reference" in compiled graphs: a wrong label or row number gives NaN there, and no
    memory outside the inputs is read.
    """
    problem = _problem(
        hidden, weight, labels, (1.0, 1.0, rda_weight, crt_weight), reduction,
        exemplar_hidden=exemplar_hidden, exemplar_rows=exemplar_rows,
        negative_hidden=negative_hidden, negative_rows=negative_rows,
        detach_exemplar=detach_exemplar,
    )  # fmt: skip
    total, losses = _losses(problem, implementation)
    return VITaskLosses(total, *losses.detach())


def _losses(problem: Problem, implementation: Implementation | None) -> tuple[Tensor, Tensor]:
    """Choose an implementation and run it: total and losses, as in IMPLEMENTATIONS."""
    labels = problem.labels
    chosen: Implementation = implementation or ("triton" if problem.hidden.is_cuda else "cpu")
    _check_implementation(chosen, problem.hidden)
    unreadable = labels.is_cuda or labels.is_meta or torch.compiler.is_compiling()
    # "cpu" checks the values itself, inside its operation, so that compiled graphs raise as well.
    if chosen != "cpu" and not unreadable:
        check_values(problem)
    return IMPLEMENTATIONS[chosen](problem)


def _problem(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_weights: tuple[float, float, float, float],
    reduction: Reduction,
    *,
    exemplar_hidden: Tensor | None = None,
    exemplar_rows: Tensor | None = None,
    negative_hidden: Tensor | None = None,
    negative_rows: Tensor | None = None,
    detach_exemplar: bool = True,
) -> Problem:
    """The arguments, with shapes, dtypes and devices checked. Values are checked later."""
    _check_head(hidden, weight, labels)
    exemplar = _branch("exemplar", exemplar_hidden, exemplar_rows, hidden)
    negative = _branch("negative", negative_hidden, negative_rows, hidden)
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction is {reduction!r}; expected 'mean' or 'none'")
    return Problem(
        hidden=hidden,
        exemplar=exemplar,
        exemplar_rows=exemplar_rows,
        negative=negative,
        negative_rows=negative_rows,
        weight=weight,
        labels=labels,
        loss_weights=loss_weights,
        detach_exemplar=detach_exemplar,
        mean=reduction == "mean",
    )


def _check_head(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}, weight {tuple(weight.shape)}; "
            "expected (rows, hidden) and (vocab, hidden)"
        )
    if hidden.dtype not in DTYPES or weight.dtype != hidden.dtype:
        raise ValueError(
            f"hidden has dtype {hidden.dtype}, weight {weight.dtype}; expected one dtype for both "
            f"out of {', '.join(map(str, DTYPES))}: cast one of them"
        )
    if len(weight) == 0:
        raise ValueError("weight has no rows; expected one per token of the vocabulary")
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} and dtype {labels.dtype}; "
            f"expected ({len(hidden)},), one per row of hidden, and torch.int64"
        )
    _same_device(hidden, weight=weight, labels=labels)


def _branch(name: str, branch: Tensor | None, rows: Tensor | None, hidden: Tensor) -> Tensor:
    """The hidden rows of a branch, checked; zero rows for an absent branch."""
    if branch is None:
        if rows is not None:
            raise ValueError(f"{name}_rows without {name}_hidden; give both or neither")
        return hidden.new_empty(0, hidden.shape[1])
    if branch.ndim != 2 or branch.shape[1] != hidden.shape[1] or branch.dtype != hidden.dtype:
        raise ValueError(
            f"{name}_hidden has shape {tuple(branch.shape)} and dtype {branch.dtype}; "
            f"expected (rows, {hidden.shape[1]}) and {hidden.dtype}, as for hidden"
        )
    _same_device(hidden, **{f"{name}_hidden": branch})
    if rows is None:
        _same_rows(f"{name}_hidden", branch, hidden)
        return branch
    if rows.shape != branch.shape[:1] or rows.dtype != torch.int64:
        raise ValueError(
            f"{name}_rows has shape {tuple(rows.shape)} and dtype {rows.dtype}; expected "
            f"({len(branch)},), one number per row of {name}_hidden, and torch.int64"
        )
    _same_device(hidden, **{f"{name}_rows": rows})
    return branch


def _same_rows(name: str, branch: Tensor, hidden: Tensor) -> None:
    if branch.shape != hidden.shape:
        raise ValueError(
            f"{name} has shape {tuple(branch.shape)}, hidden {tuple(hidden.shape)}; "
            "expected the same (rows, hidden)"
        )


def _same_device(hidden: Tensor, **others: Tensor) -> None:
    for name, tensor in others.items():
        if tensor.device != hidden.device:
            raise ValueError(
                f"{name} is on {tensor.device}, hidden on {hidden.device}; expected one device"
            )


def _check_implementation(name: str, hidden: Tensor) -> None:
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"no implementation {name!r}; expected one of {', '.join(IMPLEMENTATIONS)}"
        )
    if name == "cpu" and hidden.is_cuda:
        raise ValueError(
            "implementation 'cpu' was given tensors on CUDA; move them to the CPU, or leave "
            "implementation out"
        )
    if name == "triton" and hidden.dtype == torch.float64:
        raise ValueError("the Triton kernels compute in float32; use 'reference' for float64")
    if name == "triton" and not (hidden.is_cuda or INTERPRETED):
        raise ValueError(
            "implementation 'triton' was given tensors on the CPU; move them to CUDA, or set "
            "TRITON_INTERPRET=1 before Triton is imported to run the kernels in its interpreter"
        )
