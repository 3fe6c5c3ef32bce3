"""One method against another, on the same test images: difference, interval, p-value."""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pandas as pd

from bench.plan import specs_of
from bench.record import Record
from bench.suites import Rows, suite
from bench.table import Answers, tabulate

METRICS = ("macro_f1", "accuracy", "auc", "balanced_accuracy", "ece", "qwk")


def compare(folder: Path, records: Sequence[Record], method: str, reference: str) -> pd.DataFrame:
    """dataset, metric, both means, difference with its 95 % interval, Holm-adjusted p.

    Paired: both methods are resampled, and swapped, image by image. ValueError for a method
    that the suite has not.
    """
    known = list(dict.fromkeys(record.method for record in records))
    for name in (method, reference):
        if name not in known:
            near = get_close_matches(name, known) or known
            raise ValueError(
                f"suite {records[0].suite!r} in {folder} has no method {name!r}; did you mean "
                f"{' or '.join(near)}?"
            )
    if method == reference:
        raise ValueError(f"{method!r} was given twice; expected two different methods")
    mine = [record for record in records if record.method in (method, reference)]
    module = suite(records[0].suite)
    rows = {"METHODS": {method: "", reference: ""}, "REFERENCE": reference}
    pair = SimpleNamespace(**vars(module) | rows)  # the suite itself, with these two alone
    answers = Answers(folder, mine, specs_of(records[0]), cast(Rows, pair))
    frame = tabulate(mine, answers)
    keys = ["dataset", "metric"]
    means = frame[frame["method"] == reference].set_index(keys)["mean"].rename(reference)
    shown = [*METRICS, *getattr(module, "TABLES", ())]
    found = frame[(frame["method"] == method) & frame["metric"].isin(shown)].join(means, on=keys)
    columns = {
        "mean": method, "diff_to_vanilla": "difference", "diff_low": "low", "diff_high": "high",
        "p_holm": "p (Holm)",
    }  # fmt: skip
    found = found.rename(columns=columns)
    return found[[*keys, method, reference, "difference", "low", "high", "p (Holm)"]]
