"""How far it is, on stderr: a bar on a terminal, a line for each trial elsewhere."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hpcft.bench.campaign import Meter
from hpcft.units import human_duration


class Bar(Meter):
    """Leave its `with` block before anything else is printed."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, transient=True)
        self._console = console
        self._task: TaskID | None = None

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def begin(self, seconds: float) -> None:
        self._task = self._progress.add_task("", total=seconds)

    def see(self, label: str, done: float) -> None:
        if self._task is not None:
            self._progress.update(self._task, description=label, completed=done)

    def say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False)


class Lines(Meter):
    def __init__(self, console: Console) -> None:
        self._console = console
        self._label = ""
        self._seconds = 0.0

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *error: object) -> None:
        return

    def begin(self, seconds: float) -> None:
        self._seconds = seconds

    def see(self, label: str, done: float) -> None:
        if label != self._label:
            self._label = label
            self.say(f"{label}, about {human_duration(self._seconds - done)} to go")

    def say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def meter(console: Console) -> Bar | Lines:
    return Bar(console) if console.is_terminal else Lines(console)
