"""Questions about the pictures, and their answers.

Most instructions list the possible answers, like the prompts of the datasets. The copying task
(`vitask.pocket.train.copying`) teaches the head the tokens that no question about pictures has.
"""

from dataclasses import dataclass

import numpy as np

from vitask.pocket.pictures import (
    BRIGHTNESS,
    COLOURS,
    COUNTS,
    POSITIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    draw,
)

KINDS = {
    "shape": SHAPES,
    "colour": COLOURS,
    "texture": TEXTURES,
    "position": POSITIONS,
    "size": SIZES,
    "count": COUNTS,
    "brightness": BRIGHTNESS,
}
WORDINGS = {
    "shape": ("Name the shape.", "What shape is in the image?", "Identify the shape shown."),
    "colour": ("Name the colour of the shape.", "What colour is the shape?", "State its colour."),
    "texture": (
        "Describe the texture of the ground.",
        "What texture lies behind the shape?",
        "Identify the texture of the ground.",
    ),
    "position": (
        "Where is the shape?",
        "State the position of the shape.",
        "In which part of the image is the shape?",
    ),
    "size": ("How large is the shape?", "State the size of the shape.", "What size is the shape?"),
    "count": ("How many shapes are there?", "Count the shapes.", "State the number of shapes."),
    "brightness": (
        "How bright is the ground?",
        "State the brightness of the ground.",
        "Describe the brightness of the image.",
    ),
}
LISTED = " The possible answers are: {answers}."
ORDINALS = ("first", "second", "third", "fourth")


@dataclass(frozen=True)
class Question:
    """One instruction about one picture, and its answer without the final period."""

    kind: str
    instruction: str
    answer: str


def ask(kind: str, fact: int, rng: np.random.Generator) -> Question:
    """A question in a random wording; three of four list all or some of the possible answers."""
    answers = KINDS[kind]
    text = WORDINGS[kind][rng.integers(len(WORDINGS[kind]))]
    if rng.random() < 0.75:
        kept = rng.random(len(answers)) < rng.choice([0.5, 1.0])
        kept[fact] = True
        listed = [answers[i] for i in rng.permutation(np.flatnonzero(kept))]
        text += LISTED.format(answers="; ".join(listed))
    return Question(kind, text, answers[fact])


def canonical(kind: str) -> str:
    """The wording for evaluation: every answer in order, so all pictures share a prompt."""
    return WORDINGS[kind][0] + LISTED.format(answers="; ".join(KINDS[kind]))


def held_out(count: int, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Pictures that training never sees, uint8 (n, 32, 32, 3), and their facts as in `Pictures`.

    Each answer of a kind is right equally often: the last pictures with a frequent answer are not
    asked for that kind. So a constant answer is right in 1 / answers of the pictures. Training
    seeds its generators with two numbers, this function with three.
    """
    pictures = draw(count, np.random.default_rng([seed, 0, 1]))
    facts = {}
    for kind, fact in pictures.facts.items():
        where = [np.flatnonzero(fact == answer) for answer in range(len(KINDS[kind]))]
        asked = np.concatenate([of[: min(map(len, where))] for of in where])
        facts[kind] = np.full_like(fact, -1)
        facts[kind][asked] = fact[asked]
    return pictures.images, facts
