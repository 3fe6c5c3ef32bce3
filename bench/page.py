"""The Markdown page of a suite: tables of its CSV, what is published beside it, what made it."""

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from bench.record import Record
from bench.suites import Suite, images_of, reference_of, suite

TABLES = {
    "macro_f1": "Macro-F1 over the fixed label set, by constrained scoring",
    "accuracy": "Accuracy, by constrained scoring",
    "auc": "AUC, as MedMNIST's evaluator computes it",
    "balanced_accuracy": "Balanced accuracy",
    "ece": "Expected calibration error (15 bins; lower is better)",
    "qwk": "Quadratic weighted kappa",
    "gen_macro_f1": "Generated answers: macro-F1 (secondary)",
    "gen_invalid": "Generated answers: share of invalid ones, counted as wrong, never guessed",
}
ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
    autoescape=False,
)
LOWER_IS_BETTER = ("ece", "gen_invalid", "overlap", "negative", "lost", "be", "rbe")
SIGNIFICANT = 0.05
SMALL_TEST = 500  # images; below, a row is flagged
MOST_COLUMNS = 8  # of a table; with more methods each is a line


def page(
    frame: pd.DataFrame,
    records: Sequence[Record],
    root: Path,
    figures: Collection[str] = (),
    sections: Sequence[tuple[str, str]] = (),
) -> str:
    """Text of the page; the same records give the same bytes.

    figures: names of its SVG files; sections: (title, Markdown) of further tables
    """
    first = records[0]
    module = suite(first.suite)
    sources = {card["source"] for card in first.data.values()}
    titles = getattr(module, "TABLES", TABLES)
    tables = [
        (title, _table(frame, metric, list(module.METHODS))) for metric, title in titles.items()
    ]
    return ENVIRONMENT.get_template("suite.md").render(
        suite=first.suite,
        about=(module.__doc__ or "").strip(),
        phantom="phantom" in sources,
        recipe=first.recipe,
        record=first,
        commands=_distinct(record.command for record in records),
        commits=_distinct(record.commit for record in records),
        hardware=_distinct(_listed(record.hardware) for record in records),
        seeds=sorted({record.seed for record in records}),
        methods=module.METHODS,
        references={method: reference_of(module, method) for method in module.METHODS},
        reference=_reference(module),
        intervals=bool(frame["ci_low"].notna().any()),
        scored=bool((frame["metric"] == "macro_f1").any()),
        tables=[(title, table) for title, table in [*tables, *sections] if table],
        figures=sorted(figures),
        unverified=_named(module, first, lambda card: not card["md5_ok"]),
        small=_named(module, first, lambda card: card["images"]["test"] < SMALL_TEST),
        coverage={n: c["coverage"] for r in records for n, c in r.candidates.items()},
        published_note=module.PUBLISHED_NOTE,
        published=_published(module.PUBLISHED, root),
        recipe_json=json.dumps(first.recipe, indent=1),
        limit=first.plan["limit"],
    )


def _distinct(texts: Iterable[str]) -> list[str]:
    """Each once, in their order: seeds may come of several commands, at several commits."""
    return list(dict.fromkeys(texts))


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _reference(module: Suite) -> str:
    """What the marks compare with, in words; empty without a comparison."""
    if isinstance(module.REFERENCE, str):
        return f"`{module.REFERENCE}`"
    return "the method named beside each method" if module.REFERENCE else ""


def _named(module: Suite, record: Record, holds: Callable[[dict[str, Any]], bool]) -> list[str]:
    """Scored sets of which something holds, those of the same images once."""
    shown = dict.fromkeys(images_of(module, name) for name in record.data)
    return [name for name in shown if name in record.data and holds(record.data[name])]


def _table(frame: pd.DataFrame, metric: str, methods: Sequence[str]) -> str:
    """Markdown: a line a dataset, a column a method, turned round for many methods; empty text
    if nobody has the metric."""
    rows = frame[frame["metric"] == metric]
    methods = [method for method in methods if (rows["method"] == method).any()]
    datasets = rows["dataset"].unique().tolist()
    cells = {(row["dataset"], row["method"]): _cell(row) for row in rows.to_dict(orient="records")}
    if not cells:
        return ""
    wide = len(methods) <= MOST_COLUMNS
    down, across = (datasets, methods) if wide else (methods, datasets)
    corner = "dataset" if wide else "method"
    lines = [f"| {corner} | " + " | ".join(across) + " |", "|---" * (len(across) + 1) + "|"]
    for one in down:
        line = [cells.get((one, m) if wide else (m, one), "–") for m in across]
        lines.append(f"| {one} | " + " | ".join(line) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    if pd.isna(row["mean"]):
        return "–"
    if abs(row["mean"]) >= 1000:
        return f"{row['mean']:,.0f}"
    text = f"{row['mean']:.3f}"
    if not pd.isna(row["sd"]):
        text += f" ± {row['sd']:.3f}"
    if not pd.isna(row["ci_low"]):
        text += f" [{row['ci_low']:.3f}, {row['ci_high']:.3f}]"
    if not pd.isna(row["p_holm"]) and row["p_holm"] < SIGNIFICANT:
        better = (row["diff_to_vanilla"] > 0) != (row["metric"] in LOWER_IS_BETTER)
        text += " ▲" if better else " ▼"
    return text


def _published(name: str | None, root: Path) -> str:
    """A published table as Markdown, apart from our own."""
    if name is None:
        return ""
    path = root / "leaderboards" / "published" / name
    if not path.is_file():
        return f"({path.name} is not there: published tables come with the repository)"
    table = pd.read_csv(path, dtype=str).fillna("–")
    lines = ["| " + " | ".join(table.columns) + " |", "|---" * len(table.columns) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in table.itertuples(index=False, name=None)]
    return "\n".join(lines)
