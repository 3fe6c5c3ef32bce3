"""The fused losses in compiled graphs, with bad input, and their memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import cpu, joint, linear_cross_entropy, linear_crt, linear_rda, linear_vitask
from kernels.cpu import chunk_rows
from kernels.problem import Problem, Wanted
from tests.kernels.cases import Case, draw

ROOT = Path(__file__).parents[2]
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"  # on the CPU, conftest makes Triton interpret
FUSED = ["triton"] if CUDA else ["cpu", "triton"]
fused = pytest.mark.parametrize("implementation", FUSED)


# In compiled graphs


MODULES = {"cpu": "cpu", "triton": "cuda"}  # the file of each implementation


def flat_inputs(case: Case, implementation: str, **changed: object) -> tuple[object, ...]:
    """Arguments of the custom operation, with every gradient wanted; `changed` fields replaced."""
    problem = Problem(
        hidden=case.hidden,
        exemplar=case.exemplar,
        exemplar_rows=case.exemplar_rows,
        negative=case.negative,
        negative_rows=case.negative_rows,
        weight=case.weight,
        labels=case.labels,
        loss_weights=(1.0, 1.0, case.rda_weight, case.crt_weight),
        detach_exemplar=case.detach_exemplar,
        mean=case.reduction == "mean",
    )
    wanted = Wanted(hidden=True, exemplar=True, weight=True)
    return joint._flatten(problem._replace(**changed), wanted, MODULES[implementation])


# opcheck causes this warning.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@fused
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_operation_keeps_the_rules_of_custom_operations(implementation, reduction):
    case = draw(5, 20, 4, negatives=0.6, reduction=reduction).to(DEVICE)
    leaves = {
        name: getattr(case, name).detach().requires_grad_()
        for name in ("hidden", "exemplar", "negative")
    }
    weight = case.weight.t().contiguous().t()  # its strides differ from those of its gradient
    leaves["weight"] = weight.detach().requires_grad_()
    torch.library.opcheck(joint.joint_loss_op, flat_inputs(case, implementation, **leaves))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@fused
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_operation_keeps_the_rules_too(implementation, reduction):
    case = draw(5, 20, 4, negatives=0.6, reduction=reduction).to(DEVICE)
    weight = case.weight.t().contiguous().t()  # its strides differ from those of its gradient
    inputs = flat_inputs(case, implementation, weight=weight)
    _, _, of_rows, of_head = joint.joint_loss_op(*inputs)
    torch.library.opcheck(
        joint.joint_loss_backward_op, (case.above, of_rows, of_head, *inputs),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


@fused
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("trained_head", [False, True], ids=["frozen head", "trained head"])
def test_compiles_to_one_forward_and_one_backward_operation(
    implementation, reduction, trained_head
):
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

    def step(hidden, exemplar, negative, weight):
        return linear_vitask(
            hidden, weight, case.labels, exemplar_hidden=exemplar,
            negative_hidden=negative, negative_rows=case.negative_rows,
            reduction=reduction, implementation=implementation,
        ).total  # fmt: skip

    def gradients(function):
        leaves = [x.detach().requires_grad_() for x in (case.hidden, case.exemplar, case.negative)]
        leaves.append(case.weight.detach().requires_grad_(trained_head))
        loss = function(*leaves)
        loss.sum().backward()
        leaves = leaves if trained_head else leaves[:3]
        return loss.detach(), *(leaf.grad for leaf in leaves)

    compiled = gradients(torch.compile(step, fullgraph=True, backend=backend))
    assert seen == {
        "forward": ["vitask.joint_loss.default"],
        "backward": ["vitask.joint_loss_backward.default"],
    }
    for ours, eager in zip(compiled, gradients(step), strict=True):
        assert torch.equal(ours, eager)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("implementation", [*FUSED, "reference"])
def test_single_operations_compile_to_one_graph_each(implementation):
    case = draw(5, 20, 4).to(DEVICE)
    h, w, y, chosen = case.hidden, case.weight, case.labels, {"implementation": implementation}
    for loss in (
        lambda x: linear_cross_entropy(x, w, y, **chosen),
        lambda x: linear_rda(x, case.exemplar, w, y, **chosen),
        lambda x: linear_crt(x, case.negative, w, y, **chosen),
    ):
        gradients = []
        for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
            hidden = h.detach().requires_grad_()
            function(hidden).backward()
            gradients.append(hidden.grad)
        assert torch.equal(*gradients)


# Bad input


def bad(**changed):
    """Arguments of `linear_vitask`, some of them replaced."""
    good = {
        "hidden": torch.zeros(4, 3),
        "weight": torch.zeros(7, 3),
        "labels": torch.zeros(4, dtype=torch.int64),
        "exemplar_hidden": torch.zeros(4, 3),
        "negative_hidden": torch.zeros(2, 3),
        "negative_rows": torch.tensor([0, 2]),
    }
    return good | changed


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
        ({"negative_rows": torch.tensor([0, 4])}, "contains 4, but hidden has 4 rows"),
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


@pytest.mark.usefixtures("unchecked")
@pytest.mark.skipif(CUDA, reason="values on CUDA are not checked")
@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"labels": torch.tensor([0, 7, 0, 0])}, "label 7 lies outside"),
        ({"negative_rows": torch.tensor([0, 9])}, "contains 9"),
        ({"negative_rows": torch.tensor([1, 1])}, "twice"),
    ],
)
def test_wrong_values_are_named_in_a_compiled_graph_as_well(changed, named):
    arguments = bad(**changed)
    compiled = torch.compile(linear_vitask, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=named):
        compiled(arguments.pop("hidden"), arguments.pop("weight"), **arguments)


@pytest.mark.parametrize("implementation", [*FUSED, "reference"])
def test_autocast_changes_nothing(implementation):
    case = draw(6, 40, 8, negatives=0.5).to(DEVICE)

    def outcome():
        hidden = case.hidden.detach().requires_grad_()
        loss = linear_vitask(
            hidden, case.weight, case.labels, exemplar_hidden=case.exemplar,
            implementation=implementation,
        ).total  # fmt: skip
        return hidden, loss

    found = [outcome()]
    with torch.autocast(DEVICE, torch.bfloat16):
        found.append(outcome())
    for _, loss in found:
        loss.backward()
    plain, cast = ((loss.detach(), hidden.grad) for hidden, loss in found)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_float16_gradients_of_small_weights_and_a_large_vocabulary_do_not_underflow():
    """With a nearly uniform distribution over 151,674 tokens, each is about 1e-7."""
    torch.manual_seed(0)
    hidden, negative = (0.01 * torch.randn(2, 16) for _ in range(2))
    weight = 1 + 0.1 * torch.randn(151_674, 16)
    labels = torch.tensor([3, 151_000])

    def gradients(dtype, implementation):
        leaves = [x.to(dtype).to(DEVICE).requires_grad_() for x in (hidden, negative)]
        linear_vitask(
            leaves[0], weight.to(dtype).to(DEVICE), labels.to(DEVICE), negative_hidden=leaves[1],
            crt_weight=1e-2, implementation=implementation,
        ).total.backward()  # fmt: skip
        return leaves[1].grad.double()

    rounded = torch.float16
    ours = gradients(rounded, "triton")
    truth = gradients(rounded, "reference")
    assert (ours - truth).norm() <= 5e-3 * truth.norm()


@pytest.mark.skipif(CUDA, reason="without Triton only the CPU path works")
def test_cpu_path_works_without_triton():
    program = """
