"""What a user sees while something takes long: a bar on a terminal, a few lines in a log."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import rich.progress as bars
import torch
from rich.console import Console
from torch import Tensor

from gradmark.embed import Progress
from gradmark.protocols import BlackBox

_LINES = 5  # a stage's lines in a log
_PIECE = 64  # queries between two movements of the bar


class Bar:
    """A progress bar on ``console`` for the length of a block; plain lines where it is no terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        columns = (
            bars.TextColumn("{task.description:8}"), bars.BarColumn(24), bars.MofNCompleteColumn(),
            bars.TextColumn("{task.fields[news]}"), bars.TimeRemainingColumn(),
        )  # fmt: skip
        self._bar = bars.Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._tasks: dict[str, bars.TaskID] = {}
        self._stage = self._news = ""

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def train(self, progress: Progress) -> None:
        """One training step: the stage, task loss, accuracy, bits matched and the current p."""
        if progress.stage != self._stage:
            self._stage, self._news = progress.stage, ""
        news = f"loss {progress.task_loss:.3f}"
        if progress.accuracy:
            news += f"  accuracy {100 * progress.accuracy:5.1f}%"
        if progress.mark is not None:
            bits = round(progress.mark.match * progress.mark.n_bits)
            self._news = f"  bits {bits}/{progress.mark.n_bits}  log10 p {progress.mark.log10_p:.1f}"
        self.move(progress.stage, progress.step, progress.steps, news + self._news)

    def move(self, name: str, done: int, total: int, news: str = "") -> None:
        """Show that ``done`` of ``total`` steps of stage ``name`` are done."""
        if not self.console.is_terminal:
            if done * _LINES // total > (done - 1) * _LINES // total:
                self.console.print(
                    f"{name:8} {done}/{total}  {news}".rstrip(), highlight=False, soft_wrap=True
                )
            return
        if name not in self._tasks:
            self._tasks[name] = self._bar.add_task(name, news="", total=total)
        self._bar.update(self._tasks[name], completed=done, total=total, news=news)


class Watched:
    """A suspect asked in small pieces, so that its queries can be counted while they are sent.

    Only scores can be asked for: a watched suspect is a black box whatever it holds.
    """

    def __init__(self, suspect: BlackBox, bar: Bar, total: int) -> None:
        self.name, self.digest = suspect.name, suspect.digest
        self.price, self.entry = getattr(suspect, "price", 1), getattr(suspect, "entry", 0)
        self._suspect, self._bar, self._total = suspect, bar, total
        self._done = 0

    def query(self, x: Tensor) -> Tensor:
        answers = []
        # as much as the suspect can have under way at once
        batch = getattr(self._suspect, "batch_size", _PIECE) * getattr(self._suspect, "concurrency", 1)
        for part in x.split(max(_PIECE, batch)):
            answers.append(self._suspect.query(part))
            self._done += len(part)
            reused: Any = getattr(self._suspect, "reused", 0)
            news = f"{reused} from the journal" if reused else ""
            self._bar.move("queries", self._done, max(self._total, self._done), news)
        return torch.cat(answers)
