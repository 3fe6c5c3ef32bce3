"""The command line: python -m bench run main, list, report, verify, data, doctor, predict.

It only parses. Heavy imports wait until they are needed, so `--help` and `list` answer at once.
"""

import sys
from collections.abc import Collection, Iterator, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bench.commands.cli import (
    FAILED,
    Datasets,
    Out,
    Roots,
    UnknownName,
    Unverified,
    check_known,
    clean,
    data_folders,
    must_resolve,
    split_names,
    stop,
)  # fmt: skip
from bench.commands.data import data_app
from bench.suite import MACHINE_SUITES, SUITES
from vitask.errors import InputError

if TYPE_CHECKING:
    from bench.runs.records import Record
    from vitask.data.spec import Dataset

app = typer.Typer(
    help="VITask: train, measure and compare, from data to leaderboard.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(data_app, name="data")
RecipeName = Annotated[str, typer.Option(help="A name (see `list`) or a TOML file.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="field=value of the recipe; may be given several times."),
]


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    for stream in (sys.stdout, sys.stderr):  # a locale without "±" stops no command
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"vitask {installed('vitask')}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command(epilog=f"Suites: {', '.join(SUITES)}; of this machine: {', '.join(MACHINE_SUITES)}.")
@clean
def run(
    suites: Annotated[list[str] | None, typer.Argument(help="Names of suites.")] = None,
    all_suites: Annotated[bool, typer.Option("--all", help="Every suite that can run.")] = False,
    recipe: RecipeName = "pocket",
    settings: Settings = None,
    data: Annotated[str, typer.Option(help="phantom | medmnist")] = "phantom",
    data_root: Roots = None,
    datasets: Datasets = "",
    seeds: Annotated[str, typer.Option(help="0,1,...; default: the recipe's.")] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="At most N images a split.")] = None,
    out: Out = Path("leaderboards"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Does nothing: results are always kept.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Delete these suites' results and models first.")
    ] = False,
    allow_unverified: Unverified = "",
    trace: Annotated[
        Path | None, typer.Option(help="With suite step: write a profiler trace here.")
    ] = None,
) -> None:
    """Run suites. Results that exist are kept; the same command continues a stopped run.

    `--all` runs the suites that score models; those that measure this machine run by name.
    """
    from vitask.data import SOURCES, spec
    from vitask.files import check_destination

    if trace is not None:
        trace = check_destination(trace, "--trace")
    if all_suites == bool(suites):
        raise UnknownName("name the suites to run, or give --all (one of the two)")
    if resume and fresh:
        raise UnknownName("--resume keeps results and --fresh deletes them: give one of them")
    wanted = list(SUITES) if all_suites else list(dict.fromkeys(suites or []))
    for name in wanted:
        check_known("suite", name, (*SUITES, *MACHINE_SUITES))
    check_known("data source", data, SOURCES)
    from_file, by_hand = _recipe(recipe, settings)
    roots, numbers = data_folders(data_root), _seeds(seeds)
    for name in [name for name in wanted if name in MACHINE_SUITES]:
        _measure(name, out, trace)
        wanted.remove(name)
    if not wanted:
        return
    names, allowed = split_names(datasets), split_names(allow_unverified)
    must_resolve(lambda: [spec(name, roots=roots) for name in (*names, *allowed)])

    from bench.api import run as run_suites

    done = run_suites(
        "all" if all_suites else wanted, recipe=from_file, settings=by_hand, data=data,
        data_root=roots, datasets=names, seeds=numbers, limit=limit, allow_unverified=allowed,
        out=out, fresh=fresh, note=_note,
    )  # fmt: skip
    if done.tables:
        from bench.commands.show import main_table

        name = next(iter(done.tables))
        typer.echo(main_table(done.tables[name], name))
    for page in done.pages.values():
        typer.echo(str(page))
    if done.tables and not any(done.computed.values()):
        typer.echo("nothing to compute: all results were there")
    for name, error in done.failed.items():
        typer.echo(f"failed: {name}: {error}", err=True)
    if done.failed:
        raise typer.Exit(FAILED)


def _note(text: str) -> None:
    typer.echo(text, err=True)


def _recipe(name: str, settings: Sequence[str] | None) -> tuple[Any, dict[str, Any]]:
    """The recipe's name or file, and the settings by hand, both checked."""
    from vitask import settings as recipe_settings
    from vitask.recipes import RECIPES

    if not name.endswith(".toml"):
        check_known("recipe", name, RECIPES)
    try:
        by_hand = recipe_settings.parse(settings or ())
    except ValueError as error:
        raise UnknownName(str(error)) from error
    return Path(name) if name.endswith(".toml") else name, by_hand


