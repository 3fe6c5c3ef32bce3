"""Everything that the records of a suite are rendered as, and writing it."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from bench.report.answers import Answers
from bench.report.figures import draw
from bench.report.official import write_official
from bench.report.page import page
from bench.report.table import csv_text, tabulate
from bench.runs.records import Record
from bench.suite import suite
from vitask.files import write_text


def render(folder: Path, records: Sequence[Record]) -> tuple[dict[str, str], pd.DataFrame]:
    """File name -> text of a suite's table, page and figures; and the long table."""
    of = suite(records[0].suite)
    answers = Answers.read(folder, records, of)
    frame = tabulate(records, answers)
    figures = {chart.file: draw(chart, frame, records, of) for chart in of.charts}
    text = page(frame, records, of, figures, of.sections(records, answers))
    return {f"{of.name}.csv": csv_text(frame), f"{of.name}.md": text, **figures}, frame


def write(folder: Path, records: Sequence[Record]) -> tuple[list[Path], pd.DataFrame]:
    """Render and write; returns the files and the long table."""
    texts, frame = render(folder, records)
    for file, text in texts.items():
        write_text(folder / file, text)
    return [*(folder / file for file in texts), *write_official(folder, records)], frame
