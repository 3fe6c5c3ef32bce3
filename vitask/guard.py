"""transformers confuses the hub package `kernels` with ours: say so before it is imported."""

from importlib.metadata import PackageNotFoundError, version


def refuse_hub_kernels() -> None:
    """SystemExit if the hub package `kernels` is installed beside ours.

    `import transformers` would take our package for the hub's and raise an error that names
    neither. Every entry point calls this before it imports transformers.
    """
    try:
        found = version("kernels")
    except PackageNotFoundError:
        return
    raise SystemExit(
        f"error: the package 'kernels' {found} is installed beside this project's `kernels`, and "
        "transformers cannot tell them apart; run `pip uninstall kernels`, or use a separate "
        "environment for this project"
    )
