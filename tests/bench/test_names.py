"""Odd names in pages, tables and options: nothing breaks, and nothing is taken for another."""

import csv
import io

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.commands.cli import split_names
from bench.commands.compare import chosen
from bench.commands.predict import columns
from bench.report.table import csv_text
from bench.stats.metrics import measure
from bench.suite import shown, suite, table
from tests.vitask.test_names import ODD, spec
from vitask.decision import scored
from vitask.prompts import candidates
from vitask.score import Prediction

LINE = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=20)


def cells(text):
    """What a reader of the table sees, row by row."""
    markdown_it = pytest.importorskip("markdown_it")
    tokens = markdown_it.MarkdownIt("commonmark").enable("table").parse(text)
    assert [t.type for t in tokens if t.level == 0] == ["table_open", "table_close"]
    row, rows = [], []
    for token in tokens:
        if token.type == "inline":
            assert {child.type for child in token.children} <= {"text", "text_special"}
            row.append("".join(child.content for child in token.children))
        elif token.type == "tr_close":
            rows.append(row)
            row = []
    return rows


@given(st.lists(LINE | st.sampled_from(ODD), min_size=1, max_size=4))
def test_any_text_is_one_cell_of_a_table_that_shows_it(texts):
    rows = cells(table(["what", *map(shown, texts)], [["x", *map(shown, texts)]]))
    plain = [" ".join(text.split()) for text in texts]
    assert rows == [["what", *plain], ["x", *plain]]


def test_names_that_need_no_escape_are_unchanged():
    for name in ("pbc_blood", "organ_ct_curvas", "CC BY-NC 4.0", "a (b, c): https://x.org/y"):
        assert shown(name) == name


@pytest.fixture(scope="module")
def frame():
    """A long table as of a run with odd classes."""
    found, labels = spec(*ODD), np.arange(len(ODD))
    log_p = np.log(np.where(np.eye(len(ODD)) == 1, 0.5, 0.01))
    data = scored(found, labels, Prediction("own", "candidates", log_p), candidates(found, labels))
    rows = [{"dataset": "own", "metric": m, "mean": float(v[0])} for m, v in measure(data).items()]
    return pd.DataFrame(rows)


def test_a_table_in_csv_holds_every_class(frame):
    read = list(csv.DictReader(io.StringIO(csv_text(frame))))
    assert [row["metric"] for row in read] == frame["metric"].tolist()
    assert sum(row["metric"].startswith("recall:") for row in read) == len(ODD)


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_the_recall_of_any_class_can_be_asked_for(name, frame):
    main, metric = suite("main"), f"recall:{name}"
    asked = split_names(f"accuracy, {metric},macro_f1", frame["metric"].unique())
    assert asked == ("accuracy", metric, "macro_f1")
    assert set(chosen(frame, main, asked, ())["metric"]) == {"accuracy", "macro_f1", metric}
    assert main.metric(metric).name == "recall"


def test_unknown_names_are_divided_at_commas():
    assert split_names("a, b,,a") == ("a", "b")
    assert split_names("x,recall:a, b", ["recall:a", "recall:a, b"]) == ("x", "recall:a, b")


def test_a_candidate_never_takes_the_name_of_another_column():
    own = ["file", "answer", "generated", "error"]
    texts = ["error", "candidate error", "fine", "file"]
    assert columns(texts, own) == [
        "candidate candidate error", "candidate error", "fine", "candidate file",
    ]  # fmt: skip
