"""The joint loss as one node of the graph, with its gradient.

The forward pass computes the gradients too, from the logits while these exist, and keeps only
what is as large as the hidden rows; the backward pass scales them. Graphs (torch.compile, export)
see a custom operation; plain eager calls take the same two functions through autograd's own
`Function`, which spares them the dispatcher: 0.4 ms a step, as much as a small loss takes.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.chunked import chunked_rows
from kernels.problem import Problem, Result, Wanted

# The fields of `Problem`, those of `Wanted`, and which implementation: "cpu" or "triton".
INPUTS = (
    "Tensor hidden, Tensor exemplar, Tensor? exemplar_rows, Tensor negative, "
    "Tensor? negative_rows, Tensor weight, Tensor labels, float[] weights, "
    "bool detach_exemplar, bool mean, bool[] wanted, str implementation"
)
TENSORS = 7  # of them


def _split(inputs: tuple[Any, ...]) -> tuple[Problem, Wanted, str]:
    *fields, wanted, implementation = inputs
    return Problem(*fields), Wanted(*wanted), implementation


def _computed(
    implementation: str, problem: Problem, wanted: Wanted, row_scale: Tensor | None = None
) -> Result:
    """What the named implementation computes, in its own dtypes whatever autocast says."""
    device = problem.hidden.device.type
    as_is = not torch.is_autocast_enabled(device)
    with nullcontext() if as_is else torch.autocast(device, enabled=False):
        if implementation == "cpu":
            return chunked_rows(problem, wanted, row_scale)
        from kernels.rows import triton_rows  # where there is no Triton, the rest works

        return triton_rows(problem, wanted, row_scale)


def _forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Total () and parts (4,), or (rows,) and (4, rows); gradients of the rows and of the head.

    Gradients are those of the total (without `mean`: of its sum), in the dtype that is computed
    in. Without `mean` the head's own gradient depends on what comes from above and is left to the
    backward pass.
    """
    problem, wanted, implementation = _split(inputs)
    now = wanted if problem.mean else wanted._replace(weight=False)
    result = _computed(implementation, problem, now)
    weighted = zip(problem.weights, result.losses, strict=True)
    total = reduce(add, (weight * part for weight, part in weighted if weight))
    return total, *result


