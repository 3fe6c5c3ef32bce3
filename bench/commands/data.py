"""python -m bench data download | check."""

from pathlib import Path
from typing import Annotated

import typer

from bench.commands.cli import (
    FAILED,
    Roots,
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
