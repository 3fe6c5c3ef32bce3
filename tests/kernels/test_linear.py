"""The fused losses: as accurate as PyTorch, with properties that a wrong objective would break."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
from tests.kernels.cases import assert_as_good_as_torch, cases, draw, run, shapes, truth

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"  # on the CPU, conftest makes Triton interpret
FUSED = ["triton"] if CUDA else ["cpu", "triton"]
fused = pytest.mark.parametrize("implementation", FUSED)
every = pytest.mark.parametrize("implementation", [*FUSED, "reference"])
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SEEDS = st.integers(0, 2**31 - 1)
# The interpreter takes about 20 ms per row, so examples and rows are few.
ROWS = 4096 if CUDA else 48
FEW = settings(max_examples=10)


# Accuracy


@every
@given(st.data())
@settings(max_examples=40)
def test_errors_are_at_most_twice_torchs(implementation, data):
    rows = ROWS if implementation == "triton" else 4096
    case = data.draw(cases(FLOATS, elements=2**18, max_rows=rows))
    assert_as_good_as_torch(case.to(DEVICE), implementation)


@pytest.mark.skipif(CUDA, reason="float64 runs on the CPU only")
@given(cases((torch.float64,), elements=2**22))
@settings(max_examples=40)
def test_cpu_path_is_exact_in_float64(case):
    exact = truth(case).values
    for name, value in run(case, "cpu").values.items():
        assert value.dtype == torch.float64
        largest = exact[name].detach().abs().max() if value.numel() else 0
        torch.testing.assert_close(
            value, exact[name], rtol=1e-11, atol=1e-13 * max(1, float(largest)), msg=name
        )


# (rows, vocab, hidden): exactly one block, one column more, whole vocabularies, tiny ones
SHAPES = [(1, 2048, 8), (2, 2049, 8), (1, 151_674, 4), (1, 92_553, 4), (3, 2, 5), (300, 5, 3)]


@every
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_errors_are_at_most_twice_torchs_at_the_edges(implementation, shape, dtype):
    case = draw(*shape, dtype=dtype, ignored=0.2 if shape[0] > 3 else 0.0)
    assert_as_good_as_torch(case.to(DEVICE), implementation)


@every
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_errors_are_at_most_twice_torchs_where_some_rows_lack_a_branch(implementation, reduction):
    case = draw(8, 60, 5, exemplars=0.7, negatives=0.4, ignored=0.2, reduction=reduction)
    assert_as_good_as_torch(case.to(DEVICE), implementation)


@every
@pytest.mark.parametrize("rows", [512, pytest.param(4096, marks=pytest.mark.long)])
def test_errors_are_at_most_twice_torchs_with_many_rows(implementation, rows):
    vocab = 64 if implementation == "triton" and not CUDA else 1001
    case = draw(rows, vocab, 16, exemplars=0.9, negatives=0.5)
    assert_as_good_as_torch(case.to(DEVICE), implementation)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gap", [30.0, 300.0, 3000.0, 20_000.0])
def test_gradients_of_branches_far_apart_do_not_overflow(implementation, dtype, gap):
    hidden = torch.tensor([[30.0, 30, 0, 0], [1, 2, 3, 4]], dtype=dtype, device=DEVICE)
    teacher = torch.tensor([[gap, -gap, 0, 0], [1, 2, 3, 5]], dtype=dtype, device=DEVICE)
    head, labels = torch.eye(4, dtype=dtype, device=DEVICE), torch.tensor([0, 1], device=DEVICE)
    student = hidden.requires_grad_()
    linear_rda(student, teacher, head, labels, implementation=implementation).backward()
    exact = hidden.detach().double().requires_grad_()
    rda_loss(exact, teacher.double(), labels).backward()
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=2e-2, atol=1e-3)


@every
@pytest.mark.parametrize("above", [1.0, 1e-3, 1e-5])
def test_gradient_of_a_float16_head_keeps_its_bits_under_small_row_weights(implementation, above):
    case = draw(40, 50, 16, dtype=torch.float16, ignored=0.0).to(DEVICE)
    weight = case.weight.requires_grad_()
    linear_cross_entropy(
        case.hidden, weight, case.labels, reduction="none", implementation=implementation
    ).backward(torch.full((40,), above, device=DEVICE))
    exact = case.weight.detach().double().requires_grad_()
    loss = response_loss(case.hidden.double() @ exact.T, case.labels, reduction="none")
    loss.backward(torch.full((40,), above, device=DEVICE, dtype=torch.float64))
    # 2^-25: half of the smallest step of float16, to which every result is rounded
    error = (weight.grad.double() - exact.grad).abs()
    assert (error <= 2e-3 * exact.grad.abs().max() + 2.0**-25).all()


@every
def test_no_rows_give_zero_loss(implementation):
    outcome = run(draw(0, 7, 3).to(DEVICE), implementation).values
    assert all(outcome[name] == 0 for name in ("total", "response", "exemplar", "rda", "crt"))
    assert outcome["gradient of weight"].abs().sum() == 0
    per_row = run(draw(0, 7, 3, reduction="none").to(DEVICE), implementation).values
    assert per_row["total"].shape == (0,)


@every
def test_joint_operation_equals_the_single_ones(implementation):
    case = draw(7, 50, 6).to(DEVICE)
    h, w, y = case.hidden, case.weight, case.labels
    chosen = {"implementation": implementation}
    joint = linear_vitask(
        h, w, y, exemplar_hidden=case.exemplar, negative_hidden=case.negative,
        rda_weight=0.5, crt_weight=0.25, **chosen,
    )  # fmt: skip
    same = torch.testing.assert_close
    same(joint.response, linear_cross_entropy(h, w, y, **chosen))
    same(joint.exemplar, linear_cross_entropy(case.exemplar, w, y, **chosen))
    same(joint.rda, linear_rda(h, case.exemplar, w, y, **chosen))
    same(joint.crt, linear_crt(h, case.negative, w, y, **chosen))
    total = joint.response + joint.exemplar + 0.5 * joint.rda + 0.25 * joint.crt
    same(joint.total, total)


@every
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_single_operations_and_gradients_equal_the_reference(implementation, reduction):
    case = draw(7, 50, 6).to(DEVICE)
    chosen = {"reduction": reduction, "implementation": implementation}

    def both(ours, theirs, *inputs):
        mine = [x.detach().clone().requires_grad_() for x in inputs]
        exact = [x.detach().double().requires_grad_() for x in inputs]
        value, expected = ours(*mine), theirs(*exact)
        value.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(value, expected.float(), rtol=1e-5, atol=1e-6)
        for a, b in zip(mine, exact, strict=True):
            torch.testing.assert_close(a.grad, b.grad.float(), rtol=1e-4, atol=1e-6)

    y, h, b, n, w = case.labels, case.hidden, case.exemplar, case.negative, case.weight
    per = {"reduction": reduction}
    both(
        lambda h, w: linear_cross_entropy(h, w, y, **chosen),
        lambda h, w: response_loss(h @ w.T, y, **per),
        h, w,
    )  # fmt: skip
    both(
        lambda h, b, w: linear_rda(h, b, w, y, detach_exemplar=False, **chosen),
        lambda h, b, w: rda_loss(h @ w.T, b @ w.T, y, detach_exemplar=False, **per),
        h, b, w,
    )  # fmt: skip
    both(
        lambda h, n, w: linear_crt(h, n, w, y, **chosen),
        lambda h, n, w: crt_loss(h @ w.T, n @ w.T, y, **per),
        h, n, w,
    )  # fmt: skip


@every
@pytest.mark.parametrize("splits", [2, 4, 16])
def test_shares_of_the_vocabulary_merge(implementation, splits, monkeypatch):
    if implementation != "triton":
        pytest.skip("only the Triton path shares a row's vocabulary among programs")
    from kernels import cuda

    monkeypatch.setattr(cuda, "_splits", lambda *_: splits)
    for vocab in (3, 4096, 6000, 9001):  # some programs get no columns
        for sharpness in (1.0, 30.0):
            case = draw(2, vocab, 4, sharpness=sharpness, ignored=0.0, detach_exemplar=False)
            assert_as_good_as_torch(case.to(DEVICE), implementation)


# Properties that a wrong objective would break


@every
@given(shapes(2**14, max_rows=8, min_rows=1), SEEDS, st.sampled_from([1.0, 30.0]))
@FEW
def test_rda_is_zero_with_zero_gradient_at_equality(implementation, shape, seed, sharpness):
    case = draw(*shape, 5, seed=seed, sharpness=sharpness, ignored=0.0).to(DEVICE)
    student = case.hidden.requires_grad_()
    loss = linear_rda(
        student, case.hidden.detach(), case.weight, case.labels, implementation=implementation
    )
    loss.backward()
    # Equal rows of one product may differ by its rounding.
    rounding = 2.0**-22 * (student @ case.weight.T).detach().abs().max().clamp(min=1)
    assert loss.abs() <= rounding
    assert student.grad.abs().max() <= 2 * rounding * case.weight.abs().max()


@every
@given(
    shape=shapes(2**14, max_rows=8, min_rows=1),
    closeness=st.sampled_from([1.0, 1e-2, 1e-3]),
    seed=SEEDS,
    sharpness=st.sampled_from([1.0, 30.0]),
)
@settings(max_examples=30)
def test_rda_is_not_negative(implementation, shape, closeness, seed, sharpness):
    case = draw(*shape, 8, seed=seed, closeness=closeness, sharpness=sharpness).to(DEVICE)
    values = linear_rda(
        case.hidden, case.exemplar, case.weight, case.labels,
        reduction="none", implementation=implementation,
    )  # fmt: skip
    largest = (case.hidden @ case.weight.T).abs().max()
    assert (values >= -(2.0**-22) * largest.clamp(min=1)).all()  # the rounding of the logits


@every
@given(
    shape=shapes(2**12, max_rows=8, min_rows=1),
    seed=SEEDS,
    sharpness=st.sampled_from([1.0, 30.0]),
    reduction=st.sampled_from(["mean", "none"]),
)
@FEW
def test_losses_and_gradients_are_the_same_for_shifted_logits(
    implementation, shape, seed, sharpness, reduction
):
    # A column of ones in the head adds a column of the hidden rows to all logits.
    case = draw(*shape, 6, seed=seed, sharpness=sharpness, reduction=reduction).to(DEVICE)

    def widened(rows: torch.Tensor, shift: float) -> torch.Tensor:
        return torch.cat([rows, torch.full_like(rows[:, :1], shift)], dim=1)

    def shifted(base: float, exemplar: float, negative: float) -> dict[str, torch.Tensor]:
        rows = {
            "hidden": widened(case.hidden, base),
            "exemplar": widened(case.exemplar, exemplar),
            "negative": widened(case.negative, negative),
            "weight": widened(case.weight, 1.0),
        }
        values = run(replace(case, **rows), implementation).values
        kept = {k: v[:, :-1] if k.startswith("gradient") else v for k, v in values.items()}
        return {k: v for k, v in kept.items() if v.numel()}

    still = shifted(0, 0, 0)
    for name, value in shifted(3, -2, 5).items():
        scale = max(1.0, float(still[name].detach().abs().max())) * sharpness
        torch.testing.assert_close(value, still[name], rtol=1e-5, atol=4e-6 * scale, msg=name)


@every
@given(shapes(2**14, max_rows=8), SEEDS)
@FEW
def test_permuting_the_vocabulary_changes_nothing(implementation, shape, seed):
    case = draw(*shape, 6, seed=seed).to(DEVICE)
    order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    keep = case.labels != IGNORE_INDEX
    labels = order.argsort()[case.labels.where(keep, 0)].where(keep, IGNORE_INDEX)
    permuted = replace(case, weight=case.weight[order], labels=labels)
    ours, theirs = run(case, implementation).values, run(permuted, implementation).values
    theirs["gradient of weight"] = theirs["gradient of weight"][order.argsort()]
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=2e-6, msg=name)


@every
@given(shapes(2**14, max_rows=8, min_rows=2), SEEDS, st.data())
@FEW
def test_sum_over_rows_is_the_sum_over_their_parts(implementation, shape, seed, data):
    case = draw(*shape, 6, seed=seed, reduction="none").to(DEVICE)
    cut = data.draw(st.integers(1, shape[0] - 1))
    whole = run(case, implementation).values
    of_rows = ("hidden", "exemplar", "negative", "labels", "above")
    halves = [
        run(replace(case, **{k: getattr(case, k)[part] for k in of_rows}), implementation)
        for part in (slice(None, cut), slice(cut, None))
    ]
    for name, value in whole.items():
        first, second = (half.values[name] for half in halves)
        joined = first + second if name == "gradient of weight" else torch.cat([first, second])
        torch.testing.assert_close(value, joined, rtol=1e-5, atol=4e-6, msg=name)


@every
@given(shapes(2**14, max_rows=8, min_rows=1), SEEDS)
@FEW
def test_mean_is_over_the_counted_rows_of_each_loss(implementation, shape, seed):
    case = draw(*shape, 6, seed=seed, exemplars=0.6, negatives=0.5).to(DEVICE)
    mean = run(case, implementation).values
    each = replace(case, reduction="none", above=torch.ones(shape[0], device=DEVICE))
    per_row = run(each, implementation).values
    counted = case.labels != IGNORE_INDEX
    for name, rows in (
        ("response", None),
        ("exemplar", case.exemplar_rows),
        ("rda", case.exemplar_rows),
        ("crt", case.negative_rows),
    ):
        of_loss = counted if rows is None else counted[rows]
        expected = per_row[name].sum() / of_loss.sum().clamp(min=1)
        torch.testing.assert_close(mean[name], expected, rtol=1e-5, atol=2e-6, msg=name)


@every
@given(shapes(2**12, max_rows=1, min_rows=1), SEEDS)
@FEW
def test_hidden_gradient_of_rda_has_fishers_form(implementation, shape, seed):
    # Near equality KL is ½ Δᵀ F Δ with F = Cov_p(W), so the gradient of a small step Δ is F Δ.
    case = draw(*shape, 5, seed=seed, ignored=0.0, closeness=0.0)
    step = 1e-3 * torch.ones(1, 5)
    student = (case.hidden + step).to(DEVICE).requires_grad_()
    linear_rda(
        student, case.hidden.to(DEVICE), case.weight.to(DEVICE), case.labels.to(DEVICE),
        implementation=implementation,
    ).backward()  # fmt: skip
    w, h = case.weight.double(), case.hidden.double()
    p = (h @ w.T).softmax(-1)[0]
    centred = w - p @ w
    fisher = centred.T @ (p[:, None] * centred)
    expected = (fisher @ step[0].double()).float()
    torch.testing.assert_close(student.grad[0].cpu(), expected, rtol=5e-3, atol=1e-6)


# Rows


@every
@given(shapes(2**14, max_rows=8, min_rows=1), SEEDS, st.sampled_from(["mean", "none"]))
@FEW
def test_ignored_rows_give_exactly_zero_even_if_they_hold_nan(
    implementation, shape, seed, reduction
):
    clean = draw(*shape, 5, seed=seed, reduction=reduction, detach_exemplar=False)
    ignored = clean.labels == IGNORE_INDEX
    expected = run(clean.to(DEVICE), implementation).values
    for branch in (clean.hidden, clean.exemplar, clean.negative):
        branch[ignored] = torch.nan
    got = run(clean.to(DEVICE), implementation).values
    for name, value in got.items():
        assert torch.equal(value, expected[name]), name
    for branch in ("hidden", "exemplar", "negative"):
        assert (got[f"gradient of {branch}"][ignored.to(DEVICE)] == 0).all()


@every
def test_rows_without_negative_or_exemplar_do_not_count(implementation):
    case = draw(6, 40, 5, ignored=0.0, exemplars=0.5, negatives=0.34)
    values = run(case.to(DEVICE), implementation).values
    e, n = case.exemplar_rows, case.negative_rows
    chosen = {"implementation": "reference"}
    w, y = case.weight, case.labels
    kl = linear_rda(case.hidden[e], case.exemplar, w, y[e], **chosen)
    contrast = linear_crt(case.hidden[n], case.negative, w, y[n], **chosen)
    torch.testing.assert_close(values["rda"].cpu(), kl)
    torch.testing.assert_close(values["crt"].cpu(), contrast)
    none = linear_vitask(
        case.hidden.to(DEVICE), w.to(DEVICE), y.to(DEVICE), implementation=implementation
    )
    assert none.exemplar == none.rda == none.crt == 0
    assert torch.equal(none.total, none.response)


@pytest.mark.skipif(CUDA, reason="counts operations of the CPU path")
@pytest.mark.parametrize(("exemplars", "negatives"), [(1.0, 1.0), (0.5, 0.25), (0.0, 0.0)])
def test_only_counted_rows_of_present_branches_are_projected(exemplars, negatives):
    from torch.utils.flop_counter import FlopCounterMode

    rows, vocab, width = 64, 500, 8
    case = draw(rows, vocab, width, exemplars=exemplars, negatives=negatives)
    counted = case.labels != IGNORE_INDEX
    branches = (case.exemplar_rows, case.negative_rows)
    used = [counted if rows is None else counted[rows] for rows in branches]
    with FlopCounterMode(display=False) as flops:
        run(case, "cpu")
    projected = int(counted.sum()) + sum(int(mask.sum()) for mask in used)
    # Logits and gradients of the rows; the counter misses the in-place sum of the head's gradient.
    assert flops.get_total_flops() == 2 * 2 * projected * vocab * width


@every
def test_only_total_carries_a_gradient_and_only_where_required(implementation):
    case = draw(4, 20, 5).to(DEVICE)
    hidden = case.hidden.requires_grad_()
    losses = linear_vitask(
        hidden, case.weight, case.labels, exemplar_hidden=case.exemplar,
        negative_hidden=case.negative, implementation=implementation,
    )  # fmt: skip
    assert losses.total.requires_grad
    assert not any(part.requires_grad for part in losses[1:])
    losses.total.backward()
    assert hidden.grad is not None
    assert case.weight.grad is None
    with torch.no_grad():
        unrecorded = linear_vitask(hidden, case.weight, case.labels, implementation=implementation)
    assert not unrecorded.total.requires_grad


@every
def test_teacher_gets_no_gradient_from_rda(implementation):
    case = draw(4, 20, 5, ignored=0.0).to(DEVICE)
    student, teacher = case.hidden, case.exemplar.requires_grad_()
    weight = case.weight.requires_grad_()
    linear_rda(student, teacher, weight, case.labels, implementation=implementation).backward()
    assert teacher.grad is None or (teacher.grad == 0).all()
    exact = case.weight.detach().double().requires_grad_()
    constant = teacher.detach().double() @ exact.detach().T
    rda_loss(student.double() @ exact.T, constant, case.labels).backward()
    torch.testing.assert_close(weight.grad, exact.grad.float(), rtol=1e-4, atol=1e-6)


@fused
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_run_gives_the_same_bits(implementation, reduction, monkeypatch):
    from kernels import cpu

    monkeypatch.setattr(cpu, "LOGIT_BYTES", 0)  # the smallest chunks, so that there are several
    threads = torch.get_num_threads()
    case = draw(100, 300, 16, negatives=0.5, reduction=reduction).to(DEVICE)
    try:
        torch.set_num_threads(2)
        first, second = run(case, implementation).values, run(case, implementation).values
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(first[name], second[name]) for name in first)


@every
def test_strides_of_the_inputs_do_not_matter(implementation):
    case = draw(6, 40, 8).to(DEVICE)

    def strided(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x, torch.full_like(x, 9)], dim=-1)[..., 0]

    odd = replace(
        case,
        hidden=strided(case.hidden),
        exemplar=case.exemplar.T.contiguous().T,
        negative=strided(case.negative),
        weight=case.weight.T.contiguous().T,
        labels=strided(case.labels),
    )
    assert not odd.hidden.is_contiguous()
    expected = run(case, implementation).values
    for name, value in run(odd, implementation).values.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)
