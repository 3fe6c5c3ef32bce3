"""The losses by every implementation that a user might pick instead, each at its best.

Names of operations: cross_entropy, rda, crt, and vitask = Van + EP + RDA + CRT. The head is
frozen, as in tuning: gradients go to the hidden rows alone. What is not installed, or cannot run
on this device, is named as missing with its reason.
"""

import importlib.util
import shutil
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

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
        """Logits of unit variance."""
        generator = torch.Generator(device).manual_seed(seed)
        head = torch.randn(vocab, hidden, generator=generator, device=device) / hidden**0.5
        return cls.over(head.to(dtype), rows, dtype, device, seed)

    @classmethod
    def over(
        cls, weight: Tensor, rows: int, dtype: torch.dtype, device: str, seed: int
    ) -> "Inputs":
        """Over a head of one's own; branches that differ as those of one model do."""
        generator = torch.Generator(device).manual_seed(seed)
        hidden = weight.shape[1]

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        base = normal(rows, hidden)
        branches = (base, base + 0.3 * normal(rows, hidden), base + 0.5 * normal(rows, hidden))
        # Copies: in float32 `to` would give back the base, and the others would hang on its graph.
        own, exemplar, negative = (b.to(dtype, copy=True).requires_grad_() for b in branches)
        return cls(
            hidden=own,
            exemplar=exemplar,
            negative=negative,
            weight=weight,
            labels=torch.randint(len(weight), (rows,), generator=generator, device=device),
        )

    def redrawn(self, count: int) -> "list[Inputs]":
        """It, and others over the same head: hidden rows and labels by seeds of their own."""
        rows, dtype, device = len(self.hidden), self.hidden.dtype, self.hidden.device.type
        others = (Inputs.over(self.weight, rows, dtype, device, seed) for seed in range(1, count))
        return [self, *others]


Loss = Callable[[Inputs], Tensor]
Peer = dict[str, Loss]  # operation -> loss; operations that it cannot do are left out


def peers(device: str) -> tuple[dict[str, Peer], dict[str, str]]:
    """Implementations by name, and those that are missing here with the reason."""
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
        ("liger", "liger_kernel", _liger),
        ("liger_one_chunk", "liger_kernel", partial(_liger, one_chunk=True)),
        ("liger_distillation", "liger_kernel", _liger_distillation),
        (
            "liger_distillation_one_chunk",
            "liger_kernel",
            partial(_liger_distillation, one_chunk=True),
        ),
        ("cce", "cut_cross_entropy", _cut_cross_entropy),
    ):
        if importlib.util.find_spec(package) is None:
            missing[name] = f"{package} is not installed: pip install -e .[peers]"
        elif device != "cuda":
            missing[name] = "its kernels need CUDA"
        else:
            found[name] = make()
    return found, missing


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """As eager code makes them: a product in the inputs' dtype, float32 from there on."""
    return (hidden @ weight.T).float()


OURS: Peer = {
    "cross_entropy": lambda x: linear_cross_entropy(x.hidden, x.weight, x.labels),
    "rda": lambda x: linear_rda(x.hidden, x.exemplar, x.weight, x.labels),
    "crt": lambda x: linear_crt(x.hidden, x.negative, x.weight, x.labels),
    "vitask": lambda x: (
        linear_vitask(
            x.hidden, x.weight, x.labels, exemplar_hidden=x.exemplar, negative_hidden=x.negative
        ).total
    ),
}


def _eager_rda(x: Inputs) -> Tensor:
    with torch.no_grad():
        teacher = _logits(x.exemplar, x.weight)
    return rda_loss(_logits(x.hidden, x.weight), teacher, x.labels)


def _eager_crt(x: Inputs) -> Tensor:
    return crt_loss(_logits(x.hidden, x.weight), _logits(x.negative, x.weight), x.labels)


def _eager_cross_entropy(x: Inputs) -> Tensor:
    return response_loss(_logits(x.hidden, x.weight), x.labels)


def _eager_vitask(x: Inputs) -> Tensor:
    """Every loss makes the logits that it needs: what separate functions cost."""
    exemplar = response_loss(_logits(x.exemplar, x.weight), x.labels)
    return _eager_cross_entropy(x) + exemplar + _eager_rda(x) + _eager_crt(x)


def _shared_vitask(x: Inputs) -> Tensor:
    """Logits of each branch once, for all losses."""
    a, b, n = (_logits(h, x.weight) for h in (x.hidden, x.exemplar, x.negative))
    return (
        response_loss(a, x.labels)
        + response_loss(b, x.labels)
        + rda_loss(a, b, x.labels)
        + crt_loss(a, n, x.labels)
    )


