"""One progress display over all work, with the time left; plain lines without a terminal."""

import time
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as Bar,
)


class Advancing(Protocol):
    """What work tells of itself."""

    def advance(self, units: float, text: str) -> None: ...

    def skip(self, units: float, text: str) -> None: ...

    def note(self, text: str) -> None: ...


@dataclass(frozen=True)
class Scaled:
    """A display whose units are worth `factor` of another's."""

    whole: Advancing
    factor: float

    def advance(self, units: float, text: str) -> None:
        self.whole.advance(units * self.factor, text)

    def skip(self, units: float, text: str) -> None:
        self.whole.skip(units * self.factor, text)

    def note(self, text: str) -> None:
        self.whole.note(text)


class Progress:
    """`units` of work; parts of it are advanced as they end."""

    def __init__(self, units: float, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._units, self._done, self._start = units, 0.0, time.monotonic()
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            speed_estimate_period=600,
        )
        self._task = self._bar.add_task("starting", total=units)

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def advance(self, units: float, text: str) -> None:
        """So many units are done; `text` says what was."""
        self._done += units
        self._bar.update(self._task, advance=units, description=text)
        self._line(text)

    def skip(self, units: float, text: str) -> None:
        """So many units are there already: less is to do, and nothing is known of its speed."""
        self._units -= units
        self._bar.update(self._task, total=self._units, description=text)
        self._line(text)

    def _line(self, text: str) -> None:
        """What the bar says, where there is no terminal."""
        if not self._console.is_terminal:
            passed = time.monotonic() - self._start
            share = min(self._done / self._units, 1) if self._units > 0 else 1
            left = ""  # nothing is known before something was done
            if self._done:
                seconds = passed / self._done * max(self._units - self._done, 0)
                left = f", about {_clock(seconds)} left"
            self._console.print(
                f"{share:4.0%}  {_clock(passed)} passed{left}  {text}", highlight=False
            )

    def note(self, text: str) -> None:
        """A line above the bar."""
        self._bar.update(self._task, description=text)
        self._console.print(text, highlight=False)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
