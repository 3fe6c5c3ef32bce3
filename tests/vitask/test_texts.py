"""Where a VLM and its datasets meet: what the tokenizer cannot carry is refused first."""

import json
from copy import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.vitask.conftest import small_dataset
from tests.vitask.test_names import MULTI, ODD, spec
from vitask.checkpoint import Task, VITask
from vitask.features import Features
from vitask.names import canonical
from vitask.prompts import answer, candidates, instruction, response
from vitask.recipes import POCKET, vanilla
from vitask.sealed import write_sealed
from vitask.texts import check_texts
from vitask.train import TrainingSet, tune
from vitask.vlm import VLM

MARKS = [
    "<image>", "<IMG_CONTEXT>", "<|im_end|>", "<|im_start|>", "<|endoftext|>", "<img>", "</img>",
    "<video>",
]  # fmt: skip
CLASSES = st.lists(
    st.text(max_size=12) | st.sampled_from([one for one in ODD if len(one) < 99]),
    min_size=2, max_size=6,
)  # fmt: skip


@pytest.fixture(scope="module")
def pocket():
    return VLM.load("pocket")


def described(classes, task):
    """The description, where these names are accepted."""
    try:
        return spec(*classes, task=task)
    except ValueError:
        assume(False)


def written(vlm, text):
    """What a model that writes the answer perfectly has written."""
    return vlm.decode(vlm.response_ids(response(text)))


@settings(max_examples=30)
@given(classes=CLASSES)
def test_every_accepted_class_comes_back_from_its_tokens(pocket, classes):
    found = described(classes, "multi-class")
    known = candidates(found, np.array([]))
    check_texts(pocket, found, known, "complete")
    for label in range(len(classes)):
        assert known.parse(written(pocket, answer(found, label))) == label


@settings(max_examples=30)
@given(classes=CLASSES, bits=st.integers(0, 63))
def test_every_set_of_accepted_labels_comes_back_from_its_tokens(pocket, classes, bits):
    found = described(classes, MULTI)
    labels = np.array([bits >> i & 1 for i in range(len(classes))])
    known = candidates(found, labels[None])
    check_texts(pocket, found, known, "complete")
    text = written(pocket, answer(found, labels))
    assert known.parse_labels(text, found.classes).tolist() == labels.astype(bool).tolist()
    if known.coverage(labels[None]):
        assert known.members[known.parse(text)].tolist() == labels.astype(bool).tolist()


def test_odd_names_pass_together(pocket):
    for task in ("multi-class", MULTI):
        found = spec(*ODD, task=task)
        check_texts(pocket, found, candidates(found, np.eye(len(ODD), dtype=int)), "complete")


@pytest.mark.parametrize("mark", MARKS)
def test_a_special_token_is_refused_in_every_text(pocket, mark):
    for found in (spec("good", f"a{mark}b"), spec("a", "b", modality=f"x {mark}")):
        with pytest.raises(ValueError, match="a special token") as caught:
            check_texts(pocket, found, candidates(found, np.array([])), "complete")
        assert mark in str(caught.value)
        assert "'own'" in str(caught.value)
        with pytest.raises(ValueError, match="a special token"):
            pocket.prompt(instruction(found))
    with pytest.raises(ValueError, match="a special token"):
        pocket.response_ids(f"a{mark}.")


@pytest.fixture
def tiny(tiny_checkpoint):
    return VLM.load(str(tiny_checkpoint))


def test_tune_refuses_before_it_changes_the_vlm(tiny):
    dataset = small_dataset("own", ("good", "<|im_end|>"))
    names = [name for name, _ in tiny.model.named_parameters()]
    recipe = replace(vanilla(POCKET), vlm=tiny.name)
    image = Features({"own": dataset}, tiny.image_features)
    with pytest.raises(ValueError, match=r"'own': class '<\|im_end\|>' has"):
        tune(tiny, {"own": dataset}, recipe, 0, image=image)
    assert [name for name, _ in tiny.model.named_parameters()] == names


def test_scoring_and_a_read_checkpoint_refuse_too(tiny, tmp_path):
    good = {"own": Task.of(small_dataset("own", ("good", "better")))}
    bad = {"own": Task.of(small_dataset("own", ("good", "<img>")))}
    recipe = replace(vanilla(POCKET), vlm=tiny.name)
    with pytest.raises(ValueError, match="'own': class '<img>' has"):
        VITask(tiny, recipe, bad)
    tiny.add_lora(rank=2, alpha=2, dropout=0.0)
    VITask(tiny, recipe, good).save_pretrained(tmp_path / "model")
    card = tmp_path / "model" / "vitask.json"
    fields = json.loads(card.read_text("utf-8").replace("better", "<img>"))
    write_sealed(card, {name: value for name, value in fields.items() if name != "sha256"})
    with pytest.raises(ValueError, match="'own': class '<img>' has"):
        VITask.from_pretrained(tmp_path / "model")