def _measure(name: str, out: Path, trace: Path | None) -> None:
    """A suite that measures this machine; it needs no data, recipe or seed."""
    from bench.machine.tables import run_machine_suite
    from bench.runs.environment import command_line

    command = command_line((), out)
    try:
        written = run_machine_suite(name, out, command=command, note=_note, trace=trace)
    except KeyboardInterrupt:
        stop(f"{name}: interrupted; its tables hold what was measured so far", FAILED)
    _note(f"{name}: wrote {', '.join(map(str, written))}")


@app.command("list")
@clean
def show(
    suite: Annotated[str | None, typer.Argument(help="Show this suite's methods.")] = None,
    data_root: Roots = None,
) -> None:
    """Suites, recipes and datasets; or the methods of a suite."""
    from bench.commands.show import overview, suite_methods

    if suite is not None:
        check_known("suite", suite, (*SUITES, *MACHINE_SUITES))
    roots = data_folders(data_root)
    typer.echo(overview(roots) if suite is None else suite_methods(suite))


@app.command("recipe")
@clean
def print_recipe(name: Annotated[str, typer.Argument(help="A recipe; see `list`.")]) -> None:
    """Print a recipe as TOML, to start a file for `run --recipe FILE.toml` from."""
    from vitask.recipes import RECIPES
    from vitask.settings import to_toml

    check_known("recipe", name, RECIPES)
    typer.echo(to_toml(RECIPES[name]), nl=False)


@app.command()
@clean
def report(
    folders: Annotated[list[Path] | None, typer.Argument(help="Runs; default: all.")] = None,
    out: Out = Path("leaderboards"),
) -> None:
    """Render tables and pages again from the records and samples; needs no data."""
    from bench.api import check_out
    from bench.report.render import write
    from bench.runs.sets import locked

    broken: list[str] = []
    for folder in _runs(folders, out):
        check_out(folder, folder)
        with locked(folder):
            for records in _suites(folder, broken):
                for path in write(folder, records)[0]:
                    typer.echo(str(path))
    _fail_for(broken)


@app.command()
@clean
def collect(
    target: Annotated[Path, typer.Argument(help="Folder of all runs, such as leaderboards.")],
    folders: Annotated[list[Path], typer.Argument(help="Runs made elsewhere.")],
) -> None:
    """Copy runs into one folder, every file checked against its digest, and render them."""
    from bench.api import check_out
    from bench.report.render import write
    from bench.runs.sets import collect as copy
    from bench.runs.sets import locked, read_records, read_whole

    check_out(target)
    found = {folder: target / folder.resolve().name for folder in _runs(folders, target)}
    for folder, place in found.items():
        if place.resolve() == folder.resolve():
            raise InputError(f"{folder} is the target itself; name runs made elsewhere")
        read_whole(folder)
    for folder, place in found.items():
        with locked(place):
            for suite in copy(folder, place, _note):
                for path in write(place, read_records(place, suite))[0]:
                    typer.echo(str(path))


@app.command()
@clean
def verify(
    folders: Annotated[list[Path] | None, typer.Argument(help="Runs; default: all.")] = None,
    data_root: Roots = None,
    out: Out = Path("leaderboards"),
    allow_unverified: Unverified = "",
) -> None:
    """Score again from the per-sample files and the data's labels; exit 1 on any difference."""
    from bench.api import described
    from bench.commands.verify import differences
    from bench.runs.plan import job_of
    from bench.runs.sets import strays

    found: list[str] = []
    roots, allowed = data_folders(data_root), split_names(allow_unverified)
    for folder in _runs(folders, out):
        loaded: dict[Any, dict[str, Dataset]] = {}
        for records in _suites(folder, found):
            name = records[0].suite
            try:
                job = job_of(
                    records[0], loaded, roots=roots, allow_unverified=allowed, folder=folder
                )
                wrong = differences(folder, records, job.evaluated)
            except Exception as error:  # its data are missing, perhaps; the others still count
                found.append(f"{folder}: {name} was not verified: {described(error)}")
                continue
            found += [f"{folder}: {text}" for text in wrong]
            count = f"{len(records)} record(s) of {name}"
            typer.echo(f"{folder}: {count}: {f'{len(wrong)} difference(s)' if wrong else 'ok'}")
        found += [f"{folder}: {text}" for text in strays(folder)]
    _fail_for(found)


