"""The joint loss as one node of the graph, with its gradient.

The forward pass computes the gradients too, from the logits while these exist, and keeps only
what is as large as the hidden rows; the backward pass scales them. Graphs (torch.compile, export)
see a custom operation; plain eager calls take the same two functions through autograd's own
`Function`, which spares them the dispatcher: 0.4 ms a step, as much as a small loss takes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.chunked import chunked_rows
from kernels.problem import Problem, RowResult, Wanted, check_values, counted, slots


def _rows(
    implementation: str, problem: Problem, wanted: Wanted, row_scale: Tensor | None = None
) -> RowResult:
    """What the named implementation computes, in its own dtypes whatever autocast says."""
    with torch.autocast(problem.hidden.device.type, enabled=False):
        if implementation == "cpu":
            return chunked_rows(problem, wanted, row_scale)
        from kernels.rows import triton_rows  # where there is no Triton, the rest works

        return triton_rows(problem, wanted, row_scale)


def _forward(
    hidden: Tensor,
    exemplar_hidden: Tensor,
    exemplar_rows: Tensor | None,
    negative_hidden: Tensor,
    negative_rows: Tensor | None,
    weight: Tensor,
    labels: Tensor,
    weights: Sequence[float],
    detach_exemplar: bool,
    mean: bool,
    wanted: Sequence[bool],
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Total () and parts (4,), or (rows,) and (4, rows); gradients of the rows and of the head.

    weights: of response, exemplar, rda and crt in the total. Absent branches have no rows.
    wanted:  the fields of `Wanted`. Gradients are those of the total (without `mean`: of its
             sum), in the dtype that is computed in. Without `mean` the head's own gradient
             depends on what comes from above and is left to the backward pass.
    """
    if implementation == "cpu":  # here, so that compiled graphs raise as well
        check_values(labels, weight, hidden, exemplar_rows, negative_rows)
    problem = _problem(
        hidden, exemplar_hidden, exemplar_rows, negative_hidden, negative_rows, weight, labels,
        weights, detach_exemplar,
    )  # fmt: skip
    numbers = _numbers(problem)
    if mean:
        # Factors relative to one counted base row. 1/rows itself is applied to the finished
        # gradients: in it, float16 logits would underflow.
        problem = problem._replace(factors=problem.factors * numbers[0] / numbers)
    want = Wanted(*wanted)
    result = _rows(implementation, problem, want if mean else want._replace(weight=False))
    losses = result.losses
    row_gradient = losses.new_empty(0, hidden.shape[1]) if result.hidden is None else result.hidden
    head_gradient = losses.new_empty(0) if result.weight is None else result.weight
    if mean:
        losses = losses.sum(dim=1) / numbers
        row_gradient.div_(numbers[0])
        head_gradient.div_(numbers[0])
    total = sum(w * part for w, part in zip(weights, losses, strict=True) if w)
    return total, losses, row_gradient, head_gradient


def _scaled(
    above: Tensor,
    row_gradient: Tensor,
    head_gradient: Tensor,
    hidden: Tensor,
    exemplar_hidden: Tensor,
    exemplar_rows: Tensor | None,
    negative_hidden: Tensor,
    negative_rows: Tensor | None,
    weight: Tensor,
    labels: Tensor,
    weights: Sequence[float],
    detach_exemplar: bool,
    mean: bool,
    wanted: Sequence[bool],
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden, exemplar, negative rows and head; empty for those not computed."""
    per_row = above.expand(len(hidden))

    def scaled(gradient: Tensor, rows: Tensor | None) -> Tensor:
        if len(gradient) == 0:  # of an absent branch, or not wanted
            return hidden.new_empty(gradient.shape)
        factor = per_row if rows is None else per_row[rows.clamp(0, len(per_row) - 1)]
        return (gradient * factor[:, None]).to(hidden.dtype)

    ends = (len(hidden), len(hidden) + len(negative_hidden))
    base, negative, exemplar = row_gradient.tensor_split(ends)
    if not wanted[Wanted._fields.index("weight")]:
        of_weight = weight.new_empty(0)
    elif mean:  # `above` is one number
        of_weight = (head_gradient * above).to(weight.dtype)
    else:  # each row's part is scaled by its own: computed anew
        problem = _problem(
            hidden, exemplar_hidden, exemplar_rows, negative_hidden, negative_rows, weight, labels,
            weights, detach_exemplar,
        )  # fmt: skip
        only = Wanted(hidden=False, exemplar=False, weight=True)
        anew = _rows(implementation, problem, only, above.to(problem.dtype)).weight
        assert anew is not None
        of_weight = anew.to(weight.dtype)
    return (
        scaled(base, None),
        scaled(exemplar, exemplar_rows),
        scaled(negative, negative_rows),
        of_weight,
    )


def _problem(
    hidden: Tensor,
    exemplar_hidden: Tensor,
    exemplar_rows: Tensor | None,
    negative_hidden: Tensor,
    negative_rows: Tensor | None,
    weight: Tensor,
    labels: Tensor,
    weights: Sequence[float],
    detach_exemplar: bool,
) -> Problem:
    """The rows, and for each base row its rows in the branches."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return Problem(
        hidden,
        negative_hidden,
        exemplar_hidden,
        weight,
        labels,
        slots(negative_rows, len(negative_hidden), hidden),
        slots(exemplar_rows, len(exemplar_hidden), hidden),
        # no torch.tensor(weights): a copy from the host would break a graph capture
        torch.stack([torch.full((), w, dtype=dtype, device=hidden.device) for w in weights]),
        detach_exemplar,
    )


