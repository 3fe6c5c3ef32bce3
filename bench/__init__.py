"""The benchmark harness.

import bench

run = bench.run(["main"], recipe="pocket", datasets=["breastmnist"], seeds=[0, 1])
run.tables["main"]  # a DataFrame
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.api import Run, run

__all__ = ["Run", "run"]


def __getattr__(name: str) -> Any:
    """Imported when asked for: the command line answers without torch."""
    if name in __all__:
        from bench import api

        return getattr(api, name)
    raise AttributeError(f"module 'bench' has no attribute {name!r}")
