"""Instruction templates, and label <-> response text, both directions side by side.

Training, scoring and generation build their prompts here, and every record holds the prompts'
hash.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitask.data.spec import DatasetSpec
from vitask.names import NO_FINDING, SEPARATOR, canonical, numbers

INSTRUCTION = "Analyze the given {modality} image. The possible diagnoses are: {labels}."
FREQUENT_LABEL_SETS = 64  # multi-label candidates, besides the single labels


def instruction(spec: DatasetSpec, form: str = "complete") -> str:
    """The instruction of a dataset in one of FORMS; "complete" lists the possible diagnoses."""
    template, names = FORMS[form]
    labels = (*spec.classes, NO_FINDING) if spec.multi_label else _answers(spec)
    return template.format(modality=spec.modality, labels=SEPARATOR.join(names(labels)))


def _answers(spec: DatasetSpec) -> tuple[str, ...]:
    """Single-label candidates: the finer answers where the dataset has them, else the classes."""
    return tuple(text for text, _ in spec.answers) or spec.classes


Names = tuple[str, ...]


def _all(labels: Names) -> Names:
    return labels


def _first(share: float) -> Callable[[Names], Names]:
    """The first labels of the list, at least one and never all of several."""
    return lambda labels: labels[: max(1, math.floor(share * len(labels)))]


def _shuffled(seed: int) -> Callable[[Names], Names]:
    """Another order than the complete list's; two labels have only one."""
    return lambda labels: _other_order(labels, np.random.default_rng(seed))


def _other_order(labels: Names, rng: np.random.Generator) -> Names:
    order = rng.permutation(labels).tolist()
    while len(labels) > 1 and tuple(order) == labels:
        order = rng.permutation(labels).tolist()
    return tuple(order)


# Ways to ask, named after the part of the instruction that they leave out or change: a template,
# and a function of the list of labels.
FORMS: dict[str, tuple[str, Callable[[Names], Names]]] = {
    "complete": (INSTRUCTION, _all),
    "no_list": ("Analyze the given {modality} image.", _all),
    "list_75": (INSTRUCTION, _first(0.75)),
    "list_50": (INSTRUCTION, _first(0.50)),
    "list_25": (INSTRUCTION, _first(0.25)),
    "shuffled_1": (INSTRUCTION, _shuffled(1)),
    "shuffled_2": (INSTRUCTION, _shuffled(2)),
    "shuffled_3": (INSTRUCTION, _shuffled(3)),
    "no_modality": ("Analyze the given image. The possible diagnoses are: {labels}.", _all),
    "paraphrase_1": ("Look at this {modality} image. Choose its diagnosis from: {labels}.", _all),
    "paraphrase_2": ("This is a {modality} image. It shows one of these: {labels}. Which?", _all),
    "paraphrase_3": ("Which of the following does the {modality} image show: {labels}?", _all),
    "empty": ("", _all),
}


def sha256(prompts: Mapping[str, str]) -> str:
    """Digest of the instructions of some datasets, by name."""
    text = json.dumps(dict(prompts), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def answer(spec: DatasetSpec, label: int | np.integer | np.ndarray) -> str:
    """Label -> answer text: a class name, or the present labels in dataset order."""
    if not spec.multi_label:
        return spec.classes[int(label)]
    present = [name for name, held in zip(spec.classes, np.asarray(label), strict=True) if held]
    return SEPARATOR.join(present) or NO_FINDING


def response(text: str) -> str:
    """Answer text -> the response that the model must write before its end-of-turn token."""
    return f"{text}."


@dataclass(frozen=True)
class Candidates:
    """The possible answers of a dataset: its images are scored among them.

    texts:   answer texts, without the final period
    members: bool (candidates, classes), the labels that each answer states
    """

    texts: tuple[str, ...]
    members: np.ndarray

    def card(self) -> dict[str, list]:
        """As JSON: the texts as "answers", and as "members" the labels that each states."""
        members = [np.flatnonzero(row).tolist() for row in self.members]
        return {"answers": list(self.texts), "members": members}

    @classmethod
    def of_card(cls, card: Mapping[str, Any], classes: int) -> "Candidates":
        """The candidates of a card; `classes` is the dataset's number of classes."""
        members = np.zeros((len(card["answers"]), classes), dtype=bool)
        for row, stated in enumerate(card["members"]):
            members[row, stated] = True
        return cls(tuple(card["answers"]), members)

    def parse(self, text: str) -> int | None:
        """Generated text -> number of the candidate, or None for an invalid answer.

        Texts are compared in their canonical form: case, Unicode form, runs of white space,
        invisible characters and final periods do not count. Nothing else is guessed.
        """
        return numbers(self.texts).get(canonical(text))

    def parse_labels(self, text: str, classes: Sequence[str]) -> np.ndarray | None:
        """Multi-label: generated text -> bool (classes,), any set of known labels, or None."""
        labels, known = np.zeros(len(classes), dtype=bool), numbers(tuple(classes))
        written = canonical(text)
        if written == canonical(NO_FINDING):
            return labels
        for part in written.split(SEPARATOR.strip()):
            if (number := known.get(canonical(part))) is None:
                return None
            labels[number] = True
        return labels

    def coverage(self, labels: np.ndarray) -> float:
        """Share of images whose exact answer is a candidate; labels as in a Split."""
        if labels.ndim == 1:
            return 1.0
        known = {row.tobytes() for row in self.members}
        return float(np.mean([row.astype(bool).tobytes() in known for row in labels]))


def candidates(spec: DatasetSpec, train_labels: np.ndarray) -> Candidates:
    """The dataset's candidates; for multi-label the labels, "no finding" and frequent label sets.

    train_labels: int (n, classes) for multi-label, else not used

    The label sets are the 64 most frequent sets of two or more labels in the train split (ties: in
    dataset order). They do not depend on the test split.
    """
    single = np.eye(len(spec.classes), dtype=bool)
    if not spec.multi_label:
        of = [label for _, label in spec.answers] or list(range(len(spec.classes)))
        return Candidates(texts=_answers(spec), members=single[of])
    counts = Counter(tuple(row) for row in train_labels.astype(bool).tolist() if sum(row) > 1)
    frequent = sorted(counts, key=lambda row: (-counts[row], [not held for held in row]))
    members = np.concatenate(
        [
            single,
            np.zeros((1, len(spec.classes)), dtype=bool),
            np.array(frequent[:FREQUENT_LABEL_SETS], dtype=bool).reshape(-1, len(spec.classes)),
        ]
    )
    return Candidates(texts=tuple(answer(spec, row) for row in members), members=members)
