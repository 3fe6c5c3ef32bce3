"""The reference losses: definitions, limits, and properties that a wrong objective would break."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from kernels.reference import IGNORE_INDEX, crt_loss, rda_loss, response_loss

SHAPES = st.tuples(st.integers(1, 6), st.integers(2, 9), st.integers(0, 2**31 - 1))


def draw(shape, count=2, scale=2.0):
    tokens, vocab, seed = shape
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(count, tokens, vocab, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocab, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < 0.3] = IGNORE_INDEX
    return *logits, labels


PAIRED = pytest.mark.parametrize("loss", [rda_loss, crt_loss], ids=lambda f: f.__name__)


@given(SHAPES)
def test_response_loss_is_torchs_cross_entropy(shape):
    logits, _, labels = draw(shape)
    if (labels == IGNORE_INDEX).all():
        assert response_loss(logits, labels) == 0
    else:
        torch.testing.assert_close(
            response_loss(logits, labels), functional.cross_entropy(logits, labels)
        )


@given(SHAPES)
def test_rda_is_kl_of_student_from_teacher(shape):
    student, teacher, labels = draw(shape)
    keep = labels != IGNORE_INDEX
    # kl_div(input, target) is KL(target || input), so the student is the target.
    expected = functional.kl_div(
        teacher.log_softmax(-1), student.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)[keep]
    expected = expected.mean() if keep.any() else torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(rda_loss(student, teacher, labels), expected)


@given(SHAPES)
def test_crt_is_cross_entropy_of_the_logit_difference(shape):
    positive, negative, labels = draw(shape)
    torch.testing.assert_close(
        crt_loss(positive, negative, labels), response_loss(positive - negative, labels)
    )


@given(SHAPES)
def test_crt_on_a_bias_free_head_is_cross_entropy_of_the_hidden_difference(shape):
    positive, negative, labels = draw(shape)
    vocab = positive.shape[1]
    head = torch.randn(
        vocab + 3, vocab, generator=torch.Generator().manual_seed(shape[2]), dtype=torch.float64
    )
    through_logits = crt_loss(positive @ head.T, negative @ head.T, labels)
    through_hidden = response_loss((positive - negative) @ head.T, labels)
    torch.testing.assert_close(through_logits, through_hidden)


@given(SHAPES)
def test_rda_is_never_negative_and_zero_at_equality_up_to_a_shift(shape):
    student, teacher, labels = draw(shape)
    assert rda_loss(student, teacher, labels) >= -1e-12
    assert rda_loss(student, student + 3.0, labels).abs() < 1e-12


@given(SHAPES)
def test_crt_of_an_image_that_changes_nothing_is_log_vocab(shape):
    logits, _, labels = draw(shape)
    expected = math.log(shape[1]) if (labels != IGNORE_INDEX).any() else 0.0
    assert crt_loss(logits, logits, labels).item() == pytest.approx(expected)


@given(SHAPES)
def test_losses_add_up_over_row_splits(shape):
    a, b, labels = draw((shape[0] + 2, *shape[1:]))
    for loss in (
        lambda s: response_loss(a[s], labels[s]),
        lambda s: rda_loss(a[s], b[s], labels[s]),
    ):
        parts = [slice(0, 2), slice(2, None)]
        counts = [(labels[part] != IGNORE_INDEX).sum() for part in parts]
        summed = sum(loss(part) * n for part, n in zip(parts, counts, strict=True))
        torch.testing.assert_close(loss(slice(None)) * sum(counts), summed)


@given(SHAPES)
@settings(max_examples=10)
def test_gradients_pass_gradcheck(shape):
    a, b, labels = draw(shape)
    inputs = (a.requires_grad_(), b.requires_grad_())
    check = torch.autograd.gradcheck
    assert check(lambda x: response_loss(x, labels), inputs[:1])
    assert check(lambda x, y: rda_loss(x, y, labels, detach_exemplar=False), inputs)
    assert check(lambda x, y: crt_loss(x, y, labels), inputs)


def test_rda_sends_a_gradient_into_the_teacher_only_on_request():
    a, b, labels = draw((3, 5, 0))
    labels[:] = 1
    a.requires_grad_()
    b.requires_grad_()
    rda_loss(a, b, labels).backward()
    assert a.grad.abs().sum() > 0
    assert b.grad is None
    rda_loss(a, b, labels, detach_exemplar=False).backward()
    assert b.grad.abs().sum() > 0


@PAIRED
def test_ignored_rows_have_no_gradient_even_if_they_hold_nan(loss):
    a, b, labels = draw((4, 5, 1))
    labels[:] = torch.tensor([0, IGNORE_INDEX, 2, IGNORE_INDEX])
    a[1] = float("nan")
    b[3] = float("inf")
    a.requires_grad_()
    value = loss(a, b, labels)
    value.backward()
    assert value.isfinite()
    keep = labels != IGNORE_INDEX
    torch.testing.assert_close(value, loss(a[keep], b[keep], labels[keep]))
    assert (a.grad[~keep] == 0).all()


@pytest.mark.parametrize("tokens", [0, 3], ids=["no rows", "all ignored"])
def test_no_counted_token_gives_zero(tokens):
    logits = torch.randn(tokens, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.full((tokens,), IGNORE_INDEX)
    values = (
        response_loss(logits, labels),
        rda_loss(logits, logits * 2, labels),
        crt_loss(logits, logits * 2, labels),
    )
    assert [float(v) for v in values] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_low_precision_logits_are_computed_in_float32(dtype):
    a, b, labels = draw((4, 7, 2))
    for loss in (rda_loss, crt_loss):
        value = loss(a.to(dtype), b.to(dtype), labels)
        assert value.dtype == torch.float32
        exact = loss(a.to(dtype).double(), b.to(dtype).double(), labels)
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(3, 5), torch.tensor([0, 5, 1]), "label 5 lies outside the vocabulary of 5"),
        (torch.zeros(3, 5), torch.tensor([0, -1, 1]), "label -1 lies outside"),
    ],
)
def test_labels_outside_the_vocabulary_are_named(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        response_loss(logits, labels)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("wrong", [5, -1, 2**40])
def test_labels_outside_the_vocabulary_give_nan_where_unchecked(wrong):
    logits, other, _ = draw((3, 5, 0))
    labels = torch.tensor([0, wrong, IGNORE_INDEX])
    logits.requires_grad_()

    def losses(logits):
        return (
            response_loss(logits, labels, reduction="none"),
            rda_loss(logits, other, labels, reduction="none"),
            crt_loss(logits, other, labels, reduction="none"),
        )

    unchecked = torch.compile(losses, backend="aot_eager", fullgraph=True)(logits)
    for loss in unchecked:
        assert loss.isnan().tolist() == [False, True, False]
    sum(loss.sum() for loss in unchecked).backward()
    assert logits.grad[0].isfinite().all()
    assert logits.grad[0].any()
    assert not logits.grad[1:].any()


@PAIRED
def test_another_vocabulary_raises(loss, unchecked):
    with pytest.raises(ValueError, match=r"_logits has shape \(3, 6\)"):
        loss(torch.zeros(3, 5), torch.zeros(3, 6), torch.tensor([0, 1, 2]))
