"""The VITask losses in plain PyTorch: the reference that faster implementations are tested against.

Logits are unnormalised. The caller has already shifted them by one token, so that they are aligned
with `labels`. Every loss is in nats: the mean over its counted tokens, 0 if none is counted, or one
value per token with `reduction="none"`, 0 for ignored tokens. It is computed in float32, or in
float64 for float64 inputs. A label outside the vocabulary is an error. On CUDA, where a check would
stall the stream, and in compiled graphs, its token has loss NaN and a zero gradient.

Source: Bai et al. 2024, arXiv:2410.06456.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels.problem import IGNORE_INDEX, Problem, Reduction, all_owned, counted, slots


def response_loss(
    logits: Float[Tensor, "tokens vocab"],
    labels: Int[Tensor, " tokens"],
    *,
    reduction: Reduction = "mean",
) -> Float[Tensor, "*tokens"]:
    r"""Next-token cross-entropy of the response: Van (eq. 1), and EP (eq. 2) with exemplar logits.

        L = 1/|S| sum_{t in S} -log softmax(logits[t])[labels[t]]

    S = {t : labels[t] != IGNORE_INDEX}; an empty S gives 0. Unit: nats per response token.
    Raises ValueError for labels that do not match the logits.
    """
    keep, wrong = _counted(labels, logits)
    log_p = _log_softmax(logits, keep)
    picked = log_p.gather(-1, labels.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]  # (tokens,)
    return _reduced(-picked, keep, wrong, reduction)


def rda_loss(
    logits: Float[Tensor, "tokens vocab"],
    exemplar_logits: Float[Tensor, "tokens vocab"],
    labels: Int[Tensor, " tokens"],
    *,
    detach_exemplar: bool = True,
    reduction: Reduction = "mean",
) -> Float[Tensor, "*tokens"]:
    r"""Response distribution alignment (eq. 3): answer without the exemplar as if it were given.

        L = 1/|S| sum_{t in S} KL(p_t || q_t),    KL(p || q) = sum_v p_v (log p_v - log q_v)

    p_t = softmax(logits[t])           given image and instruction: the student
    q_t = softmax(exemplar_logits[t])  given image, exemplar and instruction: the teacher

    Unit: nats per response token; 0 if and only if p = q on S. The teacher is a constant unless
    `detach_exemplar=False` (the paper's RDA*). Raises ValueError for labels or exemplar logits
    that do not match the logits.
    """
    _same_shape(logits, exemplar_logits, "exemplar_logits")
    keep, wrong = _counted(labels, logits)
    teacher = exemplar_logits.detach() if detach_exemplar else exemplar_logits
    log_p, log_q = _log_softmax(logits, keep), _log_softmax(teacher, keep)
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)  # (tokens,)
    return _reduced(kl, keep, wrong, reduction)


def crt_loss(
    logits: Float[Tensor, "tokens vocab"],
    negative_logits: Float[Tensor, "tokens vocab"],
    labels: Int[Tensor, " tokens"],
    *,
    reduction: Reduction = "mean",
) -> Float[Tensor, "*tokens"]:
    r"""Contrastive response tuning (eq. 5, 6): the right image must raise its response.

        L = 1/|S| sum_{t in S} -log softmax(logits[t] - negative_logits[t])[labels[t]]

    `negative_logits` are those of the same response after the image of another sample, whose
    response differs. Unit: nats per response token; log(vocab) if the image changes nothing.
    The gradient flows into both. Raises ValueError for shapes that do not match.
    """
    _same_shape(logits, negative_logits, "negative_logits")
    difference = _exact(logits) - _exact(negative_logits)
    return response_loss(difference, labels, reduction=reduction)


def joint_loss(problem: Problem) -> tuple[Tensor, Tensor]:
    """Total () and losses (4,) in nats, or (rows,) and (4, rows) without `mean`.

    Keeps whole logits and lets autograd differentiate the losses above.
    """
    with torch.autocast(problem.hidden.device.type, enabled=False):
        losses = _four_losses(problem)
        total = sum(w * loss for w, loss in zip(problem.loss_weights, losses, strict=True) if w)
        return total, torch.stack(losses)


def _four_losses(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """In the order of `LOSSES`, each () or (rows,)."""
    reduction: Reduction = "mean" if problem.mean else "none"
    labels = problem.labels
    logits = _logits(problem.hidden, labels, problem.weight)
    response = response_loss(logits, labels, reduction=reduction)
    exemplar = rda = crt = torch.zeros_like(response)
    if len(problem.exemplar):
        rows = problem.exemplar_rows
        at = _base_rows(rows, problem)
        teacher = _logits(problem.exemplar, labels[at], problem.weight)
        alone = response_loss(teacher, labels[at], reduction=reduction)
        kl = rda_loss(
            logits[at], teacher, labels[at],
            detach_exemplar=problem.detach_exemplar, reduction=reduction,
        )  # fmt: skip
        exemplar, rda = _on_base_rows(alone, rows, problem), _on_base_rows(kl, rows, problem)
    if len(problem.negative):
        rows = problem.negative_rows
        at = _base_rows(rows, problem)
        negative = _logits(problem.negative, labels[at], problem.weight)
        contrast = crt_loss(logits[at], negative, labels[at], reduction=reduction)
        crt = _on_base_rows(contrast, rows, problem)
    return response, exemplar, rda, crt


def _logits(hidden: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """(rows, vocab). Ignored rows are replaced first, so that a NaN there cannot reach the head."""
    return _exact(hidden.where(counted(labels)[:, None], 0)) @ _exact(weight).T


def _base_rows(rows: Tensor | None, problem: Problem) -> Tensor | slice:
    """The base rows of a branch, as an index; wrong row numbers are clamped into range."""
    return slice(None) if rows is None else rows.clamp(0, max(len(problem.hidden) - 1, 0))


def _on_base_rows(values: Tensor, rows: Tensor | None, problem: Problem) -> Tensor:
    """A branch's loss, moved to its base rows; NaN if row numbers are wrong and unchecked."""
    if rows is None:
        return values
    if not problem.mean:
        at = _base_rows(rows, problem)
        values = values.new_zeros(len(problem.hidden)).index_add(0, at, values)
    owned = all_owned(slots(rows, len(rows), problem.hidden), len(rows))
    return values + torch.where(owned, 0.0, torch.nan).to(values.dtype)


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _log_softmax(logits: Tensor, keep: Tensor) -> Tensor:
    """log softmax of the kept rows. Other rows are replaced first, so that a NaN cannot spread."""
    return _exact(logits).where(keep[:, None], 0).log_softmax(dim=-1)


def _reduced(values: Tensor, keep: Tensor, wrong: Tensor, reduction: Reduction) -> Tensor:
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction is {reduction!r}; expected 'mean' or 'none'")
    values = values.where(keep, 0).masked_fill(wrong, torch.nan)
    return values if reduction == "none" else values.sum() / keep.sum().clamp(min=1)


def _same_shape(logits: Tensor, other: Tensor, name: str) -> None:
    if other.shape != logits.shape:
        raise ValueError(
            f"{name} has shape {tuple(other.shape)}, logits {tuple(logits.shape)}; "
            "expected the same (tokens, vocab)"
        )


def _counted(labels: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens,) masks: the tokens in S, and those in S with a label outside the vocabulary.

    The second is only ever true where labels cannot be checked.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} and logits {tuple(logits.shape)}; "
            "expected (tokens,) and (tokens, vocab)"
        )
    keep = counted(labels)
    wrong = keep & ((labels < 0) | (labels >= logits.shape[1]))
    # On CUDA the check would stall the stream, and it would break a compiled graph.
    if not (labels.is_cuda or torch.compiler.is_compiling()) and wrong.any():
        raise ValueError(
            f"label {int(labels[wrong][0])} lies outside the vocabulary of {logits.shape[1]}; "
            f"expected 0 to {logits.shape[1] - 1}, or {IGNORE_INDEX} for an ignored token"
        )
    return keep, wrong
