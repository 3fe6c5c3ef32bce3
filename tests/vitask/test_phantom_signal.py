"""The phantom's two criteria, by training: a TSM learns it, generic features do not.

On five of the twelve sets, so that it takes a minute; the leaderboard has all twelve.
"""

from dataclasses import replace

import numpy as np
import pytest

from vitask.baselines import linear_probe
from vitask.data import load
from vitask.data.spec import Split
from vitask.features import Features
from vitask.recipes import POCKET
from vitask.tsm import train_tsm
from vitask.validation import decide, macro_f1
from vitask.vlm import VLM

NAMES = ("pathmnist", "octmnist", "bloodmnist", "breastmnist", "organamnist")
RECIPE = replace(POCKET, tsm_epochs=20)


@pytest.fixture(scope="module")
def phantom():
    return {name: load(name, source="phantom") for name in NAMES}


def mean_f1(datasets, log_probability):
    return np.mean(
        [
            macro_f1(d.spec, d.splits["test"].labels, decide(d.spec, log_probability(name)))
            for name, d in datasets.items()
        ]
    )


def trained_f1(datasets, train_on):
    model, _ = train_tsm(train_on, RECIPE, 0)
    return mean_f1(
        datasets,
        lambda name: model.log_probabilities(
            datasets[name].splits["test"].images, datasets[name].spec
        ),
    )


@pytest.mark.long
def test_a_tsm_is_far_above_a_probe_of_generic_features(phantom):
    vlm = VLM.load("pocket")
    predictions, _ = linear_probe(phantom, Features(phantom, vlm.vision_features))
    probe = mean_f1(phantom, lambda name: predictions[NAMES.index(name)].log_probability)
    tsm = trained_f1(phantom, phantom)
    assert tsm >= probe + 0.2, (tsm, probe)


@pytest.mark.long
def test_a_tsm_trained_on_shuffled_labels_is_at_chance(phantom):
    rng = np.random.default_rng(0)
    shuffled = {}
    for name, dataset in phantom.items():
        splits = dict(dataset.splits)
        for split in ("train", "val"):
            images = splits[split]
            labels = images.labels[rng.permutation(len(images))]
            splits[split] = Split(images.images, labels, images.ids)
        shuffled[name] = replace(dataset, splits=splits)
    # chance: answers drawn at the frequencies of the classes, without the image
    guesses = [
        macro_f1(d.spec, d.splits["test"].labels, rng.permutation(d.splits["test"].labels))
        for d in phantom.values()
        for _ in range(50)
    ]
    assert abs(trained_f1(phantom, shuffled) - np.mean(guesses)) < 0.08