import sys
sys.modules["triton"] = None
import torch
from kernels import linear_cross_entropy
x = torch.ones(2, 3, requires_grad=True)
linear_cross_entropy(x, torch.ones(4, 3), torch.tensor([0, 1])).backward()
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


@pytest.mark.usefixtures("unchecked")
def test_head_without_tokens_and_unsupported_dtypes_are_named():
    x, y = torch.zeros(2, 3), torch.full((2,), -100)
    with pytest.raises(ValueError, match="weight has no rows"):
        linear_cross_entropy(x, torch.zeros(0, 3), y)
    with pytest.raises(ValueError, match="float8"):
        linear_cross_entropy(x.to(torch.float8_e4m3fn), x.to(torch.float8_e4m3fn), y)


def test_triton_refuses_float64():
    x = torch.zeros(2, 3, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ValueError, match="float32; use 'reference' for float64"):
        linear_cross_entropy(
            x, x, torch.zeros(2, dtype=torch.int64, device=DEVICE), implementation="triton"
        )


def test_triton_kernels_give_nan_for_wrong_labels_and_rows_and_read_nothing_outside():
    """Calls the operation without the checks, which CUDA tensors skip: they would stall."""
    case = draw(4, 30, 5, ignored=0.0, negatives=0.5, rda_weight=1.0, crt_weight=1.0,
                reduction="none").to(DEVICE)  # fmt: skip

    def outcome(**changed):
        return joint.joint_loss_op(*flat_inputs(case, "triton", **changed))

    _, expected, gradient, _ = outcome()
    for wrong in (30, -1, 2**40, -(2**40)):
        labels = case.labels.clone()
        labels[1] = wrong
        _, losses, of_rows, _ = outcome(labels=labels)
        assert losses[:3, 1].isnan().all()
        assert (of_rows[1] == 0).all()
        others = [0, 2, 3]
        assert torch.equal(losses[:, others], expected[:, others])
        assert torch.equal(of_rows[others], gradient[others])
    for rows in ([0, 9], [0, -5], [2, 2]):
        _, losses, of_rows, _ = outcome(negative_rows=torch.tensor(rows, device=DEVICE))
        assert losses[3].isnan().all()
        assert torch.equal(losses[:3], expected[:3])
        assert of_rows.isfinite().all()


