"""The losses in every implementation that a user might pick, each at its best.

Operations: cross_entropy, rda, crt, and vitask = Van + EP + RDA + CRT. As in tuning, the head is
frozen and only the hidden rows get gradients. `peers` also names the implementations that this
machine lacks, with the reason.
"""

import importlib.util
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from kernels import (
    IGNORE_INDEX,
    crt_loss,
    linear_cross_entropy,
    linear_crt,
    linear_rda,
    linear_vitask,
    rda_loss,
    response_loss,
)

OPERATIONS = ("cross_entropy", "rda", "crt", "vitask")
LIGER = "liger_kernel"


class Inputs(NamedTuple):
    """Hidden rows of the three branches (rows, hidden), head (vocab, hidden), labels (rows,)."""

    hidden: Tensor
    exemplar: Tensor
    negative: Tensor
    weight: Tensor
    labels: Tensor

    @classmethod
    def random(
        cls, rows: int, hidden: int, vocab: int, dtype: torch.dtype, device: str, seed: int = 0
    ) -> "Inputs":
        """Inputs with logits of unit variance."""
        generator = torch.Generator(device).manual_seed(seed)
        head = torch.randn(vocab, hidden, generator=generator, device=device) / hidden**0.5
        return cls.over(head.to(dtype), rows, seed)

    @classmethod
    def over(cls, weight: Tensor, rows: int, seed: int) -> "Inputs":
        """Inputs for a given head. The branches differ by about as much as a model's do."""
        generator = torch.Generator(weight.device).manual_seed(seed)
        options: dict[str, Any] = {"generator": generator, "device": weight.device}
        base, exemplar, negative = (torch.randn(rows, weight.shape[1], **options) for _ in range(3))
        branches = (base, base + 0.3 * exemplar, base + 0.5 * negative)
        # Without copy, `to` returns the base itself in float32 and the others join its graph.
        leaves = (branch.to(weight.dtype, copy=True).requires_grad_() for branch in branches)
        labels = torch.randint(len(weight), (rows,), **options)
        return cls._make([*leaves, weight, labels])

    def redrawn(self, count: int) -> "list[Inputs]":
        """These inputs, then others for the same head with new hidden rows and labels."""
        rows = len(self.hidden)
        return [self, *(Inputs.over(self.weight, rows, seed) for seed in range(1, count))]


Loss = Callable[[Inputs], Tensor]
Peer = dict[str, Loss]  # operation -> loss; unsupported operations are left out


def peers(device: str) -> tuple[dict[str, Peer], dict[str, str]]:
    """Implementations by name, and the missing ones with the reason."""
    found: dict[str, Peer] = {
        "ours": OURS,
        "eager": EAGER,
        "eager_shared": EAGER_SHARED,
        "eager_functional": FUNCTIONAL,
    }
    missing: dict[str, str] = {}
    if device == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        missing["compile"] = missing["compile_functional"] = "no C++ compiler for torch.compile"
    else:
        found["compile"] = {name: _compiled(loss) for name, loss in EAGER_SHARED.items()}
        found["compile_functional"] = {name: _compiled(f) for name, f in FUNCTIONAL.items()}
    if hasattr(functional, "linear_cross_entropy"):
        found["torch_linear_cross_entropy"] = _torch_linear()
    else:
        missing["torch_linear_cross_entropy"] = f"not in torch {torch.__version__}"
    for name, package, make in (
        ("liger", LIGER, _liger),
        ("liger_one_chunk", LIGER, partial(_liger, one_chunk=True)),
        ("liger_distillation", LIGER, _liger_distillation),
        ("liger_distillation_one_chunk", LIGER, partial(_liger_distillation, one_chunk=True)),
        ("cce", "cut_cross_entropy", _cut_cross_entropy),
    ):
        if importlib.util.find_spec(package) is None:
            missing[name] = f"{package} is not installed: pip install -e .[peers]"
        elif device != "cuda":
            missing[name] = "its kernels need CUDA"
        else:
            found[name] = make()
    return found, missing


def _ours(**options: Any) -> Peer:
    return {
        "cross_entropy": lambda x: linear_cross_entropy(x.hidden, x.weight, x.labels, **options),
        "rda": lambda x: linear_rda(x.hidden, x.exemplar, x.weight, x.labels, **options),
        "crt": lambda x: linear_crt(x.hidden, x.negative, x.weight, x.labels, **options),
        "vitask": lambda x: linear_vitask(
            x.hidden, x.weight, x.labels,
            exemplar_hidden=x.exemplar, negative_hidden=x.negative, **options,
        ).total,
    }  # fmt: skip


OURS, REFERENCE = _ours(), _ours(implementation="reference")


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits as eager code makes them: a product in the inputs' dtype, then float32."""
    return (hidden @ weight.T).float()


def _log_p(hidden: Tensor, weight: Tensor) -> Tensor:
    return _logits(hidden, weight).log_softmax(-1)


def _eager_vitask(x: Inputs) -> Tensor:
    """Each loss makes the logits that it needs, as separate functions do."""
    exemplar = response_loss(_logits(x.exemplar, x.weight), x.labels)
    return EAGER["cross_entropy"](x) + exemplar + EAGER["rda"](x) + EAGER["crt"](x)


