"""Whether a VLM's tokenizer can carry what a dataset asks and answers.

Checked wherever a VLM and its datasets meet, before anything is computed: tuning, scoring, and a
checkpoint that is read.
"""

import numpy as np

from vitask.data.spec import DatasetSpec
from vitask.errors import InputError
from vitask.prompts import Candidates, instruction, response
from vitask.vlm import VLM

REMEDY = "write it otherwise, or use another VLM"


def check_texts(vlm: VLM, spec: DatasetSpec, candidates: Candidates, form: str) -> None:
    """InputError names the dataset and the text that the tokenizer cannot carry.

    form: the instruction's, one of `vitask.prompts.FORMS`

    No text has a special token. The candidates differ as tokens, and what the tokens of each are
    decoded to is read as this candidate.
    """
    where, named = f"dataset {spec.name!r}", [("modality", spec.modality)]
    named += [("class", text) for text in (*spec.classes, *(text for text, _ in spec.answers))]
    for what, text in named:
        if mark := vlm.special_token(text):
            raise InputError(
                f"{where}: {what} {text!r} has {mark!r}, a special token of the VLM {vlm.name!r}; "
                f"{REMEDY}"
            )
    vlm.prompt(instruction(spec, form))
    known: dict[tuple[int, ...], str] = {}
    for text in candidates.texts:
        ids = vlm.token_ids(response(text))
        if ids in known:
            raise InputError(
                f"{where}: the answers {known[ids]!r} and {text!r} are the same tokens for the VLM "
                f"{vlm.name!r}, so it cannot give one of them alone; {REMEDY}"
            )
        known[ids] = text
    for number, (ids, text) in enumerate(known.items()):
        if not _read_back(written := vlm.decode(ids), number, spec, candidates):
            raise InputError(
                f"{where}: the VLM {vlm.name!r} writes {text!r} as {written!r}, which is not read "
                f"as the same answer; {REMEDY}"
            )


def _read_back(written: str, number: int, spec: DatasetSpec, candidates: Candidates) -> bool:
    """Whether a text is read as the candidate with this number."""
    if candidates.parse(written) != number:
        return False
    if not spec.multi_label:
        return True
    labels = candidates.parse_labels(written, spec.classes)
    return labels is not None and np.array_equal(labels, candidates.members[number])
