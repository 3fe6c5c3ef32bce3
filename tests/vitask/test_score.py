"""Constrained scoring and generation do not depend on batches, nor on one forward or many."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from vitask.branches import prompt_embeddings, response_hidden
from vitask.card import Task
from vitask.checkpoint import VITask
from vitask.exemplar import ExemplarConnector
from vitask.prompts import instruction, response
from vitask.recipes import POCKET
from vitask.score import Trie, generate
from vitask.tsm import TSM, heads
from vitask.vlm import VLM


@pytest.fixture(scope="module")
def model(tiny_checkpoint, tiny_datasets):
    """All adapter and connector weights are random: LoRA's B starts at zero, which hides faults."""
    torch.manual_seed(0)
    vlm = VLM.load(str(tiny_checkpoint))
    vlm.add_lora(rank=4, alpha=8, dropout=0.0)
    with torch.no_grad():
        for name, parameter in vlm.adapter.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
    specs = [d.spec for d in tiny_datasets.values()]
    tsm = TSM("test_resnet", heads(specs), 32).eval().requires_grad_(False)
    connector = ExemplarConnector(tsm.feature_size(), vlm.hidden_size).requires_grad_(False)
    tasks = {name: Task.of(dataset) for name, dataset in tiny_datasets.items()}
    return VITask(vlm, POCKET, tasks, tsm=tsm, connector=connector)


def images_of(datasets, name):
    return datasets[name].splits["test"].images


@pytest.mark.parametrize("exemplar", [False, True], ids=["without EP", "with EP"])
@pytest.mark.parametrize("dataset", ["two", "five", "many"])
def test_one_row_of_all_candidates_equals_one_forward_per_class(
    model, tiny_datasets, dataset, exemplar
):
    tokens = model.image_tokens(images_of(tiny_datasets, dataset)[:3], exemplar=exemplar)
    task, vlm = model.tasks[dataset], model.vlm
    prompt = vlm.prompt(instruction(task.spec))
    expected = np.zeros((3, len(task.candidates.texts)))
    for column, text in enumerate(task.candidates.texts):
        ids = vlm.response_ids(response(text))
        with torch.no_grad():
            hidden, labels, owner = response_hidden(vlm, [prompt] * 3, tokens, [ids] * 3)
            log_p = vlm.logits(hidden).log_softmax(-1).gather(1, labels[:, None])[:, 0]
        expected[:, column] = torch.zeros(3).index_add_(0, owner, log_p).numpy()
    np.testing.assert_allclose(model.score(dataset, tokens), expected, atol=1e-4)


@pytest.mark.parametrize("exemplar", [False, True], ids=["without EP", "with EP"])
def test_batch_1_and_batch_64_score_alike_over_all_datasets(model, tiny_datasets, exemplar):
    one = VITask(
        model.vlm,
        replace(model.recipe, score_batch_size=1),
        model.tasks,
        tsm=model.tsm,
        connector=model.connector,
    )
    assert model.recipe.score_batch_size == 64
    for name, dataset in tiny_datasets.items():
        upright = np.concatenate([split.images for split in dataset.splits.values()])
        images = np.concatenate([upright, upright[:, ::-1]])  # a whole batch of 64, and a rest
        assert len(images) == 96
        tokens = model.image_tokens(images, exemplar=exemplar)
        many, single = model.score(name, tokens), one.score(name, tokens)
        np.testing.assert_allclose(many, single, atol=1e-4)
        assert (many.argmax(-1) == single.argmax(-1)).all()
        assert model.write(name, tokens[:20]) == one.write(name, tokens[:20])


def test_scores_are_log_probabilities(model, tiny_datasets):
    tokens = model.image_tokens(images_of(tiny_datasets, "five"))
    scores = model.score("five", tokens)
    assert (scores < 0).all()
    assert (np.exp(scores).sum(-1) < 1).all()
    np.testing.assert_allclose(model.predict("five", images_of(tiny_datasets, "five")).sum(-1), 1.0)


def test_the_image_and_the_exemplar_change_the_scores(model, tiny_datasets):
    images = images_of(tiny_datasets, "five")[:2]
    without = model.score("five", model.image_tokens(images, exemplar=False))
    with_ep = model.score("five", model.image_tokens(images, exemplar=True))
    assert np.abs(without[0] - without[1]).max() > 1e-3
    assert np.abs(without - with_ep).max() > 1e-3


@pytest.mark.parametrize("dataset", ["two", "five", "many"])
def test_both_branches_of_one_pass_equal_two_passes(model, tiny_datasets, dataset):
    images = images_of(tiny_datasets, dataset)
    without, with_exemplar = model.score_both(
        dataset, model.vlm.image_features(images), model.tsm.features(images)
    )
    for scores, exemplar in ((without, False), (with_exemplar, True)):
        alone = model.score(dataset, model.image_tokens(images, exemplar=exemplar))
        np.testing.assert_allclose(scores, alone, atol=1e-4)
        assert (scores.argmax(-1) == alone.argmax(-1)).all()


def test_logits_made_piece_by_piece_give_the_same_scores(model, tiny_datasets, monkeypatch):
    tokens = model.image_tokens(images_of(tiny_datasets, "many"))
    whole = model.score("many", tokens)
    monkeypatch.setattr("vitask.score.LOGIT_BYTES", 5 * 4 * len(model.vlm.head))
    np.testing.assert_allclose(model.score("many", tokens), whole, atol=1e-5)


def test_a_trie_has_every_prefix_once():
    trie = Trie([(7, 8, 9), (7, 8, 5, 9), (6, 9), (9,)])
    assert trie.token == [-1, 7, 8, 5, 6]
    assert trie.parent == [0, 0, 1, 2, 0]
    assert trie.way == [[0, 1, 2], [0, 1, 2, 3], [0, 4], [0]]


def test_generation_is_the_arg_max_token_by_token(model, tiny_datasets):
    tokens = model.image_tokens(images_of(tiny_datasets, "two")[:1], exemplar=True)
    vlm = model.vlm
    prompt = vlm.prompt("Name it.")
    ids: list[int] = []
    while len(ids) < 5 and vlm.end_of_turn_id not in ids:
        with torch.no_grad():
            embeddings, _ = prompt_embeddings(vlm, [prompt], tokens, [ids])
            ids.append(int(vlm.logits(vlm.hidden(embeddings)[0, -1:]).argmax()))
    assert generate(vlm, [prompt], tokens, max_new_tokens=5) == [vlm.decode(ids)]


def test_prompts_of_different_lengths_give_the_same_answers_together_and_alone(
    model, tiny_datasets
):
    tokens = model.image_tokens(images_of(tiny_datasets, "two")[:4], exemplar=True)
    vlm, asked = model.vlm, ["Name it.", "What, in so many words, is to be seen here?", "?", "Say."]
    prompts = [vlm.prompt(text) for text in asked]
    together = generate(vlm, prompts, tokens, max_new_tokens=8)
    alone = [
        generate(vlm, [prompt], tokens[i : i + 1], max_new_tokens=8)[0]
        for i, prompt in enumerate(prompts)
    ]
    assert together == alone
    assert len(set(together)) > 1


def test_an_unknown_dataset_is_named(model, tiny_datasets):
    with pytest.raises(ValueError, match=r"no dataset 'six'.*two, five, many"):
        model.predict("six", images_of(tiny_datasets, "two"))