def _backward(
    above: Tensor, row_gradient: Tensor | None, head_gradient: Tensor | None, *inputs: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, exemplar and negative rows and of the head; None for those not wanted.

    above: of the total, () or (rows,); row_gradient, head_gradient: as `_forward` gave them
    """
    problem, wanted, implementation = _split(inputs)
    ends = _ends(problem)

    def scaled(start: int, end: int, own: Tensor | None) -> Tensor:
        assert row_gradient is not None
        gradient = row_gradient[start:end]
        if problem.mean:  # `above` is one number
            return (gradient * above).to(problem.hidden.dtype)
        factor = above if own is None else above[own.clamp(0, len(above) - 1)]
        return (gradient * factor[:, None]).to(problem.hidden.dtype)

    of_hidden = of_exemplar = of_negative = of_weight = None
    if wanted.hidden:
        of_hidden = scaled(0, ends[0], None)
        if ends[1] > ends[0]:
            of_negative = scaled(ends[0], ends[1], problem.negative_rows)
    if wanted.exemplar:
        of_exemplar = scaled(ends[1], ends[2], problem.exemplar_rows)
    if wanted.weight and problem.mean:
        assert head_gradient is not None
        of_weight = (head_gradient * above).to(problem.weight.dtype)
    elif wanted.weight:  # each row's part is scaled by its own: computed anew
        only = Wanted(hidden=False, exemplar=False, weight=True)
        anew = _computed(implementation, problem, only, above.to(problem.dtype)).weight
        assert anew is not None
        of_weight = anew.to(problem.weight.dtype)
    return of_hidden, of_exemplar, of_negative, of_weight


def _given(problem: Problem, wanted: Wanted) -> tuple[bool, bool, bool, bool]:
    """Which of the gradients of `_backward` are not None."""
    negative = wanted.hidden and len(problem.negative) > 0
    return wanted.hidden, wanted.exemplar, negative, wanted.weight


def _ends(problem: Problem) -> tuple[int, int, int]:
    """Where base, negative and exemplar rows end in the stack of all."""
    base, negative = len(problem.hidden), len(problem.negative)
    return base, base + negative, base + negative + len(problem.exemplar)


def _of_inputs(gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Gradients as autograd asks for them, one for each input."""
    of_hidden, of_exemplar, of_negative, of_weight = gradients
    return of_hidden, of_exemplar, None, of_negative, None, of_weight, *(None,) * 6


class _Eager(torch.autograd.Function):
    """The two passes without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        total, parts, *gradients = _forward(*inputs)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(parts)
        ctx.save_for_backward(*gradients, *inputs[:TENSORS])
        ctx.settings = inputs[TENSORS:]
        return total, parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if above is None:
            return (None,) * len(ctx.needs_input_grad)
        return _of_inputs(_backward(above, *ctx.saved_tensors, *ctx.settings))


# For graphs: the same as custom operations, which cannot give None. Instead they give tensors
# without elements, whose shapes the fakes know beforehand.


def _or_empty(results: Sequence[Tensor | None], device: torch.device) -> tuple[Tensor, ...]:
    absent = {"dtype": torch.float32, "device": device}
    return tuple(torch.empty(0, **absent) if result is None else result for result in results)


def _forward_filled(*inputs: Any) -> tuple[Tensor, ...]:
    return _or_empty(_forward(*inputs), inputs[0].device)


def _backward_filled(*inputs: Any) -> tuple[Tensor, ...]:
    return _or_empty(_backward(*inputs), inputs[0].device)


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
    problem, wanted, _ = _split(inputs)
    shape = () if problem.mean else problem.labels.shape
    of_rows = of_weight = None
    if wanted.hidden or wanted.exemplar:
        kept = _ends(problem)[2 if wanted.exemplar else 1]
        of_rows = problem.hidden.new_empty(kept, problem.hidden.shape[1], dtype=problem.dtype)
    if wanted.weight and problem.mean:
        of_weight = problem.weight.new_empty(problem.weight.shape, dtype=problem.dtype)
    losses = (problem.hidden.new_empty(s, dtype=problem.dtype) for s in (shape, (4, *shape)))
    return _or_empty([*losses, of_rows, of_weight], problem.hidden.device)


@joint_loss_backward_op.register_fake
def _(
    above: Tensor, row_gradient: Tensor, head_gradient: Tensor, *inputs: Any
) -> tuple[Tensor, ...]:
    problem, wanted, _ = _split(inputs)
    of = (problem.hidden, problem.exemplar, problem.negative, problem.weight)
    made = zip(of, _given(problem, wanted), strict=True)
    return _or_empty([x.new_empty(x.shape) if given else None for x, given in made], above.device)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, parts, row_gradient, head_gradient = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(parts, row_gradient, head_gradient)
    ctx.save_for_backward(row_gradient, head_gradient, *inputs[:TENSORS])
    ctx.settings = inputs[TENSORS:]


def _in_graph(ctx: Any, above: Tensor | None, *others: None) -> tuple[Tensor | None, ...]:
    if above is None:
        return (None,) * len(ctx.needs_input_grad)
    inputs = *ctx.saved_tensors[2:], *ctx.settings
    gradients = joint_loss_backward_op(above, *ctx.saved_tensors[:2], *inputs)
    problem, wanted, _ = _split(inputs)
    made = zip(gradients, _given(problem, wanted), strict=True)
    return _of_inputs([gradient if given else None for gradient, given in made])


joint_loss_op.register_autograd(_in_graph, setup_context=_setup)


def joint_loss(hidden: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """Total () and parts (4,), or (rows,) and (4, rows); arguments as in INPUTS."""
    if torch.compiler.is_compiling() or type(hidden) not in (Tensor, torch.nn.Parameter):
        total, parts, _, _ = joint_loss_op(hidden, *others)
        return total, parts
    return _Eager.apply(hidden, *others)
