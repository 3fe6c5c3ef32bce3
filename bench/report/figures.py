"""Charts as SVG text: the same numbers give the same bytes."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from bench.report.page import ENVIRONMENT
from bench.runs.records import Record
from bench.suite import Chart, Suite

WIDTH, ROW, LEFT, RIGHT = 760, 22, 230, 70  # pixels


def draw(chart: Chart, frame: pd.DataFrame, records: Sequence[Record], suite: Suite) -> str:
    """A suite's figure as SVG text."""
    phantom = any(card["source"] == "phantom" for card in records[0].data.values())
    title = f"{chart.title}{' — PHANTOM data' if phantom else ''}"
    if chart.kind == "bars":
        return bars(frame, suite.metrics[0].name, [m.name for m in suite.methods], title)
    return densities(_panels(records), title)


def _panels(records: Sequence[Record]) -> list[tuple[str, list[float], list[float]]]:
    """A panel per method: the first seed's values, pooled over datasets."""
    first, panels = min(record.seed for record in records), []
    for record in (r for r in records if r.seed == first):
        sides = [card["values"] for card in record.items.values()]
        positive, negative = (
            [v for side in sides for v in side[name]] for name in ("positive", "negative")
        )
        panels.append((record.method, positive, negative))
    return panels


def bars(frame: pd.DataFrame, metric: str, methods: Sequence[str], title: str) -> str:
    """A bar with its interval per method: the average over datasets, or the only dataset."""
    rows = frame[frame["metric"] == metric]
    dataset = "average" if (rows["dataset"] == "average").any() else rows["dataset"].iloc[0]
    rows = rows[rows["dataset"] == dataset].set_index("method")
    shown = [method for method in methods if method in rows.index]
    scale = (WIDTH - LEFT - RIGHT) / max(1e-9, float(rows["ci_high"].max()))
    found = [
        {
            "name": method,
            "y": 34 + number * ROW,
            "width": round(float(rows.loc[method, "mean"]) * scale, 1),
            "low": round(LEFT + float(rows.loc[method, "ci_low"]) * scale, 1),
            "high": round(LEFT + float(rows.loc[method, "ci_high"]) * scale, 1),
            "value": f"{rows.loc[method, 'mean']:.3f}",
        }
        for number, method in enumerate(shown)
    ]
    return ENVIRONMENT.get_template("bars.svg").render(
        title=title,
        width=WIDTH, height=44 + ROW * len(shown), left=LEFT, bars=found, dataset=dataset,
    )  # fmt: skip


def densities(panels: Sequence[tuple[str, Sequence[float], Sequence[float]]], title: str) -> str:
    """A panel per (name, positive, negative): two histograms from 0 to 1 with 40 bins."""
    bins, wide, high, step = 40, 220, 120, 250
    drawn = []
    for number, (name, *sides) in enumerate(panels):
        x = 20 + number * step
        heights = [np.histogram(values, bins, (0, 1))[0] / max(len(values), 1) for values in sides]
        top, edges = np.max(heights) or 1.0, np.round(x + wide * np.arange(bins + 1) / bins, 1)
        shapes = []
        for values in heights:
            levels = np.round(40 + high * (1 - values / top), 1)
            corners = zip(edges.repeat(2)[1:-1], levels.repeat(2), strict=True)
            points = [(x, 40 + high), *corners, (x + wide, 40 + high)]
            shapes.append(" ".join(f"{across},{down}" for across, down in points))
        drawn.append({"name": name, "x": x, "shapes": shapes})
    return ENVIRONMENT.get_template("densities.svg").render(
        title=title, panels=drawn, width=20 + step * len(panels), high=high, wide=wide
    )
