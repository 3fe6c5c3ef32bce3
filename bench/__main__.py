"""The command line: python -m bench run main, list, report, verify, data, doctor, predict.

Nothing heavy is imported before it is needed, so `--help` and `list` answer at once.
"""

import traceback
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bench.cli import (
    FAILED,
    Out,
    Roots,
    UnknownName,
    Unverified,
    check_known,
    clean,
    data_folders,
    is_our_error,
    must_resolve,
    split_names,
    stop,
)
from bench.data_commands import data_app

if TYPE_CHECKING:
    from bench.plan import Plan
    from bench.record import Record
    from vitask.data.spec import Dataset

app = typer.Typer(
    help="VITask: train, measure and compare, from data to leaderboard.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(data_app, name="data")


@app.command()
@clean
def run(
    suites: Annotated[list[str] | None, typer.Argument(help="Suites; see `list`.")] = None,
    all_suites: Annotated[bool, typer.Option("--all", help="Every suite.")] = False,
    recipe: Annotated[str, typer.Option(help="A named experiment; see `list`.")] = "pocket",
    data: Annotated[str, typer.Option(help="phantom | medmnist")] = "phantom",
    data_root: Roots = None,
    datasets: Annotated[str, typer.Option(help="a,b,...; default: the recipe's own.")] = "",
    seeds: Annotated[str, typer.Option(help="0,1,...; default: the recipe's own.")] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="At most N images a part.")] = None,
    out: Out = Path("leaderboards"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what a finished run of the same key has.")
    ] = False,
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Throw away what these suites left there, and all models."),
    ] = False,
    allow_unverified: Unverified = "",
    trace: Annotated[
        Path | None, typer.Option(help="With suite step: a torch.profiler trace goes here.")
    ] = None,
) -> None:
    """Run suites. A run that was interrupted continues; its results are on disk as they come.

    `--all` runs what scores models; `kernels` and `step` measure this machine and are run by name.
    """
    from bench.suites import MACHINE_SUITES, SUITES
    from vitask.data import SOURCES, spec
    from vitask.guard import refuse_hub_kernels
    from vitask.recipes import RECIPES

    if all_suites == bool(suites):
        raise UnknownName("name the suites to run, or give --all (one of the two)")
    if resume and fresh:
        raise UnknownName("--resume keeps and --fresh throws away: give one of them")
    wanted = list(SUITES) if all_suites else list(dict.fromkeys(suites or []))
    for name in wanted:
        check_known("suite", name, (*SUITES, *MACHINE_SUITES))
    for name in [name for name in wanted if name in MACHINE_SUITES]:
        _measure(name, out, trace)
        wanted.remove(name)
    if not wanted:
        return
    check_known("recipe", recipe, RECIPES)
    check_known("data source", data, SOURCES)
    roots, chosen = data_folders(data_root), RECIPES[recipe]
    own = chosen.datasets(data)
    names = _in_order(split_names(datasets) or own, own)
    must_resolve(
        lambda: [spec(name, roots=roots) for name in (*names, *split_names(allow_unverified))]
    )
    refuse_hub_kernels()

    from bench.plan import Plan

    plan = Plan(
        recipe=chosen,
        source=data,
        names=names,
        roots=roots,
        allow_unverified=split_names(allow_unverified),
        limit=limit,
        out=out,
        seeds=_seeds(seeds) if seeds else (),
    )
    failed = _run(wanted, plan, resume=resume, fresh=fresh, leave_out=all_suites)
    for name, error in failed.items():
        typer.echo(f"failed: {name}: {error}", err=True)
    if failed:
        raise typer.Exit(FAILED)


def _measure(name: str, out: Path, trace: Path | None) -> None:
    """A suite that measures this machine; it needs no data, recipe or seed."""
    from bench.machine import run_machine_suite
    from bench.record import command_line

    def note(text: str) -> None:
        typer.echo(text, err=True)

    command = command_line((), out)
    try:
        written = run_machine_suite(name, out, command=command, note=note, trace=trace)
    except KeyboardInterrupt:
        stop(f"{name}: interrupted; its tables hold what was measured so far", FAILED)
    note(f"{name}: wrote {', '.join(map(str, written))}")


