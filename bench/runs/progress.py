"""One progress display over all work, with the time left; plain lines without a terminal."""

import time
from collections.abc import Callable
from typing import Protocol

from rich import progress as rich_progress
from rich.console import Console

QUIET_SECONDS = 10.0  # between two lines without a terminal, but for finished models


class Advancing(Protocol):
    """What work reports to."""

    def advance(self, units: float, text: str, *, finished: bool = False) -> None: ...

    def skip(self, units: float, text: str) -> None: ...

    def note(self, text: str) -> None: ...


class Progress:
    """`units` of work, advanced as parts of it end."""

    def __init__(
        self,
        units: float,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console(stderr=True)
        self._units, self._done, self._clock = units, 0.0, clock
        self._start, self._said = clock(), float("-inf")
        self._bar = rich_progress.Progress(
            *rich_progress.Progress.get_default_columns(),
            console=self._console,
            disable=not self._console.is_terminal,
            speed_estimate_period=600,
        )
        self._task = self._bar.add_task("starting", total=units)

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, units: float, text: str, *, finished: bool = False) -> None:
        """So many units are done; `text` says which. finished: a model is, so a line is due."""
        self._done += units
        self._bar.update(self._task, advance=units, description=text)
        self._line(text, due=finished)

    def skip(self, units: float, text: str) -> None:
        """So many units were done before: less is left, and this says nothing about speed."""
        self._units -= units
        self._bar.update(self._task, total=self._units, description=text)
        self._line(text, due=False)

    def seconds_left(self) -> float | None:
        """At the speed so far; None before anything was done."""
        if not self._done:
            return None
        return (self._clock() - self._start) / self._done * max(self._units - self._done, 0)

    def _line(self, text: str, *, due: bool) -> None:
        """The bar's content, without a terminal."""
        now = self._clock()
        if self._console.is_terminal or not (due or now - self._said >= QUIET_SECONDS):
            return
        self._said = now
        share = min(self._done / self._units, 1) if self._units > 0 else 1
        seconds = self.seconds_left()
        left = "" if seconds is None else f", about {clock_time(seconds)} left"
        elapsed = clock_time(now - self._start)
        self._print(f"{share:4.0%}  {elapsed} elapsed{left}  {text}")

    def note(self, text: str) -> None:
        """A line above the bar."""
        self._bar.update(self._task, description=text)
        self._print(text)

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def clock_time(seconds: float) -> str:
    """minutes:seconds"""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
