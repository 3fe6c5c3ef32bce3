"""Rows that branch give the result of every sequence alone."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from tests.vitask.conftest import write_tiny_checkpoint
from vitask.branches import BatchInputs, three_forwards
from vitask.exemplar import ExemplarConnector
from vitask.objective import Weights, joint_loss
from vitask.recipes import POCKET
from vitask.shared import shared_forward
from vitask.tree import ROOT, SLACK, Layout, Segment, buckets, length
from vitask.vlm import VLM

TEXTS = ("qwen2", "llama", "pocket")


class ExactNorm(nn.Module):
    """RMSNorm in the dtype of its input: that of transformers computes in float32."""

    def __init__(self, norm: Qwen2RMSNorm | LlamaRMSNorm) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """load(text, dtype) -> VLM and connector, with random weights only: zeros hide faults."""
    place = tmp_path_factory.mktemp("trees")

    @cache
    def checkpoint(text: str) -> str:
        return "pocket" if text == "pocket" else str(write_tiny_checkpoint(place / text, text))

    @cache
    def build(text: str, dtype: torch.dtype) -> tuple[VLM, ExemplarConnector]:
        torch.manual_seed(1)
        vlm = VLM.load(checkpoint(text), dtype=dtype)
        vlm.add_lora(rank=4, alpha=8, dropout=0.0)
        with torch.no_grad():
            for name, parameter in vlm.adapter.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0, 0.1)
        if dtype == torch.float64:
            vlm.adapter.to(dtype)
            language_model = vlm.model.model.language_model
            for name, module in list(language_model.named_modules()):
                if isinstance(module, Qwen2RMSNorm | LlamaRMSNorm):
                    parent, _, child = name.rpartition(".")
                    setattr(language_model.get_submodule(parent), child, ExactNorm(module))
        return vlm, ExemplarConnector(6, vlm.hidden_size).to(dtype)

    return build


@st.composite
def batches(draw):
    """Seeds, instructions, responses and negatives, of all lengths; hosts of none to several."""
    kinds = draw(st.lists(st.integers(1, 30), min_size=1, max_size=3))  # length of instructions
    groups = [draw(st.integers(1, 5)) for _ in kinds]
    instruction = [k for k, count in enumerate(groups) for _ in range(count)]
    responses = [draw(st.integers(1, 6)) for _ in instruction]
    negative = []
    for sample, kind in enumerate(instruction):
        others = [i for i, k in enumerate(instruction) if k == kind and i != sample]
        negative.append(draw(st.sampled_from([-1, *others])) if others else -1)
    tokens = draw(st.sampled_from([1, 3]))
    return draw(st.integers(0, 2**31 - 1)), kinds, instruction, responses, negative, tokens


def inputs_of(vlm: VLM, batch, dtype: torch.dtype, *, image_tokens: int = 4) -> BatchInputs:
    seed, kinds, instruction, responses, negative, tokens = batch
    generator = torch.Generator().manual_seed(seed)
    vocab = len(vlm.head)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(vocab, (count,), generator=generator).tolist())

    prompts = [replace(vlm.prompt("?"), after=ids(count)) for count in kinds]
    rows = len(instruction)
    width = (rows, 6) if tokens == 1 else (rows, tokens, 6)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return BatchInputs(
        prompts=[prompts[k] for k in instruction],
        responses=[ids(count) for count in responses],
        image=normal(rows, image_tokens, vlm.hidden_size),
        exemplar=normal(*width),
        negative=torch.tensor(negative),
    )


def outcome(forward, vlm, connector, inputs, variant, detach):
    """Hidden rows, losses and the gradient of every trained parameter."""
    trained = [p for p in [*vlm.adapter.parameters(), *connector.parameters()] if p.requires_grad]
    rows = forward(vlm, connector, inputs, variant)
    losses = joint_loss(vlm, rows, Weights(0.7, 1.3), detach_exemplar=detach)
    gradients = torch.autograd.grad(losses.total, trained, allow_unused=True)
    return rows, torch.stack([*losses]).detach(), [
        torch.zeros_like(p) if g is None else g for p, g in zip(trained, gradients, strict=True)
    ]  # fmt: skip


def assert_equal(vlm, connector, inputs, variant, detach, allowed):
    expected = outcome(three_forwards, vlm, connector, inputs, variant, detach)
    found = outcome(shared_forward, vlm, connector, inputs, variant, detach)

    def distance(a: Tensor, b: Tensor) -> float:
        return float((a - b).double().norm() / b.double().norm().clamp(min=1e-300))

    for name, ours, theirs in zip(expected[0]._fields, found[0], expected[0], strict=True):
        assert (ours is None) == (theirs is None), name
        if ours is not None and ours.is_floating_point():
            assert distance(ours.detach(), theirs.detach()) <= allowed, name
        elif ours is not None:
            assert torch.equal(ours, theirs), name
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert distance(ours, theirs) <= allowed
    together = [torch.cat([g.flatten() for g in side[2]]) for side in (found, expected)]
    assert distance(*together) <= allowed


@pytest.mark.parametrize("text", TEXTS)
@settings(max_examples=25)
@given(batch=batches(), variant=st.sampled_from(["cls", "all", "rep"]), detach=st.booleans())
def test_one_forward_equals_three_in_float64(load, text, batch, variant, detach):
    vlm, connector = load(text, torch.float64)
    inputs = inputs_of(vlm, batch, torch.float64)
    assert_equal(vlm, connector, inputs, variant, detach, allowed=1e-9)


@pytest.mark.parametrize("text", TEXTS)
@settings(max_examples=8)
@given(batch=batches(), variant=st.sampled_from(["cls", "all", "rep"]))
def test_one_forward_equals_three_in_float32(load, text, batch, variant):
    vlm, connector = load(text, torch.float32)
    inputs = inputs_of(vlm, batch, torch.float32)
    assert_equal(vlm, connector, inputs, variant, True, allowed=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention trains on CUDA only")
def test_flex_attention_trains_as_sdpa_does():
    batch = (0, [5, 9], [0, 0, 1, 1, 1], [2, 3, 1, 4, 2], [1, 0, 3, 2, 3], 1)
    found = []
    for attention in ("sdpa", "flex_attention"):
        torch.manual_seed(1)
        vlm = VLM.load("pocket", device="cuda", attention=attention)
        vlm.add_lora(rank=4, alpha=8, dropout=0.0)
        connector = ExemplarConnector(6, vlm.hidden_size).to("cuda")
        on_cpu = inputs_of(vlm, batch, torch.float32)
        inputs = on_cpu._replace(
            image=on_cpu.image.cuda(),
            exemplar=on_cpu.exemplar.cuda(),
            negative=on_cpu.negative.cuda(),
        )
        found.append(outcome(shared_forward, vlm, connector, inputs, "cls", True))
    (_, losses, gradients), (_, others, other_gradients) = found
    torch.testing.assert_close(losses, others, rtol=1e-4, atol=1e-5)
    ours, theirs = (torch.cat([g.flatten() for g in side]) for side in (gradients, other_gradients))
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


@pytest.mark.parametrize("missing", ["exemplar", "negative", "both", "negatives"])
def test_absent_branches_stay_absent(load, missing):
    vlm, connector = load("qwen2", torch.float64)
    batch = (0, [5, 9], [0, 0, 1, 1], [2, 3, 1, 4], [1, 0, 3, 2], 1)
    inputs = inputs_of(vlm, batch, torch.float64)
    if missing in ("exemplar", "both"):
        inputs = inputs._replace(exemplar=None)
    if missing in ("negative", "both"):
        inputs = inputs._replace(negative=None)
    if missing == "negatives":
        inputs = inputs._replace(negative=torch.full((4,), -1))
    theirs = three_forwards(vlm, connector, inputs, "cls")
    ours = shared_forward(vlm, connector, inputs, "cls")
    for name, a, b in zip(ours._fields, ours, theirs, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_branches_are_independent(load):
    vlm, connector = load("qwen2", torch.float64)
    batch = (3, [6], [0, 0, 0], [3, 2, 4], [1, 2, 1], 3)
    inputs = inputs_of(vlm, batch, torch.float64)
    with torch.no_grad():
        rows = shared_forward(vlm, connector, inputs, "all")
        other = shared_forward(vlm, connector, inputs._replace(exemplar=inputs.exemplar + 1), "all")
        changed = [*inputs.responses[:2], tuple(7 for _ in inputs.responses[2])]
        third = shared_forward(vlm, connector, inputs._replace(responses=changed), "all")
    assert torch.equal(rows.hidden, other.hidden)
    assert torch.equal(rows.negative_hidden, other.negative_hidden)
    assert not torch.equal(rows.exemplar_hidden, other.exemplar_hidden)
    first = len(inputs.responses[0]) + len(inputs.responses[1])
    assert torch.equal(rows.hidden[:first], third.hidden[:first])
    assert torch.equal(rows.negative_hidden[:first], third.negative_hidden[:first])


# Layout


ROWS = [
    [Segment(ROOT, (1, 2)), Segment(0, (3,)), Segment(1, (4, 5)), Segment(1, (6,))],
    [Segment(ROOT, (7,)), Segment(0, ()), Segment(1, (0, 0), "image")],
]


def test_layout_has_ids_positions_mask_slots_and_predicting_columns():
    layout = Layout.of(ROWS)
    assert layout.ids.tolist() == [[1, 2, 3, 4, 5, 6], [7, 0, 0, 0, 0, 0]]
    assert layout.positions.tolist() == [[0, 1, 2, 3, 4, 3], [0, 1, 2, 0, 0, 0]]
    assert layout.mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 0, 0, 1],
    ]
    assert layout.mask[1, 0, :3].int().tolist() == [
        [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0],
    ]  # fmt: skip
    assert layout.mask[1, 0].any(-1).all()  # attention gives NaN for a row without any True
    assert layout.slots["image"].tolist() == [[1, 1], [1, 2]]
    assert layout.predicting(0, 3, 2) == [2, 5]
    assert layout.predicting(1, 2, 1) == [0]  # past an empty segment to the token before


def test_embeddings_have_features_in_the_order_of_the_rows():
    layout = Layout.of(ROWS)
    features = {"image": torch.tensor([[[10.0], [11.0]]])}
    embeddings = layout.embeddings(lambda ids: ids[..., None].float(), features)
    assert embeddings[1, :, 0].tolist() == [7, 10, 11, 0, 0, 0]


@given(st.lists(st.integers(1, 500), min_size=1, max_size=30))
def test_buckets_have_every_row_once_and_bound_the_padding(lengths):
    found = buckets(lengths)
    assert sorted(row for bucket in found for row in bucket) == list(range(len(lengths)))
    for bucket in found:
        longest = max(lengths[row] for row in bucket)
        assert all(longest <= SLACK * lengths[row] for row in bucket)


def test_rows_are_as_long_as_their_tokens():
    assert [length(row) for row in ROWS] == [6, 3]


def test_shared_step_refuses_dropout_and_three_takes_it():
    with pytest.raises(ValueError, match=r"lora_dropout 0\.05 with step 'shared'.*step='three'"):
        replace(POCKET, lora_dropout=0.05)
    assert replace(POCKET, lora_dropout=0.05, step="three").step == "three"
