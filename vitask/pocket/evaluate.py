"""Accuracy of the pocket VLM on held-out pictures, with and without the right image."""

import numpy as np
from jaxtyping import Float

from vitask.pocket.questions import KINDS, canonical, held_out
from vitask.score import generate
from vitask.vlm import VLM


def accuracy(vlm: VLM, count: int, seed: int, *, shuffled: bool = False) -> dict[str, float]:
    """Accuracy of each kind of question; see `right`."""
    found = right(vlm, count, seed, shuffled=shuffled)
    return {kind: float(np.nanmean(answers)) for kind, answers in found.items()}


def right(
    vlm: VLM, count: int, seed: int, *, shuffled: bool = False
) -> dict[str, Float[np.ndarray, " pictures"]]:
    """For each kind of question, by picture: 1 right, 0 wrong, NaN not asked.

    Greedy generation; the whole answer must be right.

    shuffled: every question is about another picture, drawn at random; a model that uses the image
        falls to chance
    """
    images, facts = held_out(count, seed)
    tokens = vlm.image_features(images)
    found = {}
    for kind, answers in KINDS.items():
        asked = np.flatnonzero(facts[kind] >= 0)
        given = np.random.default_rng(seed).permutation(asked) if shuffled else asked
        longest = max(len(vlm.response_ids(f"{answer}.")) for answer in answers)
        prompts = [vlm.prompt(canonical(kind))] * len(given)
        written = generate(vlm, prompts, tokens[given], max_new_tokens=longest, batch_size=256)
        expected = [f"{answers[f]}." for f in facts[kind][asked]]
        found[kind] = np.full(len(images), np.nan)
        found[kind][asked] = [w == e for w, e in zip(written, expected, strict=True)]
    return found


def chance(count: int, seed: int) -> dict[str, float]:
    """Accuracy of always giving the most frequent answer."""
    _, facts = held_out(count, seed)
    return {
        kind: float(np.bincount(facts[kind][facts[kind] >= 0]).max() / (facts[kind] >= 0).sum())
        for kind in KINDS
    }
