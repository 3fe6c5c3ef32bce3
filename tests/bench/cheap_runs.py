"""Runs of the suite `cheap`, and what they leave."""

from bench.api import Run, run_plan
from bench.commands.verify import differences
from bench.runs import sets
from bench.runs.plan import Plan
from bench.runs.records import Record


def complete(plan: Plan, *, fresh: bool = False) -> Run:
    """Does the same as `python -m bench run cheap`."""
    done = run_plan(plan, ["cheap"], command="python -m bench run cheap", fresh=fresh)
    assert done.failed == {}
    return done


def records_of(plan: Plan) -> list[Record]:
    return sets.read_records(plan.folder, "cheap")


def problems(plan: Plan) -> list[str]:
    return differences(plan.folder, records_of(plan), plan.datasets())