def _shared_vitask(x: Inputs) -> Tensor:
    """All losses share the logits of each branch."""
    a, b, n = (_logits(hidden, x.weight) for hidden in x[:3])
    return (
        response_loss(a, x.labels)
        + response_loss(b, x.labels)
        + rda_loss(a, b, x.labels)
        + crt_loss(a, n, x.labels)
    )


EAGER: Peer = {
    "cross_entropy": lambda x: response_loss(_logits(x.hidden, x.weight), x.labels),
    "rda": lambda x: rda_loss(
        _logits(x.hidden, x.weight), _logits(x.exemplar.detach(), x.weight), x.labels
    ),
    "crt": lambda x: crt_loss(_logits(x.hidden, x.weight), _logits(x.negative, x.weight), x.labels),
    "vitask": _eager_vitask,
}
EAGER_SHARED: Peer = EAGER | {"vitask": _shared_vitask}


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def _difference(x: Inputs) -> Tensor:
    """Logits of CRT.

    The head has no bias, so in float32 one product of the hidden difference gives them. In 16 bits
    that difference would be rounded.
    """
    if x.hidden.dtype == torch.float32:
        return _logits(x.hidden - x.negative, x.weight)
    return _logits(x.hidden, x.weight) - _logits(x.negative, x.weight)


def _functional_vitask(x: Inputs) -> Tensor:
    """All losses share the logits and log-softmaxes of each branch."""
    a, b, n = (_logits(hidden, x.weight) for hidden in x[:3])
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    responses = functional.nll_loss(log_p, x.labels) + functional.nll_loss(log_q, x.labels)
    return responses + _kl(log_p, log_q.detach()) + functional.cross_entropy(a - n, x.labels)


# PyTorch's losses. Its KL would count ignored rows, so the inputs have none.
FUNCTIONAL: Peer = {
    "cross_entropy": lambda x: functional.cross_entropy(_logits(x.hidden, x.weight), x.labels),
    "rda": lambda x: _kl(_log_p(x.hidden, x.weight), _log_p(x.exemplar.detach(), x.weight)),
    "crt": lambda x: functional.cross_entropy(_difference(x), x.labels),
    "vitask": _functional_vitask,
}


def _compiled(loss: Loss) -> Loss:
    compiled = torch.compile(lambda *x: loss(Inputs(*x)), dynamic=False, fullgraph=True)
    return lambda x: compiled(*x)


CrossEntropy = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden rows, head, labels -> loss


def _from(cross_entropy: CrossEntropy) -> Peer:
    """The two operations of a fused cross-entropy; CRT takes the hidden difference."""
    return {
        "cross_entropy": lambda x: cross_entropy(x.hidden, x.weight, x.labels),
        "crt": lambda x: cross_entropy(x.hidden - x.negative, x.weight, x.labels),
    }


def _torch_linear() -> Peer:
    """PyTorch's chunked cross-entropy."""
    options = torch.nn.LinearCrossEntropyOptions()
    return _from(
        partial(functional.linear_cross_entropy, ignore_index=IGNORE_INDEX, options=options)
    )


def _liger(*, one_chunk: bool = False) -> Peer:
    """Liger's fused cross-entropy and JSD; `one_chunk` switches its chunking off."""
    from liger_kernel.transformers import LigerFusedLinearJSD, LigerJSD

    jsd, plain_jsd = LigerFusedLinearJSD(jsd_beta=1.0), LigerJSD(beta=1.0)
    cross_entropy = _liger_cross_entropy(one_chunk)
    peer = _from(cross_entropy)

    def rda(x: Inputs) -> Tensor:
        if not one_chunk:
            return jsd(x.hidden, x.weight, x.exemplar.detach(), x.weight, x.labels)
        teacher = _log_p(x.exemplar.detach(), x.weight)
        return plain_jsd(_log_p(x.hidden, x.weight), teacher, x.labels)

    def vitask(x: Inputs) -> Tensor:
        van = peer["cross_entropy"](x)
        return van + cross_entropy(x.exemplar, x.weight, x.labels) + rda(x) + peer["crt"](x)

    return peer | {"rda": rda, "vitask": vitask}


def _liger_distillation(*, one_chunk: bool = False) -> Peer:
    """Liger's chunked distillation: Van + RDA in one call. It always makes the head's gradient."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    cross_entropy = _liger_cross_entropy(one_chunk)

    def vitask(x: Inputs) -> Tensor:
        chunk = {"chunk_size": len(x.hidden)} if one_chunk else {}
        distil = LigerFusedLinearJSDLoss(
            weight_hard_loss=1.0, weight_soft_loss=1.0, beta=1.0, **chunk
        )
        return (
            distil(x.hidden, x.weight, x.exemplar.detach(), x.weight, x.labels)
            + cross_entropy(x.exemplar, x.weight, x.labels)
            + cross_entropy(x.hidden - x.negative, x.weight, x.labels)
        )

    return {"vitask": vitask}


def _liger_cross_entropy(one_chunk: bool) -> CrossEntropy:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        vocab, width = weight.shape
        chunks = {"chunk_mem_const": -(-vocab // width)} if one_chunk else {}
        return liger_fused_linear_cross_entropy(hidden, weight, labels, **chunks)

    return cross_entropy


def _cut_cross_entropy() -> Peer:
    """Exact: without the default filter on small gradients."""
    from cut_cross_entropy import linear_cross_entropy as cce

    return _from(partial(cce, impl="cce", filter_eps=None))
