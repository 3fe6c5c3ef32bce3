"""The embedded small VLM: its pictures, questions, tokenizer, training and recorded accuracy."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoProcessor, InternVLForConditionalGeneration, InternVLProcessor

from kernels import IGNORE_INDEX
from vitask.data import specs
from vitask.pocket import POCKET, train
from vitask.pocket.evaluate import accuracy, chance
from vitask.pocket.model import make_model
from vitask.pocket.pictures import SIDE, draw
from vitask.pocket.questions import KINDS, ask, canonical, held_out
from vitask.pocket.tokenizer import IMAGE_TOKENS, make_processor
from vitask.prompts import instruction, response
from vitask.vlm import VLM

PROCESSOR = make_processor()
RECORDED_SEED = 1  # of `python -m vitask.pocket`; the tests below use other pictures
CHANCE = 0.25  # at most, for the kinds of question that count here


def fresh(seed: int = 0) -> VLM:
    """The pocket VLM before its training."""
    return VLM(make_model(PROCESSOR, seed), PROCESSOR, "pocket")


# Pictures and questions


def test_the_same_seed_gives_the_same_pictures():
    one, again, other = (draw(20, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert np.array_equal(one.images, again.images)
    assert all(np.array_equal(one.facts[kind], again.facts[kind]) for kind in KINDS)
    assert not np.array_equal(one.images, other.images)
    assert one.images.shape == (20, SIDE, SIDE, 3)
    assert one.images.dtype == np.uint8


def test_training_has_no_held_out_picture():
    asked = {image.tobytes() for image in held_out(400, 0)[0]}
    for step in range(20):
        images = draw(train.PICTURES, np.random.default_rng([0, step])).images
        assert asked.isdisjoint(image.tobytes() for image in images)


def test_every_answer_is_among_the_listed_ones():
    rng = np.random.default_rng(0)
    listed = 0
    for kind, answers in KINDS.items():
        for fact in [*range(len(answers))] * 5:
            question = ask(kind, fact, rng)
            assert question.answer == answers[fact]
            head, mark, tail = question.instruction.partition(" The possible answers are: ")
            assert head
            if mark:
                listed += 1
                names = tail.removesuffix(".").split("; ")
                assert question.answer in names
                assert set(names) <= set(answers)
                assert len(set(names)) == len(names)
    assert listed > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_held_out_pictures_have_every_answer(kind):
    _, facts = held_out(800, 5)
    asked = facts[kind][facts[kind] >= 0]
    assert set(asked.tolist()) == set(range(len(KINDS[kind])))


def test_six_kinds_of_question_cannot_be_guessed():
    low = [kind for kind, share in chance(2000, RECORDED_SEED).items() if share <= CHANCE]
    assert len(low) >= 6, f"a constant answer is right in over {CHANCE:.0%}, except for {low}"


# Tokenizer and prompts


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_comes_back_from_its_tokens(text):
    ids = PROCESSOR.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert PROCESSOR.tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", sorted(specs()))
def test_the_datasets_prompts_are_short(name):
    """About one token for each word, so that LoRA steps on the pocket model stay cheap."""
    spec = specs()[name]
    text = instruction(spec)
    assert len(PROCESSOR.tokenizer(text)["input_ids"]) <= 48
    longest = max(len(PROCESSOR.tokenizer(response(c))["input_ids"]) for c in spec.classes)
    assert longest <= 10


def test_the_prompt_has_the_form_of_internvl():
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "ring."}]},
    ]
    text = PROCESSOR.apply_chat_template(messages, tokenize=False)
    image = torch.zeros(3, 28, 28, dtype=torch.uint8)
    inputs = PROCESSOR(images=[image], text=[text], return_tensors="pt")
    assert PROCESSOR.tokenizer.decode(inputs["input_ids"][0]) == (
        f"<|im_start|>user\n<img>{'<IMG_CONTEXT>' * IMAGE_TOKENS}</img>\nWhat is it?<|im_end|>\n"
        "<|im_start|>assistant\nring.<|im_end|>\n"
    )
    assert inputs["pixel_values"].shape == (1, 3, SIDE, SIDE)


def test_copying_reaches_every_token_of_the_datasets_prompts():
    """Training changes every label word's row in the embedding and in the head."""
    vlm, rng = fresh(), np.random.default_rng(0)
    tokenizer = PROCESSOR.tokenizer
    asked, written = set[int](), set[int]()
    for _ in range(10_000):  # training has 36,000
        question = train.copying(vlm, rng)
        asked.update(tokenizer(question.instruction)["input_ids"])
        written.update(tokenizer(response(question.answer))["input_ids"])
    for spec in specs().values():
        assert asked.issuperset(tokenizer(instruction(spec))["input_ids"])
        for name in spec.classes:
            assert written.issuperset(tokenizer(response(name))["input_ids"])


