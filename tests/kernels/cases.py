"""Joint losses to test with: random inputs, exact results, and the results of an operation."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from kernels import IGNORE_INDEX, crt_loss, linear_vitask, rda_loss, response_loss

LEAVES = ("hidden", "exemplar", "negative", "weight")


@dataclass(frozen=True)
class Case:
    """Arguments of `linear_vitask`, and `above`, the incoming gradient of its total."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    exemplar: Tensor
    negative: Tensor
    exemplar_rows: Tensor | None
    negative_rows: Tensor | None
    rda_weight: float
    crt_weight: float
    detach_exemplar: bool
    reduction: str
    above: Tensor  # () for the mean, (rows,) for losses per row

    def to(self, device: str) -> "Case":
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


class Outcome(NamedTuple):
    """Losses and gradients by name. Only the reference has logits, with their gradients."""

    values: dict[str, Tensor]
    logits: dict[str, Tensor]


def draw(
    rows: int,
    vocab: int,
    width: int,
    *,
    seed: int = 0,
    exemplars: float = 1.0,
    negatives: float = 1.0,
    ignored: float = 0.3,
    closeness: float = 1.0,
    sharpness: float = 1.0,
    dtype: torch.dtype = torch.float32,
    rda_weight: float = 0.7,
    crt_weight: float = 1.3,
    detach_exemplar: bool = True,
    reduction: str = "mean",
) -> Case:
    """A random case.

    exemplars, negatives: share of the rows with one; 1: all, in order
    ignored: share of the rows that enter no loss
    closeness: standard deviation of the difference between branches; small values make the
        distributions nearly equal
    sharpness: standard deviation of the logits; at 30 most probabilities underflow
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def chosen(share: float) -> Tensor | None:
        return (
            None if share == 1 else torch.randperm(rows, generator=generator)[: int(share * rows)]
        )

    hidden, weight = normal(rows, width), normal(vocab, width) * sharpness / width**0.5
    with_exemplar, with_negative = chosen(exemplars), chosen(negatives)

    def near(rows: Tensor | None) -> Tensor:
        base = hidden if rows is None else hidden[rows]
        return base + closeness * normal(*base.shape)

    labels = torch.randint(vocab, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < ignored] = IGNORE_INDEX
    mean = reduction == "mean"
    above = torch.tensor(0.8) if mean else 0.5 + torch.rand(rows, generator=generator)
    return Case(
        hidden=hidden.to(dtype),
        weight=weight.to(dtype),
        labels=labels,
        exemplar=near(with_exemplar).to(dtype),
        negative=near(with_negative).to(dtype),
        exemplar_rows=with_exemplar,
        negative_rows=with_negative,
        rda_weight=rda_weight,
        crt_weight=crt_weight,
        detach_exemplar=detach_exemplar,
        reduction=reduction,
        above=above,
    )


@st.composite
def shapes(
    draw: st.DrawFn, elements: int, max_rows: int = 4096, min_rows: int = 0
) -> tuple[int, int]:
    """(rows, vocab) with at most `elements` logits: many rows or a large vocabulary, not both."""
    largest = min(151_674, elements // max(min_rows, 1))
    vocab = draw(st.one_of(*(st.integers(2, min(top, largest)) for top in (64, 4096, 151_674))))
    return draw(st.integers(min_rows, min(max_rows, elements // vocab))), vocab


@st.composite
def cases(
    draw_: st.DrawFn, dtypes: tuple[torch.dtype, ...], elements: int, max_rows: int = 4096
) -> Case:
    """Random shapes, dtypes and options, including peaked and nearly equal distributions."""
    shares = st.sampled_from([1.0, 0.6, 0.0])
    options = st.fixed_dictionaries(
        {
            "seed": st.integers(0, 2**31 - 1),
            "exemplars": shares,
            "negatives": shares,
            "ignored": st.sampled_from([0.0, 0.3, 1.0]),
            "closeness": st.sampled_from([1.0, 1e-3, 0.0]),
            "sharpness": st.sampled_from([1.0, 30.0]),
            "dtype": st.sampled_from(dtypes),
            "rda_weight": st.sampled_from([0.7, 0.0]),
            "crt_weight": st.sampled_from([1.3, 0.0]),
            "detach_exemplar": st.booleans(),
            "reduction": st.sampled_from(["mean", "none"]),
        }
    )
    shape = draw_(shapes(elements, max_rows))
    return draw(*shape, draw_(st.integers(1, 24)), **draw_(options))


def run(case: Case, implementation: str | None, dtype: torch.dtype | None = None) -> Outcome:
    """Losses and gradients of the operation under test; `dtype` converts the inputs first."""
    leaves = _leaves(case, dtype or case.hidden.dtype)
    losses = linear_vitask(
        leaves["hidden"],
        leaves["weight"],
        case.labels,
        exemplar_hidden=leaves["exemplar"],
        exemplar_rows=case.exemplar_rows,
        negative_hidden=leaves["negative"],
        negative_rows=case.negative_rows,
        rda_weight=case.rda_weight,
        crt_weight=case.crt_weight,
        detach_exemplar=case.detach_exemplar,
        reduction=case.reduction,
        implementation=implementation,
    )
    losses.total.backward(case.above.to(losses.total.dtype))
    return Outcome(losses._asdict() | _gradients(leaves), {})


def by_reference(case: Case, leaf_dtype: torch.dtype, dtype: torch.dtype) -> Outcome:
    """Losses and gradients from whole logits in `dtype` and the losses of `kernels.reference`."""
    leaves = _leaves(case, leaf_dtype)
    logits = {k: leaves[k].to(dtype) @ leaves["weight"].to(dtype).T for k in LEAVES[:3]}
    for value in logits.values():
        value.retain_grad()
    with_exemplar = slice(None) if case.exemplar_rows is None else case.exemplar_rows
    with_negative = slice(None) if case.negative_rows is None else case.negative_rows

    def placed(values: Tensor, rows: Tensor | None) -> Tensor:
        if case.reduction == "mean" or rows is None:
            return values
        return torch.zeros(len(case.hidden), dtype=dtype, device=values.device).index_add(
            0, rows, values
        )

    a, y, per = logits["hidden"], case.labels, {"reduction": case.reduction}
    b, n = logits["exemplar"], logits["negative"]
    detach = case.detach_exemplar
    parts = {
        "response": response_loss(a, y, **per),
        "exemplar": placed(response_loss(b, y[with_exemplar], **per), case.exemplar_rows),
        "rda": placed(
            rda_loss(a[with_exemplar], b, y[with_exemplar], detach_exemplar=detach, **per),
            case.exemplar_rows,
        ),
        "crt": placed(crt_loss(a[with_negative], n, y[with_negative], **per), case.negative_rows),
    }
    total = (
        parts["response"]
        + parts["exemplar"]
        + case.rda_weight * parts["rda"]
        + case.crt_weight * parts["crt"]
    )
    total.backward(case.above.to(dtype))
    values = {"total": total} | parts | _gradients(leaves)
    return Outcome(values, logits)


def truth(case: Case) -> Outcome:
    """In float64, from the rounded inputs."""
    return by_reference(case, torch.float64, torch.float64)


def yardstick(case: Case) -> Outcome:
    """What PyTorch computes from float32 logits of the same inputs."""
    return by_reference(case, case.hidden.dtype, torch.float32)


def _leaves(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    return {k: getattr(case, k).detach().to(dtype).requires_grad_() for k in LEAVES}


def _gradients(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        f"gradient of {k}": torch.zeros_like(v) if v.grad is None else v.grad
        for k, v in leaves.items()
    }


def floor(case: Case, exact: Outcome, name: str, *, rounded: bool) -> Tensor | float:
    """The error that rounding alone may cause, for cases where PyTorch happens to be exact.

    Two units in the last place of the largest logit or loss; the softmax has the same relative
    error. `rounded`: with a 16-bit head the gradients of the logits are stored in 16 bits, as in
    every mixed-precision step. Each term of the products is then wrong by at most `unit`,
    independently.
    """
    scale = max((v.abs().max().item() for v in exact.logits.values() if v.numel()), default=0.0)
    relative = 2.0**-22 * max(scale, 1.0)
    if not name.startswith("gradient"):
        return relative + 2.0**-22 * exact.values["total"].abs().max()  # nats
    leaf = name.removeprefix("gradient of ")
    squares = {k: v.grad**2 for k, v in exact.logits.items() if v.grad is not None}
    if leaf == "weight":
        squared = sum(g.T @ getattr(case, k).double() ** 2 for k, g in squares.items())
    else:
        squared = squares[leaf] @ case.weight.double() ** 2 if leaf in squares else torch.zeros(())
    unit = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}.get(case.hidden.dtype, 0.0)
    return relative * exact.values[name].abs().max() + 4 * unit * rounded * squared.sqrt()


def assert_as_good_as_torch(case: Case, implementation: str | None) -> None:
    """Check that every error is at most twice the yardstick's, plus a floor for rounding."""
    exact, torchs, ours = truth(case), yardstick(case), run(case, implementation)
    for name, expected in exact.values.items():
        got, by_torch = ours.values[name], torchs.values[name]
        assert got.shape == expected.shape, name
        if expected.numel() == 0:
            continue
        error = (got.double() - expected).abs()
        least = floor(case, exact, name, rounded=implementation in (None, "triton"))
        allowed = 2 * (by_torch.double() - expected).abs().max() + least
        excess = (error / allowed.clamp(min=1e-300)).max()
        assert excess <= 1, f"{name}: {excess:.2f} times the allowed error"