@app.command()
@clean
def compare(
    first: Annotated[str, typer.Argument(help="A method, or a run's folder.")],
    second: Annotated[str, typer.Argument(help="The method or run it is compared with.")],
    runs: Annotated[
        list[Path] | None, typer.Option("--run", help="Whose methods; default: all runs.")
    ] = None,
    method: Annotated[str, typer.Option(help="The method of two runs.")] = "vitask_with_ep",
    suite: Annotated[str, typer.Option(help="The methods' suite.")] = "main",
    metric: Annotated[str, typer.Option(help="a,b,...; default: the usual ones.")] = "",
    dataset: Annotated[str, typer.Option(help="a,b,...; default: all.")] = "",
    csv: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
    out: Out = Path("leaderboards"),
) -> None:
    """Two methods of a run, or one method in two runs: difference, interval, p-value.

    Images are paired by id. An argument that is a folder with a run.json is a run.
    """
    from bench.commands import compare as comparison
    from bench.commands.show import frame_text
    from bench.runs.sets import read_manifest
    from bench.suite import suite as suite_of
    from vitask.files import check_destination, write_text

    check_known("suite", suite, SUITES)
    if csv is not None:
        csv = check_destination(csv, "--csv")
    given = [(Path(one) / "run.json").is_file() for one in (first, second)]
    if any(given) and not all(given):
        other = second if given[0] else first
        raise InputError(f"{other} is not a run (no run.json); expected two runs or two methods")
    if all(given) and runs:
        raise InputError(f"--run names whose methods are compared; {first} and {second} are runs")
    frames = {}
    if all(given):
        folders = (Path(first), Path(second))
        frame, notes = comparison.compare_runs(folders, suite, method)
        frames[f"{method}: {first} against {second}"] = frame
        for text in notes:
            _note(text)
    else:
        found = [folder for folder in _runs(runs, out) if suite in read_manifest(folder)]
        if not found:
            raise InputError(f"no run of suite {suite!r} in {out}; run it first, or give --out")
        if csv is not None and len(found) > 1:
            raise InputError(f"--csv holds one comparison, not {len(found)}; name a run by --run")
        for folder in found:
            frame = comparison.compare_methods(folder, suite, first, second)
            frames[f"{folder}: {first} against {second}"] = frame
    for title, frame in frames.items():
        metrics = split_names(metric, frame["metric"].unique())
        shown = comparison.chosen(frame, suite_of(suite), metrics, split_names(dataset))
        frames[title] = shown
        typer.echo(f"{title}\n{frame_text(shown)}")
    if csv is not None:
        write_text(csv, shown.to_csv(index=False, lineterminator="\n"))


@app.command()
@clean
def doctor(data_root: Roots = None) -> None:
    """Check versions, memory, accelerator and data roots; exit 1 if something is wrong."""
    from bench.commands.doctor import examine

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
    dataset: Annotated[str | None, typer.Option(help="The dataset whose question to ask.")] = None,
    exemplar: Annotated[
        bool | None,
        typer.Option(help="With or without the task-specific model; default: with, if present."),
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
            checkpoint, folder, dataset=dataset, exemplar=exemplar, output=output,
            batch_size=batch_size,
        )  # fmt: skip
    except KeyboardInterrupt:
        stop("interrupted; the same command starts again with the first image", FAILED)
    if unreadable:
        stop(f"{unreadable} image(s) could not be read; see the column error", FAILED)


def _runs(folders: Sequence[Path] | None, out: Path) -> list[Path]:
    found = list(folders or sorted(path.parent for path in out.glob("*/run.json")))
    for folder in found:
        if not (folder / "run.json").is_file():
            raise InputError(f"{folder} holds no run (no run.json); expected OUT/<recipe>-<data>")
    if not found:
        raise InputError(f"no run in {out}; start one with `python -m bench run`, or give --out")
    return found


def _suites(folder: Path, broken: list[str]) -> "Iterator[list[Record]]":
    """Each suite's records; a suite that lacks some is noted, and the others still count."""
    from bench.runs.sets import read_manifest, read_records

    for name in read_manifest(folder):
        try:
            records = read_records(folder, name)
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
    from vitask.recipes import TOP_SEED

    given = split_names(text)
    if not all(word.isdecimal() for word in given) or (text and not given):
        raise UnknownName(f"--seeds is {text!r}; expected whole numbers such as 0,1,2")
    for word in given:  # before int(), which refuses thousands of digits
        if len(word.lstrip("0")) > len(str(TOP_SEED)) or int(word) > TOP_SEED:
            shown = word if len(word) <= 40 else f"{word[:40]}..."
            raise UnknownName(
                f"--seeds: {shown} is not a seed; expected whole numbers from 0 to {TOP_SEED}"
            )
    return tuple(sorted({int(word) for word in given}))


if __name__ == "__main__":
    app(prog_name="python -m bench")
