"""The VITask losses in plain PyTorch: the truth that everything faster is held against.

Logits are unnormalised and already aligned with `labels`: the next-token shift is the caller's.
Every loss is a mean over its counted tokens, in nats, and 0 when none is counted; with
`reduction="none"` it is given per token, 0 for ignored ones. Computed in float32, or in float64
when given float64. A label outside the vocabulary is an error; on CUDA, where looking for it would
stall the stream, and in compiled graphs its token has loss NaN and no gradient.

Source: Bai et al. 2024, arXiv:2410.06456.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Reduction = Literal["mean", "none"]
IGNORE_INDEX = -100  # label of prompt and padding positions: never part of a loss


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
    r"""Response distribution alignment (eq. 3): answer without the exemplar as if it had been seen.

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

    `negative_logits` are those of the same response after another sample's image, whose own
    response differs. Unit: nats per response token; log(vocab) when the image changes nothing.
    The gradient flows into both. Raises ValueError for shapes that do not match.
    """
    _same_shape(logits, negative_logits, "negative_logits")
    difference = _exact(logits) - _exact(negative_logits)
    return response_loss(difference, labels, reduction=reduction)


def _exact(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _log_softmax(logits: Tensor, keep: Tensor) -> Tensor:
    """log softmax of the kept rows. Others are cut off first: a NaN there has no gradient."""
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
    """Mask of the tokens in S, and of those among them whose label is none, where it may pass."""
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} and logits {tuple(logits.shape)}; "
            "expected (tokens,) and (tokens, vocab)"
        )
    keep = labels != IGNORE_INDEX
    wrong = keep & ((labels < 0) | (labels >= logits.shape[1]))
    # On CUDA a look would stall the stream, and it would break a graph.
    if not (labels.is_cuda or torch.compiler.is_compiling()) and wrong.any():
        raise ValueError(
            f"label {int(labels[wrong][0])} lies outside the vocabulary of {logits.shape[1]}; "
            f"expected 0 to {logits.shape[1] - 1}, or {IGNORE_INDEX} for an ignored token"
        )
    return keep, wrong
