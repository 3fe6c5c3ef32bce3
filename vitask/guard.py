"""The hub package named `kernels` and ours cannot be told apart by transformers: say so first."""

from importlib.metadata import PackageNotFoundError, version


def refuse_hub_kernels() -> None:
    """SystemExit when the hub package `kernels` is installed beside ours.

    `import transformers` would take our package for it and raise in a place that names neither.
    Called by every entry point before transformers is imported.
    """
    try:
        found = version("kernels")
    except PackageNotFoundError:
        return
    raise SystemExit(
        f"error: the package 'kernels' {found} is installed beside this project's own `kernels`, "
        "and transformers cannot tell them apart; run `pip uninstall kernels`, or use an "
        "environment of its own for this project"
    )
