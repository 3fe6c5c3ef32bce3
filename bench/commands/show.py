"""Text for a terminal of 80 columns: what there is, and a run's main table."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.suite import MACHINE_SUITES, SUITES, question, suite

if TYPE_CHECKING:
    import pandas as pd

WIDTH = 80


def overview(roots: Sequence[Path]) -> str:
    """Suites, recipes and datasets; of a card that cannot be used, why."""
    from vitask.data import names, spec
    from vitask.errors import InputError
    from vitask.recipes import RECIPES

    lines = ["suites (`list SUITE` shows the methods)"]
    lines += [_entry(name, question(name)) for name in SUITES]
    lines.append("suites that measure this machine (by name, not in --all)")
    lines += [_entry(name, question(name)) for name in MACHINE_SUITES]
    lines.append("recipes (`recipe NAME` prints one)")
    lines += [
        _entry(r.name, f"VLM {r.vlm}, TSM {r.tsm}, {r.source_size} pixels")
        for r in RECIPES.values()
    ]
    lines.append("datasets (the first 12 also as phantom)")
    for name in names("medmnist", roots):
        try:
            one = spec(name, source="medmnist", roots=roots)
        except InputError as error:  # the other cards still count
            lines.append(_entry(name, f"cannot be used: {error}"))
            continue
        kind = f"{len(one.classes)} classes, {one.task}"
        lines.append(_entry(one.name, f"{one.modality}, {kind}, {one.license}"))
    return "\n".join(lines)


def suite_methods(name: str) -> str:
    """A suite's question and methods."""
    if name in MACHINE_SUITES:
        return _entry(name, question(name))
    of = suite(name)
    return "\n".join([question(name), *(_entry(m.name, m.text) for m in of.methods)])


def _entry(name: str, text: str) -> str:
    start = f"  {name:20} "
    if len(start) > 32:  # the text begins below
        return textwrap.fill(text, WIDTH, initial_indent=f"{start}\n    ", subsequent_indent="    ")
    return textwrap.fill(text, WIDTH, initial_indent=start, subsequent_indent=" " * len(start))


def main_table(frame: "pd.DataFrame", name: str) -> str:
    """One line a method: the primary metric, averaged or on the only dataset."""
    from bench.report.page import mark

    of = suite(name)
    metric = of.metrics[0]
    rows = frame[frame["metric"] == metric.name]
    where = "average" if (rows["dataset"] == "average").any() else rows["dataset"].iloc[0]
    data = "PHANTOM data" if "phantom" in rows["source"].iloc[0] else "real data"
    lines = [textwrap.shorten(f"{name}, {where}, {data}: {metric.title}", WIDTH)]
    for row in rows[rows["dataset"] == where].to_dict(orient="records"):
        value = f"{row['mean']:10.3f}" if row["mean"] < 1000 else f"{row['mean']:10,.0f}"
        spread = f" ± {row['sd']:.3f}" if row["sd"] == row["sd"] else ""
        ends = ""
        if row["ci_low"] == row["ci_low"]:
            ends = f"  [{row['ci_low']:.3f}, {row['ci_high']:.3f}]"
        sign = mark(row, lower_is_better=metric.lower_is_better)
        lines.append(f"  {row['method']:32}{value}{spread}{ends}{sign}")
    return "\n".join(lines)


def frame_text(frame: "pd.DataFrame") -> str:
    return frame.to_string(index=False, float_format="{:.4f}".format)
