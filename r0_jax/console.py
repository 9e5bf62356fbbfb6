"""Shows progress: a bar on a terminal, or a line every few seconds in a log."""

import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

console = Console(stderr=True)  # quiet in all processes except the first

_SECONDS = 10.0  # between lines without a terminal


class TrainingProgress:
    """A context manager that shows steps, rewards, images per second and the remaining time."""

    def __init__(self, steps: int, start_step: int, console: Console):
        self._console, self._steps = console, steps
        self._next_line = time.monotonic()
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(24),
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("compiling", total=steps, completed=start_step)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of `step`."""
        shown = [
            f"{name.removeprefix('reward/')} {value:.3f}"
            for name, value in metrics.items()
            if name.startswith("reward/")
        ]
        shown.append(f"{metrics['perf/images_per_sec']:.1f} images/s")
        shown.append(f"{_clock(metrics['perf/seconds_left'])} left")
        text = "  ".join(shown)
        self._bar.update(self._task, completed=step, description=text)
        if not self._console.is_terminal and (
            time.monotonic() >= self._next_line or step == self._steps
        ):
            self._next_line = time.monotonic() + _SECONDS
            self._console.print(
                f"step {step}/{self._steps}  {text}", highlight=False, soft_wrap=True
            )

    def __enter__(self) -> "TrainingProgress":
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()


class EncodingProgress:
    """A context manager that shows prompts, prompts per second and the remaining time."""

    def __init__(self, prompts: int, console: Console):
        self._console, self._prompts, self._done = console, prompts, 0
        self._since: tuple[float, int] | None = None  # time and prompts done, after compilation
        self._next_line = time.monotonic() + _SECONDS
        self._bar = Progress(
            TextColumn("prompts"),
            MofNCompleteColumn(),
            BarColumn(24),
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("compiling", total=prompts)

    @property
    def rate(self) -> float | None:
        """Prompts per second without the compilation; None before the second batch."""
        if self._since is None or self._done == self._since[1]:
            return None
        return (self._done - self._since[1]) / (time.monotonic() - self._since[0])

    def advance(self, count: int) -> None:
        """Add `count` encoded prompts."""
        self._done += count
        self._since = self._since or (time.monotonic(), self._done)
        if (rate := self.rate) is None:
            return
        text = f"{rate:.1f} prompts/s  {_clock((self._prompts - self._done) / rate)} left"
        self._bar.update(self._task, completed=self._done, description=text)
        if not self._console.is_terminal and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _SECONDS
            self._console.print(
                f"{self._done}/{self._prompts} prompts  {text}", highlight=False, soft_wrap=True
            )

    def __enter__(self) -> "EncodingProgress":
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()
        if (rate := self.rate) is not None and exc[0] is None:
            self._console.print(f"{self._done} prompts, {rate:.1f} prompts/s", highlight=False)


def _clock(seconds: float) -> str:
    """Format seconds as 1:02:03."""
    left = int(seconds)
    return f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
