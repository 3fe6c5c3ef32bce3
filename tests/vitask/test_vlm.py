"""The thin layer over transformers gives the same numbers as transformers itself."""

import shutil

import numpy as np
import pytest
import torch

from vitask.branches import prompt_embeddings, response_hidden
from vitask.vlm import VLM

INSTRUCTION = "Analyze the given photo image. The possible diagnoses are: cat; dog."


@pytest.fixture(scope="module")
def vlm(tiny_checkpoint):
    return VLM.load(str(tiny_checkpoint))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 28, 28, 3), dtype=np.uint8)


def through_transformers(vlm, image, text):
    """Logits of processor and model called as transformers' documentation does."""
    inputs = vlm.processor(images=[image], text=[text], crop_to_patches=False, return_tensors="pt")
    with torch.no_grad():
        return vlm.model(**inputs).logits[0], inputs["input_ids"][0]


def test_hidden_rows_and_head_give_the_models_own_logits(vlm, images):
    answer = "cat."
    text = vlm._render(INSTRUCTION, answer)
    expected, ids = through_transformers(vlm, images[0], text)
    prompt, response = vlm.prompt(INSTRUCTION), vlm.response_ids(answer)
    with torch.no_grad():
        hidden, labels, _ = response_hidden(
            vlm, [prompt], vlm.image_features(images[:1]), [response]
        )
    length = len(prompt.before) + 4 + len(prompt.after)
    assert ids[length : length + len(response)].tolist() == labels.tolist()
    torch.testing.assert_close(
        vlm.logits(hidden), expected[length - 1 : length - 1 + len(response)]
    )


def test_prompt_is_cut_right_after_the_image(vlm):
    prompt = vlm.prompt(INSTRUCTION)
    tokenizer = vlm.processor.tokenizer
    assert tokenizer.decode(prompt.before).endswith("<img>")
    assert tokenizer.decode(prompt.after).startswith("</img>")
    assert INSTRUCTION in tokenizer.decode(prompt.after)


def test_response_ends_with_the_templates_end_of_turn(vlm):
    assert vlm.processor.tokenizer.decode(vlm.response_ids("cat.")) == "cat.<|im_end|>"


def test_padding_on_the_right_changes_nothing(vlm, images):
    short, long = vlm.prompt("Short."), vlm.prompt(INSTRUCTION)
    responses = [vlm.response_ids("a."), vlm.response_ids("a much longer answer.")]
    tokens = vlm.image_features(images[:2])
    with torch.no_grad():
        together, _, owner = response_hidden(vlm, [short, long], tokens, responses)
        alone, _, _ = response_hidden(vlm, [short], tokens[:1], responses[:1])
    torch.testing.assert_close(together[owner == 0], alone, rtol=1e-5, atol=1e-5)


def test_grey_images_are_rgb_with_equal_channels(vlm):
    grey = np.random.default_rng(1).integers(0, 256, (2, 28, 28), dtype=np.uint8)
    colour = np.repeat(grey[..., None], 3, axis=-1)
    assert torch.equal(vlm.image_features(grey), vlm.image_features(colour))


def test_images_of_another_dtype_are_refused(vlm):
    with pytest.raises(ValueError, match=r"float64.*expected uint8"):
        vlm.image_features(np.zeros((1, 28, 28)))


def test_lora_trains_the_linear_layers_of_the_language_model_only(tiny_checkpoint):
    vlm = VLM.load(str(tiny_checkpoint))
    vlm.add_lora(rank=2, alpha=4, dropout=0.0)
    trained = {n for n, p in vlm.adapter.named_parameters() if p.requires_grad}
    places = [
        f"{block}.{linear}_proj"
        for block, linears in {"self_attn": "qkvo", "mlp": ("gate", "up", "down")}.items()
        for linear in linears
    ]
    assert trained == {
        f"base_model.model.model.language_model.layers.{layer}.{place}.lora_{matrix}.default.weight"
        for layer in range(2)
        for place in places
        for matrix in "AB"
    }


def test_embeddings_put_the_image_tokens_at_their_place(vlm, images):
    prompt = vlm.prompt("Look.")
    tokens = vlm.image_features(images)
    with torch.no_grad():
        embeddings, lengths = prompt_embeddings(vlm, [prompt] * 3, tokens, [[], [], []])
    at = len(prompt.before)
    assert torch.equal(embeddings[:, at : at + 4], tokens)
    assert lengths == [at + 4 + len(prompt.after)] * 3


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no vision language model.*nowhere"):
        VLM.load(str(tmp_path / "nowhere"))


# transformers makes FlexAttention's causal mask with this flag.
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")
@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_every_attention_gives_the_same_result_with_a_mask_of_pairs(attention):
    if attention == "flex_attention" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler for torch.compile, which FlexAttention needs")
    torch.manual_seed(0)
    vlm = VLM.load("pocket")
    embeddings = torch.randn(2, 40, vlm.hidden_size)
    pairs = torch.rand(2, 1, 40, 40).gt(0.5).tril() | torch.eye(40, dtype=torch.bool)
    masks = (pairs, pairs[:1], None)  # for each row, for all rows, causal
    with torch.no_grad():  # on the CPU FlexAttention has no backward pass
        expected = [vlm.hidden(embeddings, mask=mask) for mask in masks]
        vlm.model.config.text_config._attn_implementation = attention
        for mask, hidden in zip(masks, expected, strict=True):
            found = vlm.hidden(embeddings, mask=mask)
            torch.testing.assert_close(found, hidden, rtol=1e-4, atol=1e-4)


def test_flex_attention_is_for_cuda():
    vlm = VLM.load("pocket", attention="flex_attention")
    assert vlm.model.config.text_config._attn_implementation == "sdpa"


def test_other_attention_is_refused(tiny_checkpoint):
    vlm = VLM.load(str(tiny_checkpoint))
    vlm.model.config.text_config._attn_implementation = "flash_attention_2"
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match=r"'flash_attention_2'; expected 'sdpa', 'eager' or"):
        vlm.hidden(torch.zeros(1, 3, vlm.hidden_size), mask=mask)