def _run(
    wanted: Sequence[str], plan: "Plan", *, resume: bool, fresh: bool, leave_out: bool = False
) -> dict[str, str]:
    """Suite by suite; one that fails does not take the others down. Returns what failed.

    leave_out: suites that lack something here are left out, and that is no failure
    """
    from transformers.utils import logging

    from bench import runs, table
    from bench.official import write_official
    from bench.plan import Job, sized, specs_of
    from bench.progress import Progress, Scaled
    from bench.record import command_line
    from bench.suites import lacking, suite

    logging.disable_progress_bar()  # one progress display is enough: ours
    failed: dict[str, str] = {}
    jobs: list[Job] = []  # all data are checked before anything runs
    loaded: dict[Any, Any] = {}  # data that suites share
    for name in wanted:
        if leave_out and (lacks := lacking(suite(name), plan)):
            typer.echo(f"{name} is left out: {lacks}", err=True)
            continue
        try:
            jobs.append(Job.of(name, sized(plan, suite(name)), loaded))
        except Exception as error:  # of one suite's own data, perhaps
            if len(wanted) == 1:
                raise
            failed[name] = _described(error)
    if not jobs:
        return failed
    cache: dict[Any, Any] = {}  # what suites compute in common
    units = sum(job.units * len(job.plan.seeds) for job in jobs)
    for name, why in failed.items():
        typer.echo(f"{name} cannot run: {why}", err=True)
    with runs.locked(plan.folder), Progress(units) as progress:
        if fresh:
            runs.start_over(plan.folder, [job.name for job in jobs])
        keys = {job.name: runs.run_key(job) for job in jobs}
        stopped = runs.unfinished(plan.folder)
        runs.note_unfinished(plan.folder, keys)
        for job in jobs:
            scaled = Scaled(progress, job.units / job.module.units(job.plan.recipe))
            try:
                records = runs.run_suite(
                    job,
                    plan.folder,
                    scaled,
                    command=command_line(plan.roots, plan.out),
                    resume=resume or stopped.get(job.name) == keys[job.name],
                    cache=cache,
                )
                progress.note(f"{job.name}: bootstrap, tests and tables")
                written = table.write(plan.folder, records, specs_of(records[0]))
                write_official(plan.folder, records)
            except Exception as error:  # the other suites go on
                failed[job.name] = _described(error)
                continue
            progress.note(f"{job.name}: wrote {', '.join(map(str, written))}")
        if not failed:
            runs.note_unfinished(plan.folder, dict.fromkeys(keys))
    return failed


def _described(error: Exception) -> str:
    """What went wrong, in a line; the trace of what is not our own boundary's is printed."""
    if not is_our_error(error):
        traceback.print_exception(error)
    return f"{type(error).__name__}: {error}"


@app.command("list")
@clean
def show(data_root: Roots = None) -> None:
    """Suites with their methods, recipes and datasets."""
    from bench.suites import MACHINE_SUITES, SUITES, suite
    from vitask.data import specs
    from vitask.recipes import RECIPES

    roots = data_folders(data_root)
    typer.echo("suites")
    for name in SUITES:
        module = suite(name)
        about = (module.__doc__ or "").strip().splitlines()
        typer.echo(f"  {name}: {about[0] if about else ''}")
        for method, what in module.METHODS.items():
            typer.echo(f"    {method:20} {what}")
    typer.echo("suites that measure this machine (by name, not in --all)")
    for name, text in MACHINE_SUITES.items():
        typer.echo(f"  {name}: {text}")
    typer.echo("recipes")
    for recipe in RECIPES.values():
        typer.echo(
            f"  {recipe.name:20} VLM {recipe.vlm}, TSM {recipe.tsm}, {recipe.source_size} px"
        )
    typer.echo("datasets (the first 12 also as phantom)")
    for spec in specs("medmnist", roots).values():
        kind = f"{len(spec.classes)} classes, {spec.task}"
        typer.echo(f"  {spec.name:20} {spec.modality}, {kind}, {spec.license}")


@app.command()
@clean
def report(
    folders: Annotated[list[Path] | None, typer.Argument(help="Runs; default: all.")] = None,
    out: Out = Path("leaderboards"),
) -> None:
    """Render tables and pages again from the records and samples; needs no data."""
    from bench import runs, table
    from bench.official import write_official
    from bench.plan import specs_of

    broken: list[str] = []
    for folder in _runs(folders, out):
        with runs.locked(folder):
            for records in _suites(folder, broken):
                written = table.write(folder, records, specs_of(records[0]))
                for path in [*written, *write_official(folder, records)]:
                    typer.echo(str(path))
    _fail_for(broken)


@app.command()
@clean
def verify(
    folders: Annotated[list[Path] | None, typer.Argument(help="Runs; default: all.")] = None,
    data_root: Roots = None,
    out: Out = Path("leaderboards"),
    allow_unverified: Unverified = "",
) -> None:
    """Score again from the per-sample files and the data's labels; exit 1 on any difference."""
    from bench.plan import Job, plan_of
    from bench.verify import differences, strays

    found: list[str] = []
    roots = data_folders(data_root)
    for folder in _runs(folders, out):
        loaded: dict[Any, dict[str, Dataset]] = {}
        for records in _suites(folder, found):
            name = records[0].suite
            try:
                plan = plan_of(
                    records[0],
                    roots=roots,
                    allow_unverified=split_names(allow_unverified),
                    folder=folder,
                )
                job = Job.of(name, plan, loaded)
                wrong = differences(folder, records, job.evaluated)
            except Exception as error:  # its data are not here, perhaps; the others still count
                found.append(f"{folder}: {name} was not verified: {_described(error)}")
                continue
            found += [f"{folder}: {text}" for text in wrong]
            count = f"{len(records)} record(s) of {name}"
            typer.echo(f"{folder}: {count}: {f'{len(wrong)} difference(s)' if wrong else 'ok'}")
        found += [f"{folder}: {text}" for text in strays(folder)]
    _fail_for(found)


