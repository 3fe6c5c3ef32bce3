"""`bench.run`: what the command line calls, and a notebook."""

import os
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.errors import of_the_machine, told
from bench.report import render
from bench.runs import sets
from bench.runs.environment import command_line
from bench.runs.job import run_job
from bench.runs.plan import Job, Plan, sized
from bench.runs.progress import Progress
from bench.suite import SUITES, suite
from vitask import settings as recipe_settings
from vitask.data import spec
from vitask.errors import InputError
from vitask.guard import refuse_hub_kernels
from vitask.recipes import RECIPES, Recipe, check_seeds
from vitask.recipes import recipe as named_recipe

if TYPE_CHECKING:
    import pandas as pd

ALL = "all"


@dataclass
class Run:
    """What a run left.

    folder:   records, samples and pages
    tables:   suite -> its long table, one row per dataset, method and metric
    pages:    suite -> its Markdown page
    computed: suite -> records that were computed now; 0 if all were found
    failed:   suite -> why it failed
    """

    folder: Path
    tables: "dict[str, pd.DataFrame]" = field(default_factory=dict)
    pages: dict[str, Path] = field(default_factory=dict)
    computed: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def run(
    suites: Sequence[str] | str = ALL,
    *,
    recipe: str | Path | Recipe = "pocket",
    settings: Mapping[str, Any] | None = None,
    data: str = "phantom",
    data_root: Iterable[str | Path] = (),
    datasets: Iterable[str] = (),
    seeds: Iterable[int] = (),
    limit: int | None = None,
    allow_unverified: Iterable[str] = (),
    out: str | Path = "leaderboards",
    fresh: bool = False,
    command: str = "",
    note: Callable[[str], None] = print,
) -> Run:
    """Train, score, write records and tables; results that exist are kept.

    suites:   names, or "all" for every suite that can run here
    recipe:   a name, a TOML file, or a Recipe
    settings: fields of the recipe to change, in studies too
    datasets, seeds: empty for the recipe's
    limit:    at most so many images of each split
    fresh:    first delete these suites' results and the models made for them

    Equal ingredients are not computed again; other seeds and suites are added to the folder. A
    suite that fails does not stop the others: see `Run.failed`. ValueError for a request that
    cannot be met, before anything is computed.
    """
    for name, given in {"datasets": datasets, "data_root": data_root}.items():
        if isinstance(given, str):
            raise InputError(f"{name} is {given!r}; expected a list, such as [{given!r}]")
    numbers = tuple(seeds)
    check_seeds("seeds", numbers)
    by_hand, in_file = dict(settings or {}), dict[str, Any]()
    if isinstance(recipe, Path) or (isinstance(recipe, str) and recipe.endswith(".toml")):
        base, in_file = recipe_settings.read(Path(recipe))
        if base.name in RECIPES:
            raise InputError(
                f"{recipe} has the name of a recipe; rename it, {base.name}-2.toml, say"
            )
    else:
        base = named_recipe(recipe) if isinstance(recipe, str) else recipe
    base, roots = recipe_settings.apply(base, by_hand), tuple(map(Path, data_root))
    own, chosen, allowed = base.datasets(data), set(datasets), tuple(allow_unverified)
    names = (*(n for n in own if n in chosen), *sorted(chosen - set(own))) if chosen else own
    for name in (*names, *allowed):
        spec(name, roots=roots)
    plan = Plan(
        base, data, names, roots, allowed, limit, Path(out), tuple(sorted(set(numbers))),
        settings=in_file | by_hand, by_hand=by_hand,
    )  # fmt: skip
    wanted = [suites] if isinstance(suites, str) else list(dict.fromkeys(suites))
    wanted = list(SUITES) if suites == ALL else wanted
    return run_plan(plan, wanted, fresh=fresh, leave_out=suites == ALL, command=command, note=note)


def run_plan(
    plan: Plan,
    wanted: Sequence[str],
    *,
    fresh: bool = False,
    leave_out: bool = False,
    command: str = "",
    note: Callable[[str], None] = print,
) -> Run:
    """Suite by suite. leave_out: suites that lack something here are left out, not failed."""
    from transformers.utils import logging

    refuse_hub_kernels()
    check_out(plan.out, plan.folder)
    logging.disable_progress_bar()  # one progress display is enough: ours
    done = Run(plan.folder)
    jobs: list[Job] = []  # all data and models are checked before anything runs
    loaded: dict[Any, Any] = {}  # data that suites share
    checked: set[Any] = set()  # their models
    for name in wanted:
        of = suite(name)
        own = sized(plan, of)
        if leave_out and (lacks := of.lacking(own)):
            note(f"{name} is left out: {lacks}")
            continue
        try:
            job = Job.of(of, own, loaded)
            job.check_models(checked)
            for text in job.notes:
                note(text)
            jobs.append(job)
        except Exception as error:  # of one suite's own data, perhaps
            if len(wanted) == 1:
                raise
            done.failed[name] = described(error)
            note(f"{name} cannot run: {done.failed[name]}")
    if not jobs:
        return done
    units = sum(job.units * len(job.plan.seeds) + job.judging_units for job in jobs)
    cache: dict[Any, Any] = {}  # what suites compute in common
    with sets.locked(plan.folder), Progress(units) as progress:
        if fresh:
            names = [job.suite.name for job in jobs]
            paths = sets.what_fresh_deletes(plan.folder, names)
            for path in paths:
                progress.note(f"--fresh deletes {path}")
            sets.delete(plan.folder, names, paths)
        for job in jobs:
            _run_job(job, done, progress, command or command_line(plan.roots, plan.out), cache)
    return done


def _run_job(job: Job, done: Run, progress: Progress, command: str, cache: Any) -> None:
    name = job.suite.name
    try:
        records, computed = run_job(job, done.folder, progress, command=command, cache=cache)
        if computed:
            progress.note(f"{name}: bootstrap, tests and tables")
        written, frame = render.write(done.folder, records)
        progress.advance(job.judging_units, f"{name}: tables", finished=computed > 0)
    except Exception as error:  # the other suites go on
        kept = "; what is complete was kept, the same command goes on"
        done.failed[name] = described(error) + (kept if of_the_machine(error) else "")
        return
    done.computed[name], done.tables[name] = computed, frame
    done.pages[name] = next(path for path in written if path.suffix == ".md")
    if computed:
        progress.note(f"{name}: wrote {', '.join(map(str, written))}")
    else:
        progress.note(f"{name}: nothing to compute, {len(records)} records found")


def check_out(out: Path, folder: Path | None = None) -> None:
    """ValueError, before anything is computed, if `out` or a run's folder cannot be written."""
    inner = ("records", "samples", "checkpoints", sets.UNFINISHED, sets.SUPERSEDED, sets.OFFICIAL)
    for place in (out, *([folder, *(folder / name for name in inner)] if folder else [])):
        try:
            while not place.exists() and place != place.parent:
                place = place.parent
            good = place.is_dir() and os.access(place, os.R_OK | os.W_OK | os.X_OK)
        except OSError:  # no access to a folder above it, or a name that is too long
            good = False
        if not good:
            raise InputError(f"--out {out}: cannot write to {place}; expected a folder to write to")


def described(error: Exception) -> str:
    """What went wrong, in a line; the trace of a fault of this project is printed."""
    if (text := told(error)) is not None:
        return text
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}"
