"""The Markdown page of a suite: tables of its CSV, what is published beside it, what made it."""

import json
from collections.abc import Sequence
from pathlib import Path

import jinja2
import pandas as pd

from bench.record import Record
from bench.suites import suite

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
LOWER_IS_BETTER = ("ece", "gen_invalid")
SIGNIFICANT = 0.05


def page(frame: pd.DataFrame, records: Sequence[Record], root: Path) -> str:
    """Text of the page; the same records give the same bytes."""
    first = records[0]
    module = suite(first.suite)
    sources = {card["source"] for card in first.data.values()}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,
    )
    tables = [
        (title, _table(frame, metric, list(module.METHODS))) for metric, title in TABLES.items()
    ]
    return environment.get_template("suite.md").render(
        suite=first.suite,
        about=(module.__doc__ or "").strip(),
        phantom="phantom" in sources,
        recipe=first.recipe,
        record=first,
        seeds=sorted({record.seed for record in records}),
        methods=module.METHODS,
        reference=module.REFERENCE,
        tables=[(title, table) for title, table in tables if table],
        unverified=[name for name, card in first.data.items() if not card["md5_ok"]],
        small=[n for n, card in first.data.items() if card["images"]["test"] < 500],
        coverage={n: c["coverage"] for r in records for n, c in r.candidates.items()},
        published_note=module.PUBLISHED_NOTE,
        published=_published(module.PUBLISHED, root),
        recipe_json=json.dumps(first.recipe, indent=1),
        limit=next(iter(first.data.values()))["limit"],
    )


def _table(frame: pd.DataFrame, metric: str, methods: Sequence[str]) -> str:
    """Markdown: a line a dataset, a column a method; empty text if nobody has the metric."""
    rows = frame[frame["metric"] == metric]
    if rows.empty:
        return ""
    methods = [method for method in methods if (rows["method"] == method).any()]
    lines = ["| dataset | " + " | ".join(methods) + " |", "|---" * (len(methods) + 1) + "|"]
    for dataset in rows["dataset"].unique():
        cells = []
        for method in methods:
            row = rows[(rows["dataset"] == dataset) & (rows["method"] == method)]
            cells.append(_cell(row.iloc[0]) if len(row) else "–")
        name = f"**{dataset}**" if dataset == "average" else dataset
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: pd.Series) -> str:
    if pd.isna(row["mean"]):
        return "–"
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
