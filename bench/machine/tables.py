"""Runs a machine suite and writes its table: OUT/<suite>/<device>.csv, .md and .json."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from bench.machine.speed import device_name, slug
from bench.report.page import ENVIRONMENT
from bench.runs.environment import commit, hardware, versions
from bench.suite import Measured, machine_suite
from vitask.files import write_text

LIBRARIES = ("torch", "triton", "transformers", "peft", "liger-kernel", "cut-cross-entropy")


@dataclass(frozen=True)
class Aim:
    """A ratio to reach at every row count or batch of a shape; the worst one counts.

    ours:   an implementation or variant
    theirs: those it is compared with, of which the best counts; none: the quantity itself counts
    where:  column -> value of the rows that count
    most:   ours / theirs must be at most `aim`; otherwise theirs / ours must be at least `aim`
    """

    text: str
    ours: str
    theirs: tuple[str, ...]
    aim: float
    where: Mapping[str, Any]
    quantity: str = "milliseconds"
    most: bool = False
    least_rows: int = 0

    def check(self, frame: pd.DataFrame, names: str, sizes: str) -> tuple[str, str, bool | None]:
        """(text, result, whether the aim is reached; None if not measured)"""
        for column, value in {**self.where, "quantity": self.quantity}.items():
            frame = frame[frame[column] == value]
        frame = frame[frame[sizes] >= self.least_rows]
        values = frame.pivot_table(index=sizes, columns=names, values="value")
        theirs = [name for name in self.theirs if name in values]
        if self.ours not in values or len(theirs) < bool(self.theirs):
            return self.text, "–", None
        best = values[theirs].min(axis=1) if theirs else 1.0
        ratios = values[self.ours] / best if self.most or not theirs else best / values[self.ours]
        worst = float(ratios.max() if self.most else ratios.min())
        return self.text, f"{worst:.2f}", worst <= self.aim if self.most else worst >= self.aim


def check(
    aims: Sequence[Aim], rows: list[dict[str, Any]], names: str, sizes: str
) -> list[tuple[str, str, bool | None]]:
    """Every aim's result; names, sizes: the columns of implementations and of row counts."""
    frame = pd.DataFrame(rows)
    return [aim.check(frame, names, sizes) for aim in aims]


def run_machine_suite(
    name: str, out: Path, *, command: str, note: Callable[[str], None], trace: Path | None = None
) -> list[Path]:
    """Measure, and rewrite the three files as results come in; returns their paths."""
    suite = machine_suite(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    no_gpu = f"not measured: this machine has no GPU; run `python -m bench run {name}` on one"
    lacking = {} if device == "cuda" else {"CUDA": no_gpu}
    place = out / name / slug(device_name())
    written: list[Path] = []
    for measured in suite.measure(device, note, trace):
        stamp = {
            "suite": name,
            "device": device_name(),
            "command": command,
            "commit": commit(),
            "versions": versions(LIBRARIES),
            "hardware": hardware(),
            "missing": {**measured.missing, **lacking},
            "targets": measured.targets,
            "notes": measured.notes,
        }
        texts = {
            ".csv": pd.DataFrame(measured.rows, columns=list(suite.columns)).to_csv(
                index=False, float_format="%.6g", lineterminator="\n"
            ),
            ".md": _page(suite.about, measured, stamp),
            ".json": json.dumps(stamp, indent=1) + "\n",
        }
        written = [place.with_name(place.name + ending) for ending in texts]
        for path, text in zip(written, texts.values(), strict=True):
            write_text(path, text)
    return written


def _page(about: str, measured: Measured, stamp: dict[str, Any]) -> str:
    words = {True: "reached", False: "missed", None: "not measured"}
    return ENVIRONMENT.get_template("machine.md").render(
        about=about.strip(),
        stamp=stamp,
        tables=[
            (title, rows[0].get("caption", ""), *_table(rows))
            for title, rows in _tables(measured.rows).items()
        ],
        targets=[(aim, found, words[reached]) for aim, found, reached in measured.targets],
    )


def _tables(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Title -> rows, a table per shape and operation."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if "shape" in row:
            title = f"{row['shape']}, batch {row['batch']}, {row['dtype']}"
        else:
            sizes = f"{row['rows']} rows × {row['hidden']} hidden × {row['vocab']} vocabulary"
            title = f"{row['operation']}: {sizes}, {row['dtype']}"
        found.setdefault(title, []).append(row)
    return found


def _table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and lines of Markdown: a line per variant, a column per quantity."""
    name = "variant" if "variant" in rows[0] else "implementation"

    def column(row: dict[str, Any]) -> str:
        return f"{row['quantity']}, {row['pass']}" if "pass" in row else row["quantity"]

    columns = list(dict.fromkeys(column(row) for row in rows))
    lines = []
    for variant in dict.fromkeys(row[name] for row in rows):
        mine = {column(row): row for row in rows if row[name] == variant}
        lines.append([variant, *(_cell(mine.get(c)) for c in columns)])
    return [name, *columns], lines


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    if row["low"] is None or row["low"] == row["high"]:
        return f"{row['value']:.4g}"
    return f"{row['value']:.4g} [{row['low']:.4g}, {row['high']:.4g}]"