EAGER: Peer = {
    "cross_entropy": _eager_cross_entropy,
    "rda": _eager_rda,
    "crt": _eager_crt,
    "vitask": _eager_vitask,
}
EAGER_SHARED: Peer = EAGER | {"vitask": _shared_vitask}


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def _functional_rda(x: Inputs) -> Tensor:
    with torch.no_grad():
        log_q = _logits(x.exemplar, x.weight).log_softmax(-1)
    return _kl(_logits(x.hidden, x.weight).log_softmax(-1), log_q)


def _difference(x: Inputs) -> Tensor:
    """Logits of CRT. The head has no bias, so those of the hidden difference are the same, for
    half the products; of 16-bit rows the difference would be rounded to 16 bits."""
    if x.hidden.dtype == torch.float32:
        return _logits(x.hidden - x.negative, x.weight)
    return _logits(x.hidden, x.weight) - _logits(x.negative, x.weight)


def _functional_crt(x: Inputs) -> Tensor:
    return functional.cross_entropy(_difference(x), x.labels)


def _functional_vitask(x: Inputs) -> Tensor:
    """Logits and log-softmaxes of each branch once."""
    a, b, n = (_logits(h, x.weight) for h in (x.hidden, x.exemplar, x.negative))
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    answers = functional.nll_loss(log_p, x.labels) + functional.nll_loss(log_q, x.labels)
    return answers + _kl(log_p, log_q.detach()) + functional.cross_entropy(a - n, x.labels)


# PyTorch's own losses; they count no ignored rows for the KL, so there are none here.
FUNCTIONAL: Peer = {
    "cross_entropy": lambda x: functional.cross_entropy(_logits(x.hidden, x.weight), x.labels),
    "rda": _functional_rda,
    "crt": _functional_crt,
    "vitask": _functional_vitask,
}


def _compiled(loss: Loss) -> Loss:
    compiled = torch.compile(lambda *x: loss(Inputs(*x)), dynamic=False, fullgraph=True)
    return lambda x: compiled(*x)


def _torch_linear() -> Peer:
    """torch's own chunked cross-entropy; CRT through the hidden difference (one bias-free head)."""
    options = torch.nn.LinearCrossEntropyOptions()

    def cross_entropy(hidden: Tensor, x: Inputs) -> Tensor:
        return functional.linear_cross_entropy(
            hidden, x.weight, x.labels, ignore_index=IGNORE_INDEX, options=options
        )

    return {
        "cross_entropy": lambda x: cross_entropy(x.hidden, x),
        "crt": lambda x: cross_entropy(x.hidden - x.negative, x),
    }


def _liger(*, one_chunk: bool = False) -> Peer:
    """Liger's fused cross-entropy and JSD; `one_chunk`: its chunking switched off."""
    from liger_kernel.transformers import LigerFusedLinearJSD, LigerJSD

    jsd, plain_jsd = LigerFusedLinearJSD(jsd_beta=1.0), LigerJSD(beta=1.0)
    cross_entropy = _liger_cross_entropy(one_chunk)

    def rda(x: Inputs) -> Tensor:
        if not one_chunk:
            return jsd(x.hidden, x.weight, x.exemplar.detach(), x.weight, x.labels)
        with torch.no_grad():
            teacher = _logits(x.exemplar, x.weight).log_softmax(-1)
        return plain_jsd(_logits(x.hidden, x.weight).log_softmax(-1), teacher, x.labels)

    def crt(x: Inputs) -> Tensor:
        return cross_entropy(x.hidden - x.negative, x)

    return {
        "cross_entropy": lambda x: cross_entropy(x.hidden, x),
        "rda": rda,
        "crt": crt,
        "vitask": lambda x: (
            cross_entropy(x.hidden, x) + cross_entropy(x.exemplar, x) + rda(x) + crt(x)
        ),
    }


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
            + cross_entropy(x.exemplar, x)
            + cross_entropy(x.hidden - x.negative, x)
        )

    return {"vitask": vitask}


def _liger_cross_entropy(one_chunk: bool) -> Callable[[Tensor, Inputs], Tensor]:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def cross_entropy(hidden: Tensor, x: Inputs) -> Tensor:
        vocab, width = x.weight.shape
        chunks = {"chunk_mem_const": -(-vocab // width)} if one_chunk else {}
        return liger_fused_linear_cross_entropy(hidden, x.weight, x.labels, **chunks)

    return cross_entropy


def _cut_cross_entropy() -> Peer:
    """Exact: without the default's filter on small gradients."""
    from cut_cross_entropy import linear_cross_entropy as cce

    exact = partial(cce, impl="cce", filter_eps=None)
    return {
        "cross_entropy": lambda x: exact(x.hidden, x.weight, x.labels),
        "crt": lambda x: exact(x.hidden - x.negative, x.weight, x.labels),
    }
