"""Prompts and answers: their exact texts, and label <-> text in both directions."""

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitask import names
from vitask.data import medmnist
from vitask.data.spec import DatasetSpec
from vitask.decision import scored
from vitask.prompts import FORMS, Candidates, answer, candidates, instruction, response
from vitask.score import Prediction


def spec(classes, task="multi-class"):
    return DatasetSpec(
        name="test",
        task=task,
        classes=tuple(classes),
        modality="dermatoscope",
        n_channels=3,
        n_samples={"train": 1, "val": 1, "test": 1},
        license="none",
        source="test",
        head="test",
    )


MULTI = spec(["atelectasis", "mass", "edema"], "multi-label, binary-class")


def test_instruction_and_response_have_the_exact_texts():
    assert instruction(spec(["melanoma", "nevus"])) == (
        "Analyze the given dermatoscope image. The possible diagnoses are: melanoma; nevus."
    )
    assert response("melanoma") == "melanoma."


def test_multi_label_lists_no_finding_last_and_joins_present_labels():
    assert instruction(MULTI).endswith("atelectasis; mass; edema; no finding.")
    assert answer(MULTI, np.array([1, 0, 1])) == "atelectasis; edema"
    assert answer(MULTI, np.zeros(3)) == "no finding"


@pytest.mark.parametrize(
    "written",
    ["Melanoma.", " melanoma ", "MELANOMA", "melanoma .", "mel\tanoma"],
)
def test_case_space_and_final_period_do_not_count(written):
    found = candidates(spec(["nevus", "melanoma", "mel anoma"]), np.array([])).parse(written)
    assert found == (2 if "\t" in written else 1)


@pytest.mark.parametrize("written", ["", "melanom", "melanoma nevus", "melanoma; nevus", "no"])
def test_any_other_text_is_invalid(written):
    assert candidates(spec(["nevus", "melanoma"]), np.array([])).parse(written) is None


NAMES = st.lists(
    st.text("abc ,()[]'-", min_size=1).map(lambda text: " ".join(text.split())).filter(bool),
    min_size=2,
    max_size=6,
    unique=True,
)


@given(NAMES)
def test_label_to_text_and_back(classes):
    found = candidates(spec(classes), np.array([]))
    for label in range(len(classes)):
        assert found.parse(response(answer(spec(classes), label))) == label


def test_a_class_that_ends_with_a_period_is_valid_when_it_is_written_perfectly():
    classes, labels = ["stage I.", "St.", "mass"], np.array([0, 1, 2])
    single, many = spec(classes), spec(classes, MULTI.task)
    written = [response(answer(single, label)) for label in labels]
    log_p = np.log(np.where(np.eye(3) == 1, 0.8, 0.1))
    found = scored(single, labels, Prediction("test", "candidates", log_p, written))
    assert found.generated.tolist() == [0, 1, 2]
    sets = np.array([[1, 1, 0], [0, 1, 1], [0, 0, 0], [1, 1, 1]])
    known = candidates(many, sets)
    for row in sets:
        text = response(answer(many, row))
        assert known.parse_labels(text, many.classes).tolist() == row.astype(bool).tolist()


def test_parsing_builds_its_dictionary_once():
    classes = tuple(f"label {i}" for i in range(50))
    found = candidates(spec(classes, MULTI.task), np.eye(50, dtype=int))
    found.parse("x")
    found.parse_labels("x", classes)
    before = names.numbers.cache_info()
    for text in ("label 3.", "label 4; label 5", "cough"):
        found.parse(text)
        found.parse_labels(text, classes)
    after = names.numbers.cache_info()
    assert (after.misses, after.hits) == (before.misses, before.hits + 6)


def test_the_official_instructions_are_the_same_bytes_as_ever():
    """In every form; results of other instructions would be other results."""
    texts = {n: {f: instruction(medmnist.spec(n), f) for f in FORMS} for n in medmnist.NAMES}
    whole = json.dumps(texts, ensure_ascii=False, sort_keys=True)
    assert hashlib.sha256(whole.encode()).hexdigest() == (
        "0b9019d7466488b4e68b539cfe98287e017ce5ab981d5796a3f535bac58466f6"
    )


def test_multi_label_candidates_are_singles_none_and_frequent_sets_of_the_train_split():
    rows = [[1, 1, 0]] * 3 + [[0, 1, 1]] * 5 + [[1, 0, 0]] * 9 + [[0, 0, 0]] * 9
    found = candidates(MULTI, np.array(rows))
    assert found.texts == (
        "atelectasis",
        "mass",
        "edema",
        "no finding",
        "mass; edema",
        "atelectasis; mass",
    )
    assert found.members[4].tolist() == [False, True, True]
    assert found.coverage(np.array([[0, 1, 1], [1, 1, 1], [0, 0, 0], [1, 0, 0]])) == 0.75


def test_candidates_come_back_from_their_card_as_json():
    found = candidates(MULTI, np.array([[1, 1, 0], [0, 1, 1]]))
    card = json.loads(json.dumps(found.card()))
    assert card["answers"][3] == "no finding"
    assert card["members"][3:5] == [[], [0, 1]]
    again = Candidates.of_card(card, classes=3)
    assert again.texts == found.texts
    assert np.array_equal(again.members, found.members)
    assert again.members.dtype == bool


def test_at_most_64_frequent_label_sets():
    many = spec([f"label {i}" for i in range(8)], "multi-label, binary-class")
    rows = np.array([[(n >> bit) & 1 for bit in range(8)] for n in range(256)])
    found = candidates(many, rows)
    assert len(found.texts) == 8 + 1 + 64
    assert len({row.tobytes() for row in found.members}) == len(found.texts)


def test_generated_label_sets_are_parsed_in_any_order():
    found = Candidates((), np.zeros((0, 3), bool))
    assert found.parse_labels("Edema; atelectasis.", MULTI.classes).tolist() == [True, False, True]
    assert found.parse_labels("no finding.", MULTI.classes).tolist() == [False] * 3
    assert found.parse_labels("edema; cough.", MULTI.classes) is None


@pytest.mark.parametrize("form", FORMS)
def test_forms_leave_out_what_their_names_say(form):
    spec = medmnist.spec("dermamnist")
    text = instruction(spec, form)
    named = [text.find(label) for label in spec.classes]
    listed = sum(place >= 0 for place in named)
    share = {"no_list": 0, "empty": 0, "list_75": 5, "list_50": 3, "list_25": 1}
    assert listed == share.get(form, 7)
    assert (spec.modality in text) == (form not in ("no_modality", "empty"))
    if form.startswith("shuffled"):
        assert named != sorted(named)
    elif listed:
        assert [n for n in named if n >= 0] == sorted(n for n in named if n >= 0)
    assert (text == instruction(spec)) == (form == "complete")


@pytest.mark.parametrize("count", range(2, 12))
@pytest.mark.parametrize("form", [form for form in FORMS if form != "complete"])
def test_no_form_is_the_complete_instruction_whatever_the_number_of_classes(form, count):
    few = spec([f"label {i}" for i in range(count)])
    assert instruction(few, form) != instruction(few)