# Training


def test_a_question_among_others_gives_the_result_of_a_question_alone():
    """The row that branches is exact: mask and positions hide the other questions."""
    vlm = fresh()
    turns = [(vlm.prompt(canonical(k)), vlm.response_ids("a b.")) for k in ("shape", "count")]
    images = held_out(1, 7)[0]

    def answers(turns: list) -> torch.Tensor:
        batch = train.collate(vlm, images, {}, [turns])
        hidden = train.row_hidden(vlm, batch.layout, vlm.image_features(images))
        return vlm.logits(hidden[batch.labels != IGNORE_INDEX])

    together = answers(turns)
    alone = torch.cat([answers([turn]) for turn in turns])
    assert together.shape == alone.shape
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_fifty_steps_twice_give_the_same_weights(monkeypatch):
    monkeypatch.setattr(train, "FACT_STEPS", 20)  # the same code on less
    monkeypatch.setattr(train, "ANSWERING_STAGES", ((15, 1), (15, 8)))
    monkeypatch.setattr(train, "FACT_PICTURES", 8)
    monkeypatch.setattr(train, "PICTURES", 3)
    runs = []
    for _ in range(2):
        vlm = fresh()
        losses = list(train.pretrain(vlm, 50, 0))
        runs.append((losses, vlm.model.state_dict()))
    (losses, weights), (again, others) = runs
    assert losses == again
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    facts, answers = losses[:20], losses[20:]
    assert np.mean(facts[-5:]) < np.mean(facts[:5])
    assert np.mean(answers[-5:]) < np.mean(answers[:5])


def test_importing_the_folders_path_does_not_import_torch():
    code = "import sys, vitask.pocket; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# The weights in the repository


@pytest.fixture(scope="module")
def pocket() -> VLM:
    return VLM.load("pocket")


@pytest.fixture(scope="module")
def card() -> dict:
    return json.loads((POCKET / "heldout.json").read_text())


def test_transformers_loads_the_folder(pocket):
    assert isinstance(AutoProcessor.from_pretrained(POCKET), InternVLProcessor)
    assert type(pocket.model) is InternVLForConditionalGeneration
    assert all(p.dtype == torch.float32 for p in pocket.model.parameters())
    weights = list(Path(POCKET).rglob("*"))
    assert not [file for file in weights if file.suffix in (".bin", ".pt", ".pkl", ".pickle")]
    assert sum(file.stat().st_size for file in weights) <= 10 * 2**20


def test_the_saved_tokenizer_equals_a_new_one(pocket):
    """The corpus still fits the weights."""
    saved = pocket.processor.tokenizer
    assert saved.get_vocab() == PROCESSOR.tokenizer.get_vocab()
    assert pocket.processor.chat_template == PROCESSOR.chat_template
    text = canonical("shape")
    assert saved(text)["input_ids"] == PROCESSOR.tokenizer(text)["input_ids"]


def test_the_recorded_accuracy_is_high_and_needs_the_image(card):
    guess = chance(card["pictures"], RECORDED_SEED)
    assert card["chance"] == pytest.approx(guess)
    hard = [kind for kind in KINDS if guess[kind] <= CHANCE]
    assert len(hard) >= 6
    assert np.mean([card["accuracy"][kind] for kind in hard]) >= 0.85
    shuffled = np.mean([card["accuracy_images_shuffled"][kind] for kind in hard])
    assert shuffled <= np.mean([guess[kind] for kind in hard]) + 0.05


def test_the_recorded_accuracy_holds_on_other_pictures(pocket):
    found = accuracy(pocket, 128, seed=11)
    assert np.mean(list(found.values())) >= 0.8
    shuffled = accuracy(pocket, 128, seed=11, shuffled=True)
    # about a hundred answers of each kind: the mean over the kinds varies by about 0.02
    assert np.mean(list(shuffled.values())) <= np.mean(list(chance(128, 11).values())) + 0.06