def _numbers(problem: Problem) -> Tensor:
    """(4,): how many rows count in each loss, 1 for none, in the dtype that is computed in.

    The number of an absent branch, whose losses are zeros, is that of the base rows.
    """
    use = counted(problem.labels)
    base = use.sum()
    exemplar = (use & (problem.exemplar_of >= 0)).sum() if len(problem.exemplar) else base
    negative = (use & (problem.negative_of >= 0)).sum() if len(problem.negative) else base
    numbers = torch.stack([base, exemplar, exemplar, negative])
    return numbers.clamp(min=1).to(problem.dtype)


joint_loss_op = torch.library.custom_op("vitask::joint_loss", _forward, mutates_args=())
joint_loss_backward_op = torch.library.custom_op(
    "vitask::joint_loss_backward", _scaled, mutates_args=()
)


@joint_loss_op.register_fake
def _(
    hidden: Tensor,
    exemplar_hidden: Tensor,
    exemplar_rows: Tensor | None,
    negative_hidden: Tensor,
    negative_rows: Tensor | None,
    weight: Tensor,
    labels: Tensor,
    weights: Sequence[float],
    detach_exemplar: bool,
    mean: bool,
    wanted: Sequence[bool],
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    like = hidden.new_empty(0, dtype=dtype)
    want = Wanted(*wanted)
    rows, width = hidden.shape
    shape = () if mean else (rows,)
    kept = rows + len(negative_hidden) + (len(exemplar_hidden) if want.exemplar else 0)
    return (
        like.new_empty(shape),
        like.new_empty((4, *shape)),
        like.new_empty(kept if want.hidden or want.exemplar else 0, width),
        like.new_empty(weight.shape if want.weight and mean else (0,)),
    )


@joint_loss_backward_op.register_fake
def _(
    above: Tensor,
    row_gradient: Tensor,
    head_gradient: Tensor,
    hidden: Tensor,
    exemplar_hidden: Tensor,
    exemplar_rows: Tensor | None,
    negative_hidden: Tensor,
    negative_rows: Tensor | None,
    weight: Tensor,
    labels: Tensor,
    weights: Sequence[float],
    detach_exemplar: bool,
    mean: bool,
    wanted: Sequence[bool],
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    counts: tuple[int, ...] = (0, 0, 0)
    if len(row_gradient) > 0:
        exemplars = len(row_gradient) - len(hidden) - len(negative_hidden)
        counts = (len(hidden), exemplars, len(negative_hidden))
    gradients = (hidden.new_empty(count, hidden.shape[1]) for count in counts)
    return *gradients, weight.new_empty(weight.shape if Wanted(*wanted).weight else (0,))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, parts, row_gradient, head_gradient = output
    ctx.mark_non_differentiable(parts, row_gradient, head_gradient)
    _keep(ctx, inputs, row_gradient, head_gradient)


def _keep(ctx: Any, inputs: tuple[Any, ...], *gradients: Tensor) -> None:
    """What the backward pass needs; gradients that nobody asks for stay None."""
    *tensors, weights, detach_exemplar, mean, wanted, implementation = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *gradients)
    ctx.settings = weights, detach_exemplar, mean, wanted, implementation


def _backward(
    ctx: Any, above: Tensor | None, *_: None, scaled: Callable[..., Any] = joint_loss_backward_op
) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs, in their order: None for those that have none."""
    if above is None:
        return (None,) * 12
    *tensors, row_gradient, head_gradient = ctx.saved_tensors
    wanted, negatives = Wanted(*ctx.settings[3]), len(tensors[3])
    of_hidden, of_exemplar, of_negative, of_weight = scaled(
        above, row_gradient, head_gradient, *tensors, *ctx.settings
    )
    return (
        of_hidden if wanted.hidden else None,
        of_exemplar if wanted.exemplar else None,
        None,
        of_negative if wanted.hidden and negatives else None,
        None,
        of_weight if wanted.weight else None,
        *(None,) * 6,
    )


joint_loss_op.register_autograd(_backward, setup_context=_setup)


class _Eager(torch.autograd.Function):
    """The same without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        total, parts, *gradients = _forward(*inputs)
        ctx.mark_non_differentiable(parts)
        _keep(ctx, inputs, *gradients)
        return total, parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *above: Any) -> tuple[Tensor | None, ...]:
        return _backward(ctx, *above, scaled=_scaled)


def joint_loss(hidden: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """Total () and parts (4,), or (rows,) and (4, rows); arguments as in `_forward`."""
    if torch.compiler.is_compiling() or type(hidden) not in (Tensor, torch.nn.Parameter):
        total, parts, _, _ = joint_loss_op(hidden, *others)
        return total, parts
    return _Eager.apply(hidden, *others)
