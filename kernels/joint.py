"""The joint loss as one node of the autograd graph.

The forward pass computes the gradients as well, while the logits exist, and keeps only tensors as
large as the hidden rows. The backward pass scales them.

Compiled and exported graphs see a custom operation. Eager calls run the same two functions through
`torch.autograd.Function`: the dispatcher of custom operations takes 0.4 ms per step, as long as a
small loss.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import reduce
from importlib import import_module
from operator import add
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.problem import Problem, Result, Wanted


def joint_loss(problem: Problem, *, module: str) -> tuple[Tensor, Tensor]:
    """Total () and losses (4,), or (rows,) and (4, rows) without `mean`; in nats.

    module: the file in this folder that computes them: "cpu" or "cuda". Only the total carries a
    gradient.
    """
    hidden, exemplar, grad = problem.hidden, problem.exemplar, torch.is_grad_enabled()
    # The exemplar branch gets a gradient from its response, and from rda if it is not detached.
    from_exemplar = problem.loss_weights[1] != 0 or not problem.detach_exemplar
    wanted = Wanted(
        hidden=grad and (hidden.requires_grad or problem.negative.requires_grad),
        exemplar=grad and exemplar.requires_grad and from_exemplar,
        weight=grad and problem.weight.requires_grad,
    )
    inputs = _flatten(problem, wanted, module)
    if torch.compiler.is_compiling() or type(hidden) not in (Tensor, torch.nn.Parameter):
        total, losses, _, _ = joint_loss_op(*inputs)
        return total, losses
    return _Eager.apply(*inputs)


# Autograd and custom operations take flat arguments: the fields of `Problem` in their order, those
# of `Wanted` as a list, and the module. Nothing else in this package depends on that order.

INPUTS = (
    "Tensor hidden, Tensor exemplar, Tensor? exemplar_rows, Tensor negative, "
    "Tensor? negative_rows, Tensor weight, Tensor labels, float[] loss_weights, "
    "bool detach_exemplar, bool mean, bool[] wanted, str module"
)
TENSORS = 7  # the first of them


class Gradients(NamedTuple):
    """Of the total with respect to the tensors of a problem; None where it is not wanted."""

    hidden: Tensor | None
    exemplar: Tensor | None
    negative: Tensor | None
    weight: Tensor | None


def _flatten(problem: Problem, wanted: Wanted, module: str) -> tuple[Any, ...]:
    return *problem, tuple(wanted), module


def _unflatten(inputs: Sequence[Any]) -> tuple[Problem, Wanted, str]:
    *fields, wanted, module = inputs
    return Problem(*fields), Wanted(*wanted), module


def _flatten_gradients(gradients: Gradients) -> tuple[Tensor | None, ...]:
    """One gradient per flat argument, as autograd expects them."""
    hidden, exemplar, negative, weight = gradients
    return hidden, exemplar, None, negative, None, weight, *(None,) * 6


def _compute(
    problem: Problem, wanted: Wanted, module: str, row_scale: Tensor | None = None
) -> Result:
    """Call the module's `compute`. Autocast is off: an implementation chooses its dtypes."""
    device = problem.hidden.device.type
    is_off = not torch.is_autocast_enabled(device)
    with nullcontext() if is_off else torch.autocast(device, enabled=False):
        # Imported here, so that "cpu" works without Triton.
        return import_module(f"kernels.{module}").compute(problem, wanted, row_scale)


