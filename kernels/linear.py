"""Losses over hidden rows and the language model's head: logits are made, used and dropped inside.

Four operations, one implementation: the joint loss of `kernels/problem.py` with the branches and
weights that each needs. Losses are in nats, the mean over counted rows or, with
`reduction="none"`, per row; computed in float32, or in float64 when given float64.
"""

import os
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels import reference
from kernels.joint import joint_loss
from kernels.problem import all_owned, check_values, counted, slots
from kernels.reference import Reduction

Implementation = Literal["reference", "cpu", "triton"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as Triton reads it, at import


class VITaskLosses(NamedTuple):
    """The sum that is minimised, and its parts without gradient, for the log; nats per token."""

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

    Gradients into `hidden`, and into `weight` if it asks for one. Raises ValueError for inputs
    that do not fit each other; labels on CUDA are not looked at: a row whose label lies outside
    the vocabulary has loss NaN and no gradient.
    """
    total, _ = _losses(
        hidden, weight, labels, None, None, None, None,
        (1.0, 0.0, 0.0, 0.0), True, reduction, implementation,
    )  # fmt: skip
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

    The exemplar side is a constant, in `exemplar_hidden` and in `weight`, unless
    `detach_exemplar=False`. Errors as in `linear_cross_entropy`.
    """
    _same_rows("exemplar_hidden", exemplar_hidden, hidden)
    total, _ = _losses(
        hidden, weight, labels, exemplar_hidden, None, None, None,
        (0.0, 0.0, 1.0, 0.0), detach_exemplar, reduction, implementation,
    )  # fmt: skip
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

    Gradients into both (eq. 5, 6). Errors as in `linear_cross_entropy`.
    """
    _same_rows("negative_hidden", negative_hidden, hidden)
    if implementation != "reference" and hidden.dtype in (torch.float32, torch.float64):
        # The head has no bias: half the products for the same loss. A difference of 16-bit rows
        # would be rounded to 16 bits, with errors up to 1e-3 in the logits.
        _check_head(hidden, weight, labels)
        difference = hidden - _branch("negative", negative_hidden, None, hidden)
        return linear_cross_entropy(
            difference, weight, labels, reduction=reduction, implementation=implementation
        )
    total, _ = _losses(
        hidden, weight, labels, None, None, negative_hidden, None,
        (0.0, 0.0, 0.0, 1.0), True, reduction, implementation,
    )  # fmt: skip
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
    """Van + EP + α RDA + β CRT from one projection of all rows.

    exemplar_rows, negative_rows: int64 numbers of the rows of `hidden` that have an exemplar or a
    negative, each once (None: all, in order). Rows without one cost nothing there. Each loss is
    the mean over its own counted rows, 0 for none; only `total` carries a gradient.

    implementation: "reference" (plain PyTorch, whole logits), "cpu" (chunks of rows), "triton";
    None chooses by device. Raises ValueError for inputs that do not fit each other; values on
    CUDA are not looked at (nor by "reference" in compiled graphs): there a wrong label or row
    number gives NaN and reads nothing outside.
    """
    total, parts = _losses(
        hidden, weight, labels, exemplar_hidden, exemplar_rows, negative_hidden, negative_rows,
        (1.0, 1.0, rda_weight, crt_weight), detach_exemplar, reduction, implementation,
    )  # fmt: skip
    return VITaskLosses(total, *parts.detach())


def _losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    exemplar_hidden: Tensor | None,
    exemplar_rows: Tensor | None,
    negative_hidden: Tensor | None,
    negative_rows: Tensor | None,
    weights: tuple[float, float, float, float],
    detach_exemplar: bool,
    reduction: Reduction,
    implementation: Implementation | None,
) -> tuple[Tensor, Tensor]:
    """Check, choose, compute: total () and parts (4,), or (rows,) and (4, rows)."""
    _check_head(hidden, weight, labels)
    exemplar_hidden = _branch("exemplar", exemplar_hidden, exemplar_rows, hidden)
    negative_hidden = _branch("negative", negative_hidden, negative_rows, hidden)
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction is {reduction!r}; expected 'mean' or 'none'")
    chosen: Implementation = implementation or ("triton" if hidden.is_cuda else "cpu")
    _check_implementation(chosen, hidden)
    unseen = labels.is_cuda or labels.is_meta or torch.compiler.is_compiling()
    if chosen != "cpu" and not unseen:  # "cpu" looks itself, so that compiled graphs raise as well
        check_values(labels, weight, hidden, exemplar_rows, negative_rows)
    if chosen == "reference":
        with torch.autocast(hidden.device.type, enabled=False):
            return _reference(
                hidden, weight, labels, exemplar_hidden, exemplar_rows, negative_hidden,
                negative_rows, weights, detach_exemplar, reduction,
            )  # fmt: skip
    grad = torch.is_grad_enabled()
    wanted = (
        grad and (hidden.requires_grad or negative_hidden.requires_grad),
        # the exemplar branch gets a gradient from its own response, and from rda if not detached
        grad and exemplar_hidden.requires_grad and (weights[1] != 0 or not detach_exemplar),
        grad and weight.requires_grad,
    )
    return joint_loss(
        hidden, exemplar_hidden, exemplar_rows, negative_hidden, negative_rows, weight, labels,
        weights, detach_exemplar, reduction == "mean", wanted, chosen,
    )  # fmt: skip


def _reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    exemplar_hidden: Tensor,
    exemplar_rows: Tensor | None,
    negative_hidden: Tensor,
    negative_rows: Tensor | None,
    weights: tuple[float, float, float, float],
    detach_exemplar: bool,
    reduction: Reduction,
) -> tuple[Tensor, Tensor]:
    """The same from whole logits and the losses of `kernels.reference`, by autograd."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)

    def logits_of(x: Tensor, labels: Tensor) -> Tensor:
        x = x.where(counted(labels)[:, None], 0)  # a NaN of an ignored row must not reach the head
        return x.to(dtype) @ weight.to(dtype).T

    def owners(rows: Tensor | None, branch: Tensor) -> tuple[Tensor | slice, Tensor]:
        """Base rows of a branch's rows; 0, or NaN if some name nothing and nobody could look."""
        if rows is None:
            return slice(None), hidden.new_zeros((), dtype=dtype)
        owned = all_owned(slots(rows, len(branch), hidden), len(branch))
        wrong = torch.where(owned, 0.0, torch.nan).to(dtype)
        return rows.clamp(0, max(len(hidden) - 1, 0)), wrong

    def on_all_rows(values: Tensor, own: Tensor | slice, wrong: Tensor) -> Tensor:
        if reduction == "none" and isinstance(own, Tensor):
            values = values.new_zeros(len(hidden)).index_add(0, own, values)
        return values + wrong

    logits = logits_of(hidden, labels)
    response = reference.response_loss(logits, labels, reduction=reduction)
    exemplar = rda = crt = torch.zeros_like(response)
    if len(exemplar_hidden):
        own, wrong = owners(exemplar_rows, exemplar_hidden)
        teacher = logits_of(exemplar_hidden, labels[own])
        alone = reference.response_loss(teacher, labels[own], reduction=reduction)
        kl = reference.rda_loss(
            logits[own], teacher, labels[own], detach_exemplar=detach_exemplar, reduction=reduction
        )
        exemplar, rda = (on_all_rows(values, own, wrong) for values in (alone, kl))
    if len(negative_hidden):
        own, wrong = owners(negative_rows, negative_hidden)
        negative = logits_of(negative_hidden, labels[own])
        contrast = reference.crt_loss(logits[own], negative, labels[own], reduction=reduction)
        crt = on_all_rows(contrast, own, wrong)
    parts = (response, exemplar, rda, crt)
    total = sum(w * part for w, part in zip(weights, parts, strict=True) if w)
    return total, torch.stack(parts)


def _check_head(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}, weight {tuple(weight.shape)}; "
            "expected (rows, hidden) and (vocab, hidden)"
        )
    if hidden.dtype not in DTYPES or weight.dtype != hidden.dtype:
        raise ValueError(
            f"hidden has dtype {hidden.dtype}, weight {weight.dtype}; expected the same of "
            f"{', '.join(map(str, DTYPES))}: cast one of them"
        )
    if len(weight) == 0:
        raise ValueError("weight has no rows; expected one for each token of the vocabulary")
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} and dtype {labels.dtype}; "
            f"expected ({len(hidden)},), one for each row of hidden, and torch.int64"
        )
    _same_device(hidden, weight=weight, labels=labels)