@app.command()
@clean
def compare(
    method: Annotated[str, typer.Argument(help="A method of the suite.")],
    reference: Annotated[str, typer.Argument(help="The method it is compared with.")],
    folders: Annotated[list[Path] | None, typer.Argument(help="Runs; default: all.")] = None,
    suite: Annotated[str, typer.Option(help="Whose methods they are.")] = "main",
    out: Out = Path("leaderboards"),
) -> None:
    """Difference of two methods on the same images, with its interval and p-value."""
    from bench import compare as comparison
    from bench import runs
    from bench.suites import SUITES

    check_known("suite", suite, SUITES)
    found = [folder for folder in _runs(folders, out) if suite in runs.read_manifest(folder)]
    if not found:
        raise ValueError(f"no run of suite {suite!r} in {out}; run it first, or give --out")
    for folder in found:
        frame = comparison.compare(folder, runs.read_records(folder, suite), method, reference)
        typer.echo(f"{folder}: {method} against {reference}")
        typer.echo(frame.to_string(index=False, float_format="{:.4f}".format))


@app.command()
@clean
def doctor(data_root: Roots = None) -> None:
    """Look at versions, memory, accelerator and data roots; exit 1 if something is wrong."""
    from bench.doctor import examine

    findings = examine(data_root or ())
    for one in findings:
        mark = {True: "ok ", False: "BAD", None: "   "}[one.ok]
        typer.echo(f"{mark} {one.what}: {one.value}")
    if any(one.ok is False for one in findings):
        raise typer.Exit(FAILED)


@app.command()
@clean
def predict(
    checkpoint: Annotated[Path, typer.Argument(help="Folder that a run or save_pretrained wrote.")],
    folder: Annotated[Path, typer.Argument(help="Folder of images.")],
    dataset: Annotated[str | None, typer.Option(help="Whose question is asked.")] = None,
    exemplar: Annotated[
        bool | None,
        typer.Option(help="With or without the task-specific model; default: with, if there."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="CSV file; default: standard output.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images at a time; default: the recipe's.")
    ] = None,
) -> None:
    """Answers and class probabilities for a folder of images, as CSV.

    Exit code 1 if an image could not be read; its row says why.
    """
    from vitask.guard import refuse_hub_kernels

    refuse_hub_kernels()
    from bench.commands.predict import predict_folder

    try:
        unreadable = predict_folder(
            checkpoint,
            folder,
            dataset=dataset,
            exemplar=exemplar,
            output=output,
            batch_size=batch_size,
        )
    except KeyboardInterrupt:
        stop("interrupted; the same command starts again with the first image", FAILED)
    if unreadable:
        stop(f"{unreadable} image(s) could not be read; see the column error", FAILED)


def _runs(folders: Sequence[Path] | None, out: Path) -> list[Path]:
    found = list(folders or sorted(path.parent for path in out.glob("*/run.json")))
    for folder in found:
        if not (folder / "run.json").is_file():
            raise ValueError(f"{folder} holds no run (no run.json); expected OUT/<recipe>-<data>")
    if not found:
        raise ValueError(f"no run in {out}; start one with `python -m bench run`, or give --out")
    return found


def _suites(folder: Path, broken: list[str]) -> "Iterator[list[Record]]":
    """Each suite's records; a suite that lacks some is noted, and the others still count."""
    from bench import runs

    for name in runs.read_manifest(folder):
        try:
            records = runs.read_records(folder, name)
        except ValueError as error:
            broken.append(str(error))
            continue
        yield records


def _fail_for(found: Collection[str]) -> None:
    for text in found:
        typer.echo(text, err=True)
    if found:
        raise typer.Exit(FAILED)


def _seeds(text: str) -> tuple[int, ...]:
    given = split_names(text)
    if not given or not all(word.isdecimal() for word in given):
        raise UnknownName(f"--seeds is {text!r}; expected whole numbers such as 0,1,2")
    return tuple(sorted({int(word) for word in given}))


def _in_order(names: Collection[str], own: Sequence[str]) -> tuple[str, ...]:
    """The recipe's order first, so that the order on the command line decides nothing."""
    return (*(n for n in own if n in names), *sorted(n for n in names if n not in own))


if __name__ == "__main__":
    app(prog_name="python -m bench")
