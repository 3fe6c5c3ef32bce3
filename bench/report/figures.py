"""Charts as SVG text: the same numbers give the same bytes."""

from collections.abc import Sequence

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
    """The first seed's distributions, all datasets together, a panel a method."""
    first, panels = min(record.seed for record in records), []
    for record in (r for r in records if r.seed == first):
        sides = [card["values"] for card in record.items.values()]
        positive, negative = (
            [v for side in sides for v in side[name]] for name in ("positive", "negative")
        )
        panels.append((record.method, positive, negative))
    return panels


def bars(frame: pd.DataFrame, metric: str, methods: Sequence[str], title: str) -> str:
    """A bar a method, with its interval: the average over the datasets, or the only one."""
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
    """A panel for each (name, positive, negative): two histograms over 0 to 1, 40 bins each."""
    bins, wide, high, step = 40, 220, 120, 250
    drawn = []
    for number, (name, *sides) in enumerate(panels):
        shapes = []
        heights = [_histogram(values, bins) for values in sides]
        top = max(max(h) for h in heights) or 1.0
        for values in heights:
            points = [f"{20 + number * step},{40 + high}"]
            for at, value in enumerate(values):
                level = round(40 + high * (1 - value / top), 1)
                left = round(20 + number * step + wide * at / bins, 1)
                right = round(20 + number * step + wide * (at + 1) / bins, 1)
                points += [f"{left},{level}", f"{right},{level}"]
            points.append(f"{20 + number * step + wide},{40 + high}")
            shapes.append(" ".join(points))
        drawn.append({"name": name, "x": 20 + number * step, "shapes": shapes})
    return ENVIRONMENT.get_template("densities.svg").render(
        title=title, panels=drawn, width=20 + step * len(panels), high=high, wide=wide
    )


def _histogram(values: Sequence[float], bins: int) -> list[float]:
    counts = [0.0] * bins
    for value in values:
        counts[min(int(value * bins), bins - 1)] += 1
    return [count / max(len(values), 1) for count in counts]