def of_words(vlm, words, normalizer=None):
    """The VLM with a tokenizer that knows these words alone."""
    marks = ["<|im_start|>", "<|im_end|>", "<IMG_CONTEXT>", "<img>", "</img>", "[UNK]"]
    known = {word: i for i, word in enumerate([*marks, *words])}
    inner = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if normalizer is not None:
        inner.normalizer = normalizer
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", eos_token="<|im_end|>",
        extra_special_tokens=dict(zip("abcde", marks, strict=False)),
    )  # fmt: skip
    processor = copy(vlm.processor)
    processor.tokenizer, processor.image_token_id = tokenizer, 2
    return VLM(vlm.model, processor, "words")


def check(vlm, found):
    check_texts(vlm, found, candidates(found, np.array([])), "complete")


def test_two_answers_of_the_same_tokens_are_refused_and_both_named(tiny):
    words = of_words(tiny, ["cat", "dog", "."])
    check(words, spec("cat", "dog"))
    with pytest.raises(ValueError, match="same tokens") as caught:
        check(words, spec("cat", "猫", "犬"))
    assert "'猫'" in str(caught.value)
    assert "'犬'" in str(caught.value)


def test_an_answer_that_the_tokens_lose_is_refused_and_named(tiny):
    words = of_words(tiny, ["cat", "dog", "."])
    with pytest.raises(ValueError, match=r"writes '猫' as .* not read as the same answer"):
        check(words, spec("cat", "猫"))
    with pytest.raises(ValueError, match="characters that the tokenizer knows"):
        words.response_ids("猫.")
    folding = of_words(tiny, ["cat", "dog", ".", "a", "b", ";"], normalizers.NFKC())
    with pytest.raises(ValueError, match="is not read as the same answer"):
        check(folding, spec("cat", "a\uff1bb"))


def test_a_special_token_that_a_normaliser_makes_is_found(tiny):
    small = normalizers.Lowercase()
    words = of_words(tiny, ["cat", "dog", "."], small)
    words.processor.tokenizer.add_special_tokens({"additional_special_tokens": ["[sep]"]})
    assert words.special_token("a [sep] b") == "[sep]"
    assert words.special_token("cat") is None


def test_blanks_before_commas_stay(pocket):
    text = "a , b n't ( c ) ?"
    pocket.processor.tokenizer.clean_up_tokenization_spaces = True
    assert pocket.decode(pocket.response_ids(text)) == text


def test_odd_names_go_through_training_data_and_scoring(tiny):
    """One name is the beginning of another; scores equal one forward per class in float64."""
    names = ("a", "a b", "a b c", "ab", "None", "1", "[PAD]", "e\u0301", "x" * 120, "a, b", "St.")
    vlm = VLM.load(tiny.name, dtype=torch.float64)
    dataset = small_dataset("own", names, counts=(44, 8, 3))
    tokens = vlm.image_features(dataset.splits["test"].images)
    image = Features({"own": dataset}, vlm.image_features)
    data = TrainingSet.of(vlm, {"own": dataset}, image, None)
    labels = dataset.splits["train"].labels
    for row, label in zip(data.response, labels, strict=True):
        assert canonical(vlm.decode(data.responses[row])) == canonical(names[label])
    model = VITask(vlm, vanilla(POCKET), {"own": Task.of(dataset)})
    found = model.score("own", tokens)
    prompt = vlm.prompt(instruction(dataset.spec))
    for column, name in enumerate(names):
        ids = vlm.response_ids(f"{name}.")
        row = [*prompt.before, *([0] * tokens.shape[1]), *prompt.after, *ids[:-1]]
        with torch.no_grad():
            embeddings = vlm.embed(torch.tensor([row] * len(tokens)))
            at = len(prompt.before)
            embeddings[:, at : at + tokens.shape[1]] = tokens
            hidden = vlm.hidden(embeddings)[:, -len(ids) :].flatten(0, 1)
            log_p = vlm.logits(hidden).log_softmax(-1).unflatten(0, (len(tokens), -1))
        expected = log_p[:, range(len(ids)), ids].sum(1).numpy()
        np.testing.assert_allclose(found[:, column], expected, atol=1e-5)
