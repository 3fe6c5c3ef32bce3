"""Names: one canonical form, and what a description of a dataset refuses."""

import unicodedata
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitask.data.spec import TASKS, DatasetSpec
from vitask.names import canonical

MULTI = TASKS[3]


def spec(*classes, task="multi-class", **changes):
    fields = {
        "name": "own", "task": task, "classes": classes, "modality": "microscope", "n_channels": 3,
        "n_samples": {"train": 1, "val": 1, "test": 1}, "license": "", "source": "", "head": "own",
    }  # fmt: skip
    return DatasetSpec(**(fields | changes))


@settings(max_examples=60)
@given(st.text(max_size=12))
def test_the_canonical_form_is_its_own(text):
    form = canonical(text)
    assert canonical(form) == form
    assert form == form.strip()
    assert not form.endswith((".", "\u3002", "\uff0e", "\uff61"))
    assert unicodedata.is_normalized("NFC", form)


@given(st.text(), st.sampled_from(["NFC", "NFD"]), st.sampled_from(["", " ", ".", " . ", "\u200b"]))
def test_case_form_blanks_periods_and_invisible_characters_do_not_count(text, form, end):
    same = f"\u00a0\ufeff{unicodedata.normalize(form, text).swapcase().swapcase()}{end}"
    if canonical(text) == canonical(text.swapcase().swapcase()):  # some letters have three cases
        assert canonical(same) == canonical(text)


SAME = [
    ("Benign", "benign"),
    ("mass", "mass "),
    ("mass", "\tmass"),
    ("mass", "mass."),
    ("mass", "mass. . ."),
    ("Straße", "STRASSE"),
    ("ΣΑΣ", "σας"),
    ("é", "e\u0301"),
    ("Å", "\u212b"),
    ("a b", "a \u00a0\u2003b"),
    ("no mass", "no\u200b mass"),
    ("mass", "ma\u00adss"),
    ("mass", "\ufeffmass"),
    ("mass", "\u202emass\u202c"),
    ("❤", "❤\ufe0f"),
    ("1", "1."),
    ("猫", "猫\u3002"),
    ("猫", "猫\uff61"),
    ("a", "a\uff0e ."),
    ("가", "\u1100\u1161"),
    ("ᾳ\u0345", "\u0345ᾳ\u0345".strip("\u0345") + "\u0345"),
]


@pytest.mark.parametrize(("one", "other"), SAME, ids=map(ascii, SAME))
def test_two_spellings_of_one_name_are_refused_as_two_classes_and_both_named(one, other):
    assert canonical(one) == canonical(other)
    for task in ("multi-class", MULTI):
        with pytest.raises(ValueError, match="two or more different") as caught:
            spec(one, "another", other.replace("\t", " "), task=task)
        assert repr(one) in str(caught.value)
        assert repr(other.replace("\t", " ")) in str(caught.value)
    with pytest.raises(ValueError, match="two or more different"):
        spec("x", "y", answers=((one, 0), (other.replace("\t", " "), 1)))


UNUSABLE = {
    "": "is empty", " ": "is empty", " . ..": "is empty",
    "\u200b": "is empty", "\u3164": "is empty",
    "a; b": "has a semicolon", ";": "has a semicolon", "a\u037e b": "has a semicolon",
    "a\nb": r"U\+000A", "a\r": r"U\+000D", "a\tb": r"U\+0009", "a\x00": r"U\+0000",
    "a\x85b": r"U\+0085", "a\u2028b": r"U\+2028", "a\ud800": r"U\+D800",
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSABLE, ids=map(ascii, UNUSABLE))
def test_a_name_that_no_line_of_text_can_hold_is_refused(name):
    with pytest.raises(ValueError, match=UNUSABLE[name]) as caught:
        spec("good", name)
    assert repr(name) in str(caught.value)
    with pytest.raises(ValueError, match=UNUSABLE[name]):
        spec("good", "fine", answers=(("good", 0), ("fine", 1), (name, 1)))


@pytest.mark.parametrize(
    "name", ["no finding", "No  Finding.", "NO FINDING", "no\u00a0findin\u200bg"]
)
def test_the_answer_without_a_label_is_no_class_of_a_multi_label_set(name):
    with pytest.raises(ValueError, match="none of the labels") as caught:
        spec("mass", name, task=MULTI)
    assert repr(name) in str(caught.value)
    assert spec("mass", name).classes == ("mass", name)


ODD = (
    "x" * 500, "a, b", "a,b", "a|b", "`a`", "<b>", "[a]", '"a"', "'a'", "a:b", "{modality}", "100%",
    "None", "nan", "1", "0", "-1", "true", "[PAD]", "a", "a b", "a b c", "St.", "العربية", "שלום",
    "👩\u200d⚕\ufe0f", "🙂", "e\u0301x", "\u0301", "ﬁ", "²", "2", "mass ", " edema", "...and more",
    "a\\b", "a/b", "$x$", "=1+1", "a  c", "nĳ", "\U0001f1e9\U0001f1ea", "ａ",
)  # fmt: skip


@pytest.mark.parametrize("task", ["multi-class", MULTI])
def test_names_of_any_kind_are_kept_as_given(task):
    assert spec(*ODD, task=task).classes == ODD


WRONG_ANSWERS = {
    "another class's name": ((("a", 0), ("B.", 0), ("c", 1)), "is the name of class 'b'"),
    "no class": ((("a", 0), ("b", 1), ("c", 2)), "label 2; expected a number from 0 to 1"),
    "below 0": ((("a", 0), ("b", 1), ("c", -1)), "label -1"),
    "half": ((("a", 0), ("b", 1), ("c", 0.5)), "label 0.5"),
    "a class without answer": ((("a", 0), ("c", 0)), "no answer has the label of class 'b'"),
}


@pytest.mark.parametrize("case", WRONG_ANSWERS)
def test_finer_answers_that_contradict_the_classes_are_refused(case, unchecked):
    answers, message = WRONG_ANSWERS[case]
    with pytest.raises(ValueError, match=message):
        spec("a", "b", answers=answers)


def test_a_finer_answer_may_have_its_own_class_s_name():
    found = spec("none", "worse", answers=(("none", 0), ("severe", 1), ("Worse", 1)))
    assert len(found.answers) == 3
    with pytest.raises(ValueError, match="one of the two"):
        replace(found, task=MULTI)


@pytest.mark.parametrize("field", ["modality", "license", "source"])
def test_other_texts_can_be_written_too(field):
    with pytest.raises(ValueError, match=rf"{field} has U\+DC00"):
        spec("a", "b", **{field: "x\udc00"})
    with pytest.raises(ValueError, match=r"modality has a line end, U\+2029"):
        spec("a", "b", modality="x\u2029y")