def _forward(
    problem: Problem, wanted: Wanted, module: str
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Total () and losses (4,), or (rows,) and (4, rows); gradients of the rows and of the head.

    The gradients are those of the total (without `mean`: of its sum), in the dtype of the
    computation. Without `mean` the gradient of the head depends on the incoming gradient, so that
    the backward pass computes it.
    """
    now = wanted if problem.mean else wanted._replace(weight=False)
    result = _compute(problem, now, module)
    weighted = zip(problem.loss_weights, result.losses, strict=True)
    total = reduce(add, (weight * loss for weight, loss in weighted if weight))
    return total, *result


def _backward(
    above: Tensor,
    row_gradient: Tensor | None,
    head_gradient: Tensor | None,
    problem: Problem,
    wanted: Wanted,
    module: str,
) -> Gradients:
    """Gradients of the problem's tensors, in their dtypes.

    above: the incoming gradient of the total, () or (rows,)
    row_gradient, head_gradient: as `_forward` returned them
    """
    ends = _ends(problem)

    def scaled(start: int, end: int, base_row: Tensor | None) -> Tensor:
        assert row_gradient is not None
        gradient = row_gradient[start:end]
        if problem.mean:  # `above` is one number
            return (gradient * above).to(problem.hidden.dtype)
        factor = above if base_row is None else above[base_row.clamp(0, len(above) - 1)]
        return (gradient * factor[:, None]).to(problem.hidden.dtype)

    hidden = exemplar = negative = weight = None
    if wanted.hidden:
        hidden = scaled(0, ends[0], None)
        if ends[1] > ends[0]:
            negative = scaled(ends[0], ends[1], problem.negative_rows)
    if wanted.exemplar:
        exemplar = scaled(ends[1], ends[2], problem.exemplar_rows)
    if wanted.weight and problem.mean:
        assert head_gradient is not None
        weight = (head_gradient * above).to(problem.weight.dtype)
    elif wanted.weight:  # each row has another factor, so compute it anew
        only = Wanted(hidden=False, exemplar=False, weight=True)
        anew = _compute(problem, only, module, above.to(problem.dtype)).weight
        assert anew is not None
        weight = anew.to(problem.weight.dtype)
    return Gradients(hidden, exemplar, negative, weight)


def _given(problem: Problem, wanted: Wanted) -> tuple[bool, bool, bool, bool]:
    """Which of the `Gradients` that `_backward` returns are not None."""
    negative = wanted.hidden and len(problem.negative) > 0
    return wanted.hidden, wanted.exemplar, negative, wanted.weight


def _ends(problem: Problem) -> tuple[int, int, int]:
    """Where base, negative and exemplar rows end in the stack of all rows."""
    base, negative = len(problem.hidden), len(problem.negative)
    return base, base + negative, base + negative + len(problem.exemplar)


class _Eager(torch.autograd.Function):
    """The two passes without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        total, losses, *gradients = _forward(*_unflatten(inputs))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(losses)
        ctx.save_for_backward(*gradients, *inputs[:TENSORS])
        ctx.settings = inputs[TENSORS:]
        return total, losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if above is None:
            return (None,) * len(ctx.needs_input_grad)
        row_gradient, head_gradient, *tensors = ctx.saved_tensors
        inputs = _unflatten((*tensors, *ctx.settings))
        return _flatten_gradients(_backward(above, row_gradient, head_gradient, *inputs))


# For graphs, the same two functions are custom operations. These cannot return None. They return
# tensors without elements instead, whose shapes the fakes know beforehand.


def _or_empty(results: Sequence[Tensor | None], device: torch.device) -> tuple[Tensor, ...]:
    absent = {"dtype": torch.float32, "device": device}
    return tuple(torch.empty(0, **absent) if result is None else result for result in results)


def _forward_filled(*inputs: Any) -> tuple[Tensor, ...]:
    return _or_empty(_forward(*_unflatten(inputs)), inputs[0].device)


def _backward_filled(
    above: Tensor, row_gradient: Tensor, head_gradient: Tensor, *inputs: Any
) -> tuple[Tensor, ...]:
    gradients = _backward(above, row_gradient, head_gradient, *_unflatten(inputs))
    return _or_empty(gradients, above.device)


joint_loss_op = torch.library.custom_op(
    "vitask::joint_loss",
    _forward_filled,
    mutates_args=(),
    schema=f"({INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
joint_loss_backward_op = torch.library.custom_op(
    "vitask::joint_loss_backward",
    _backward_filled,
    mutates_args=(),
    schema=f"(Tensor above, Tensor row_gradient, Tensor head_gradient, {INPUTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)


@joint_loss_op.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    problem, wanted, _ = _unflatten(inputs)
    shape = () if problem.mean else problem.labels.shape
    of_rows = of_weight = None
    if wanted.hidden or wanted.exemplar:
        stacked = _ends(problem)[2 if wanted.exemplar else 1]
        of_rows = problem.hidden.new_empty(stacked, problem.hidden.shape[1], dtype=problem.dtype)
    if wanted.weight and problem.mean:
        of_weight = problem.weight.new_empty(problem.weight.shape, dtype=problem.dtype)
    losses = (problem.hidden.new_empty(s, dtype=problem.dtype) for s in (shape, (4, *shape)))
    return _or_empty([*losses, of_rows, of_weight], problem.hidden.device)


@joint_loss_backward_op.register_fake
def _(
    above: Tensor, row_gradient: Tensor, head_gradient: Tensor, *inputs: Any
) -> tuple[Tensor, ...]:
    problem, wanted, _ = _unflatten(inputs)
    of = (problem.hidden, problem.exemplar, problem.negative, problem.weight)
    made = zip(of, _given(problem, wanted), strict=True)
    return _or_empty([x.new_empty(x.shape) if given else None for x, given in made], above.device)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, losses, row_gradient, head_gradient = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(losses, row_gradient, head_gradient)
    ctx.save_for_backward(row_gradient, head_gradient, *inputs[:TENSORS])
    ctx.settings = inputs[TENSORS:]


def _in_graph(ctx: Any, above: Tensor | None, *others: None) -> tuple[Tensor | None, ...]:
    if above is None:
        return (None,) * len(ctx.needs_input_grad)
    row_gradient, head_gradient, *tensors = ctx.saved_tensors
    inputs = (*tensors, *ctx.settings)
    filled = joint_loss_backward_op(above, row_gradient, head_gradient, *inputs)
    problem, wanted, _ = _unflatten(inputs)
    made = zip(filled, _given(problem, wanted), strict=True)
    return _flatten_gradients(Gradients(*(x if given else None for x, given in made)))


joint_loss_op.register_autograd(_in_graph, setup_context=_setup)
