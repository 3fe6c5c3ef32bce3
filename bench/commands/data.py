"""python -m bench data download | check | ids."""

import csv
import io
from pathlib import Path
from typing import Annotated

import typer

from bench.commands.cli import (
    FAILED,
    Roots,
    UnknownName,
    Unverified,
    check_known,
    clean,
    data_folders,
    must_resolve,
    split_names,
)

data_app = typer.Typer(help="Download and check data.", no_args_is_help=True)


@data_app.command()
@clean
def download(
    root: Annotated[Path, typer.Argument(help="Folder for the files.")],
    datasets: Annotated[str, typer.Option(help="a,b,...; default: all 12.")] = "",
    size: Annotated[int, typer.Option(help="28, 64, 128 or 224 pixels.")] = 28,
) -> None:
    """Download official MedMNIST files and check their MD5."""
    from vitask.data import medmnist
    from vitask.files import check_destination

    names = split_names(datasets) or medmnist.NAMES
    for name in names:
        check_known("MedMNIST set", name, medmnist.NAMES)
    check_destination(root / "file", "ROOT")
    root.mkdir(parents=True, exist_ok=True)
    for name in names:
        typer.echo(str(medmnist.download(name, size, root)))


@data_app.command()
@clean
def check(
    data: Annotated[str, typer.Option(help="phantom | medmnist")] = "medmnist",
    data_root: Roots = None,
    datasets: Annotated[str, typer.Option(help="a,b,...; default: all in the data roots.")] = "",
    size: Annotated[int, typer.Option(help="Pixels of the source images.")] = 28,
    allow_unverified: Unverified = "",
) -> None:
    """Check files; report duplicates across splits and conflicting labels; exit 1 on bad files.

    Cards whose names cannot be used count as bad files.
    """
    from vitask.data import SOURCES, load, spec
    from vitask.data.card import faults
    from vitask.data.check import duplicates
    from vitask.data.loading import present

    check_known("data source", data, SOURCES)
    roots = data_folders(data_root)
    wrong = [] if datasets or data != "medmnist" else faults(roots)
    for text in wrong:
        typer.echo(text, err=True)
    names = split_names(datasets) or present(data, roots, size)
    must_resolve(
        lambda: [spec(name, roots=roots) for name in (*names, *split_names(allow_unverified))]
    )
    bad = len(wrong)
    for name in names:
        try:
            found = load(
                name,
                source=data,
                roots=roots,
                size=size,
                allow_unverified=split_names(allow_unverified),
            )
        except ValueError as error:
            bad += 1
            typer.echo(f"{name}: {error}", err=True)
            continue
        sizes = " / ".join(str(len(split)) for split in found.splits.values())
        note = "" if found.md5_ok else ", NOT the official file"
        mark = "PHANTOM " if found.source == "phantom" else ""
        typer.echo(f"{mark}{name}: {sizes} images, MD5 {found.md5}{note}")
        for line in duplicates(found).lines():
            typer.echo(f"  {line}")
    if bad:
        raise typer.Exit(FAILED)


@data_app.command()
@clean
def ids(
    name: Annotated[str, typer.Argument(help="An external set, or a dataset with a card.")],
    data_root: Roots = None,
    size: Annotated[int, typer.Option(help="Pixels of the source images.")] = 28,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", help="CSV file; default: standard output.")
    ] = None,
) -> None:
    """Which id in records stands for which file, patient or lesion. Keep it with the images."""
    from vitask.data import card, external
    from vitask.errors import boundary
    from vitask.files import check_destination, shown_name, write_text

    roots = data_folders(data_root)
    place = None if csv_file is None else check_destination(csv_file, "--csv")
    if name in external.names("files", roots):
        given = external.image_ids(name, roots)
        header, found = ("file", "id"), {shown_name(Path(file)): i for file, i in given.items()}
    elif card.begun(name, roots):
        header, found = ("group", "digest"), card.groups(name, roots, size=size)
        if not found:
            raise UnknownName(
                f"{name} has no groups, and its ids are places in the archive such as "
                f"{name}/test/000012: no id stands for a name"
            )
    else:
        looked = ", ".join(map(str, roots)) or "no data root: give --data-root"
        known = ", ".join(external.READERS)
        raise UnknownName(
            f"no dataset {name!r} in {looked}; expected a folder of {known}, or a dataset with a "
            "card. Ids of MedMNIST's sets are places in the archive"
        )
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *found.items()])
    told = text.getvalue().encode(errors="backslashreplace").decode()
    if place is None:
        typer.echo(told, nl=False)
        return
    with boundary(f"--csv {csv_file}", "name another file"):
        write_text(place, told)