# Memory


@pytest.mark.skipif(CUDA, reason="the CPU path")
@given(
    st.integers(1, 4096), st.integers(2, 200_000), st.integers(1, 4096), st.integers(1, 3),
    st.sampled_from([4, 8]),
)  # fmt: skip
def test_chunks_have_32_rows_or_hold_at_most_64_mib_of_logits(
    rows, vocab, hidden, branches, itemsize
):
    row_bytes, head_bytes = branches * vocab * itemsize, vocab * hidden * itemsize
    size = chunk_rows(rows, row_bytes, head_bytes)
    most = 64 * 2**20 if head_bytes > 64 * 2**20 else max(8 * 2**20, head_bytes)
    assert size >= 32
    assert size == 32 or size * row_bytes <= most
    assert -(-rows // size) <= -(-rows // max(32, most // row_bytes))  # each chunk reads the head


class Largest(TorchDispatchMode):
    """Records the bytes of the largest tensor that an operation creates."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and function not in (torch.ops.aten.detach.default,):
            inputs = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
            if result.untyped_storage().data_ptr() not in inputs:
                self.bytes = max(self.bytes, result.untyped_storage().nbytes())
        return result


def largest_bytes(case: Case) -> int:
    """Bytes of the largest tensor that a step with a frozen head creates."""
    hidden = case.hidden.requires_grad_()
    with Largest() as seen:
        linear_vitask(
            hidden, case.weight, case.labels, exemplar_hidden=case.exemplar,
            negative_hidden=case.negative,
        ).total.backward()  # fmt: skip
    return seen.bytes


@pytest.mark.skipif(CUDA, reason="the CPU path")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_head_is_never_converted_as_a_whole(dtype):
    vocab, width = 4000, 2048
    case = draw(32, vocab, width, dtype=dtype, ignored=0.0)
    assert largest_bytes(case) < vocab * width * 4 / 4


@pytest.mark.skipif(CUDA, reason="the CPU path")
def test_cpu_path_never_holds_all_logits(monkeypatch):
    rows, vocab = 400, 5000
    monkeypatch.setattr(cpu, "LOGIT_BYTES", 3 * 40 * vocab * 4)  # 40 rows of three branches
    case = draw(rows, vocab, 8, ignored=0.0)
    assert 0 < largest_bytes(case) <= 3 * 40 * vocab * 4
