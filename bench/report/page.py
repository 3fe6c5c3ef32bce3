"""The Markdown page of a suite: tables of its CSV, published numbers beside it, provenance."""

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from bench.errors import ROOT
from bench.runs.records import Record
from bench.suite import Suite, shown, table

ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
    autoescape=False,
)
ENVIRONMENT.filters["shown"] = shown
SIGNIFICANT = 0.05
SMALL_TEST = 500  # images; below, a row is flagged
MOST_COLUMNS = 8  # of a table; with more methods each is a line


def page(
    frame: pd.DataFrame,
    records: Sequence[Record],
    suite: Suite,
    figures: Collection[str] = (),
    sections: Sequence[tuple[str, str]] = (),
) -> str:
    """Text of the page; the same records give the same bytes.

    figures: names of its SVG files; sections: (title, Markdown) of further tables
    """
    first = records[0]
    tables = [(metric.title, _table(frame, suite, metric.name)) for metric in suite.metrics]
    references = {method.against for method in suite.methods if method.against}
    return ENVIRONMENT.get_template("suite.md").render(
        suite=suite,
        phantom=any(card["source"] == "phantom" for card in first.data.values()),
        recipe=first.recipe,
        record=first,
        commands=_distinct(record.command for record in records),
        commits=_distinct(record.commit for record in records),
        hardware=_distinct(_listed(record.hardware) for record in records),
        seeds=sorted({record.seed for record in records}),
        references=references,
        train_images=max(
            (card["images"]["train"] for card in first.trained_on.values()), default=0
        ),
        intervals=bool(frame["ci_low"].notna().any()),
        scored=bool((frame["metric"] == "macro_f1").any()),
        tables=[(title, text) for title, text in [*tables, *sections] if text],
        figures=sorted(figures),
        unverified=_named(suite, first, lambda card: not card["md5_ok"]),
        small=_named(suite, first, lambda card: card["images"]["test"] < SMALL_TEST),
        coverage={n: c["coverage"] for r in records for n, c in r.candidates.items()},
        published=_published(suite),
        recipe_json=json.dumps(first.recipe, indent=1),
        limit=first.plan["limit"],
    )


def _distinct(texts: Iterable[str]) -> list[str]:
    """Each once, in their order: seeds may come from several commands, at several commits."""
    return list(dict.fromkeys(texts))


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _named(suite: Suite, record: Record, holds: Callable[[dict[str, Any]], bool]) -> list[str]:
    """Scored datasets with a property; datasets of the same images once."""
    images = dict.fromkeys(suite.images_of(name) for name in record.data)
    return [name for name in images if name in record.data and holds(record.data[name])]


def _table(frame: pd.DataFrame, suite: Suite, metric: str) -> str:
    """Markdown: a line a dataset, a column a method, turned round for many methods; empty text
    if nobody has the metric."""
    rows = frame[frame["metric"] == metric]
    methods = [m.name for m in suite.methods if (rows["method"] == m.name).any()]
    datasets = rows["dataset"].unique().tolist()
    lower_is_better = suite.metric(metric).lower_is_better
    cells = {
        (row["dataset"], row["method"]): _cell(row, lower_is_better=lower_is_better)
        for row in rows.to_dict(orient="records")
    }
    if not cells:
        return ""
    wide = len(methods) <= MOST_COLUMNS
    down, across = (datasets, methods) if wide else (methods, datasets)
    lines = [[shown(one), *(cells.get((one, m) if wide else (m, one), "–") for m in across)]
             for one in down]  # fmt: skip
    return table(["dataset" if wide else "method", *map(shown, across)], lines)


def _cell(row: dict[str, Any], *, lower_is_better: bool) -> str:
    if pd.isna(row["mean"]):
        return "–"
    if abs(row["mean"]) >= 1000:
        return f"{row['mean']:,.0f}"
    text = f"{row['mean']:.3f}"
    if not pd.isna(row["sd"]):
        text += f" ± {row['sd']:.3f}"
    if not pd.isna(row["ci_low"]):
        text += f" [{row['ci_low']:.3f}, {row['ci_high']:.3f}]"
    return text + mark(row, lower_is_better=lower_is_better)


def mark(row: Mapping[str, Any], *, lower_is_better: bool) -> str:
    """▲ better, ▼ worse than the reference; empty without a significant difference."""
    if pd.isna(row["p"]) or row["p"] >= SIGNIFICANT:
        return ""
    return " ▲" if (row["difference"] > 0) != lower_is_better else " ▼"


def _published(suite: Suite) -> str:
    """A published table as Markdown, apart from our own."""
    if suite.published is None:
        return ""
    path = ROOT / "leaderboards" / "published" / suite.published.file
    if not path.is_file():
        return f"({path.name} is missing: published tables come with the repository)"
    found = pd.read_csv(path, dtype=str).fillna("–")
    return table(list(found.columns), found.itertuples(index=False, name=None))