def _branch(name: str, branch: Tensor | None, rows: Tensor | None, hidden: Tensor) -> Tensor:
    """The branch's hidden rows, checked; no rows for an absent one."""
    if branch is None:
        if rows is not None:
            raise ValueError(f"{name}_rows without {name}_hidden; give both or neither")
        return hidden.new_empty(0, hidden.shape[1])
    if branch.ndim != 2 or branch.shape[1] != hidden.shape[1] or branch.dtype != hidden.dtype:
        raise ValueError(
            f"{name}_hidden has shape {tuple(branch.shape)} and dtype {branch.dtype}; "
            f"expected (rows, {hidden.shape[1]}) and {hidden.dtype}, as hidden"
        )
    _same_device(hidden, **{f"{name}_hidden": branch})
    if rows is None:
        _same_rows(f"{name}_hidden", branch, hidden)
        return branch
    if rows.shape != branch.shape[:1] or rows.dtype != torch.int64:
        raise ValueError(
            f"{name}_rows has shape {tuple(rows.shape)} and dtype {rows.dtype}; expected "
            f"({len(branch)},), one number for each row of {name}_hidden, and torch.int64"
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
    if name not in get_args(Implementation):
        raise ValueError(
            f"no implementation {name!r}; expected one of {', '.join(get_args(Implementation))}"
        )
    if name == "cpu" and hidden.is_cuda:
        raise ValueError("implementation 'cpu' was given tensors on CUDA; move them, or name none")
    if name == "triton" and hidden.dtype == torch.float64:
        raise ValueError("the Triton kernels compute in float32; use 'reference' for float64")
    if name == "triton" and not (hidden.is_cuda or INTERPRETED):
        raise ValueError(
            "implementation 'triton' was given tensors on the CPU; move them to CUDA, or set "
            "TRITON_INTERPRET=1 before Triton is imported to run the kernels in its interpreter"
        )
