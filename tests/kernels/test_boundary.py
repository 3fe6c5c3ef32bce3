"""The fused losses in a graph, given bad input, and in memory."""

import pytest
import torch

from kernels import linear_cross_entropy, linear_vitask
from tests.kernels.cases import draw

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"  # without one, conftest lets Triton interpret
FUSED = ["triton"] if CUDA else ["cpu", "triton"]
fused = pytest.mark.parametrize("implementation", FUSED)


# In the graph


# What opcheck itself does on the way.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@fused
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_operation_keeps_the_rules_of_custom_operations(implementation, reduction):
    from kernels.joint import joint_loss

    case = draw(5, 20, 4, negatives=0.6, reduction=reduction).to(DEVICE)
    leaves = {
        name: getattr(case, name).detach().requires_grad_()
        for name in ("hidden", "exemplar", "negative", "weight")
    }
    torch.library.opcheck(
        joint_loss,
        (
            leaves["hidden"], leaves["exemplar"], case.exemplar_rows, leaves["negative"],
            case.negative_rows, leaves["weight"], case.labels, (1.0, 1.0, 0.7, 1.3), True,
            reduction == "mean", (True, True, True), implementation,
        ),
    )  # fmt: skip


@fused
@pytest.mark.usefixtures("unchecked")
def test_compiles_to_one_forward_and_one_backward_operation(implementation):
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    case = draw(5, 20, 4, negatives=0.6).to(DEVICE)
    seen: dict[str, list[str]] = {}

    def listed(direction):
        def compiler(module, inputs):
            calls = [node for node in module.graph.nodes if node.op == "call_function"]
            seen[direction] = [str(n.target) for n in calls if "vitask" in str(n.target)]
            return make_boxed_func(module.forward)

        return compiler

    backend = aot_autograd(fw_compiler=listed("forward"), bw_compiler=listed("backward"))

    def step(hidden, exemplar, negative):
        return linear_vitask(
            hidden, case.weight, case.labels, exemplar_hidden=exemplar,
            negative_hidden=negative, negative_rows=case.negative_rows,
            implementation=implementation,
        ).total  # fmt: skip

    def gradients(function):
        leaves = [x.detach().requires_grad_() for x in (case.hidden, case.exemplar, case.negative)]
        loss = function(*leaves)
        loss.backward()
        return loss.detach(), *(leaf.grad for leaf in leaves)

    compiled = gradients(torch.compile(step, fullgraph=True, backend=backend))
    assert seen == {
        "forward": ["vitask.joint_loss.default"],
        "backward": ["vitask.joint_loss_backward.default"],
    }
    for ours, eager in zip(compiled, gradients(step), strict=True):
        assert torch.equal(ours, eager)


# Bad input


def bad(**changed):
    """Arguments of `linear_vitask` with some of them changed."""
    right = {
        "hidden": torch.zeros(4, 3),
        "weight": torch.zeros(7, 3),
        "labels": torch.zeros(4, dtype=torch.int64),
        "exemplar_hidden": torch.zeros(4, 3),
        "negative_hidden": torch.zeros(2, 3),
        "negative_rows": torch.tensor([0, 2]),
    }
    return right | changed


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"weight": torch.zeros(7, 5)}, r"hidden has shape \(4, 3\), weight \(7, 5\)"),
        ({"weight": torch.zeros(7, 3).half()}, r"weight torch\.float16.*cast one"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, r"labels have shape \(5,\)"),
        ({"labels": torch.zeros(4, dtype=torch.int32)}, r"torch\.int32.*torch\.int64"),
        ({"labels": torch.tensor([0, 7, 0, 0])}, "label 7 lies outside the vocabulary of 7"),
        ({"labels": torch.tensor([0, -1, 0, 0])}, "label -1 lies outside"),
        ({"exemplar_hidden": torch.zeros(3, 3)}, r"exemplar_hidden has shape \(3, 3\)"),
        ({"negative_hidden": torch.zeros(2, 4)}, "negative_hidden has shape"),
        ({"negative_rows": torch.tensor([0, 1, 2])}, "negative_rows has shape"),
        ({"negative_rows": torch.tensor([0, 4])}, "names row 4 of hidden, which has 4 rows"),
        ({"negative_rows": torch.tensor([1, 1])}, "twice"),
        ({"negative_hidden": None}, "negative_rows without negative_hidden"),
        ({"reduction": "sum"}, "reduction is 'sum'"),
        ({"implementation": "cuda"}, "no implementation 'cuda'.*reference, cpu, triton"),
        ({"labels": torch.zeros(4, dtype=torch.int64, device="meta")}, "labels is on meta"),
    ],
)
def test_bad_input_is_named(changed, named):
    arguments = bad(**changed)
    with pytest.raises(ValueError, match=named):
        linear_vitask(arguments.pop("hidden"), arguments.pop("weight"), **arguments)


def test_triton_refuses_float64():
    x = torch.zeros(2, 3, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ValueError, match="float32; use 'reference' for float64"):
        linear_cross_entropy(
            x, x, torch.zeros(2, dtype=torch.int64, device=DEVICE), implementation="triton"
        )


def test_row_kernels_answer_wrong_labels_and_rows_with_nan_and_stay_inside():
    """As on CUDA, where looking at values would stall: the checks are left out here."""
    from kernels.joint import joint_loss

    case = draw(4, 30, 5, ignored=0.0, negatives=0.5).to(DEVICE)
    right = case.labels.clone()

    def losses(labels, negative_rows):
        return joint_loss(
            case.hidden, case.exemplar, None, case.negative, negative_rows, case.weight, labels,
            (1.0, 1.0, 1.0, 1.0), True, False, (True, True, True), "triton",
        )  # fmt: skip

    _, expected, gradient, _ = losses(right, case.negative_rows)
    for wrong in (30, -1, 2**40, -(2**40)):
        labels = right.clone()
        labels[1] = wrong
        _, parts, of_rows, _ = losses(labels, case.negative_rows)
        assert parts[:3, 1].isnan().all()
        assert (of_rows[1] == 0).all()
        others = [0, 2, 3]
        assert torch.equal(parts[:, others], expected[:, others])
        assert torch.equal(of_rows[others], gradient[others])
    for rows in ([0, 9], [0, -5], [2, 2]):
        _, parts, of_rows, _ = losses(right, torch.tensor(rows, device=DEVICE))
        assert parts[3].isnan().all()
        assert torch.equal(parts[:3], expected[:3])
        assert of_rows.isfinite().all()


# Memory


@pytest.mark.skipif(CUDA, reason="the CPU path")
def test_chunked_path_never_holds_all_logits(monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    from kernels import chunked
    from kernels.joint import _problem
    from kernels.problem import Wanted

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.elements = max(self.elements, result.untyped_storage().nbytes() // 4)
            return result

    rows, vocab = 400, 5000
    monkeypatch.setattr(chunked, "LOGIT_BYTES", 3 * 40 * vocab * 4)  # 40 rows of three branches
    case = draw(rows, vocab, 8, ignored=0.0)
    problem = _problem(
        case.hidden, case.exemplar, None, case.negative, None, case.weight, case.labels,
        (1.0, 1.0, 1.0, 1.0), True, True,
    )  # fmt: skip
    with Largest() as seen:
        chunked.chunked_rows(problem, Wanted(hidden=True, exemplar=True, weight=False))
    assert seen.elements <= 3 * 40 * vocab
