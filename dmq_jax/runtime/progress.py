"""Progress of a loop: a bar on a terminal, a plain line now and then in a log file."""

import operator
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax

LINE_EVERY_S = 10.0  # pause between lines where there is no terminal


class Progress:
    """An iterable that reports how far it is; made by `progress`.

    Args:
      items: what is iterated over.
      description: start of the report.
      total: number of items including `start`; None if unknown.
      start: items done by an earlier process, left out of the rate.
    """

    def __init__(self, items: Iterable[Any], description: str, *, total: int | None, start: int):
        self._items = items
        self._description = description
        self._total = total
        self._start = start
        self._note = ''

    def note(self, text: str) -> None:
        """Shows `text`, such as the loss, at the end of the next report."""
        self._note = text

    def __iter__(self) -> Iterator[Any]:
        """Yields the items, reporting as it goes."""
        if jax.process_index() != 0:
            return iter(self._items)
        return self._with_bar() if sys.stdout.isatty() else self._with_lines()

    def _with_lines(self) -> Iterator[Any]:
        began = last = time.monotonic()
        done, shown = self._start, None
        for item in self._items:
            yield item
            done += 1
            now = time.monotonic()
            if now - last >= LINE_EVERY_S:
                print(self._line(done, now - began), flush=True)
                last, shown = now, done
        if shown != done:
            print(self._line(done, time.monotonic() - began), flush=True)

    def _line(self, done: int, duration_s: float) -> str:
        rate = (done - self._start) / max(duration_s, 1e-9)
        parts = [f'{self._description}: {done}']
        if self._total is not None:
            parts[0] += f'/{self._total}'
            parts[0] += f' ({100 * done // self._total}%)' if self._total else ''
        parts.append(f'{rate:.3g}/s' if rate >= 1 or rate == 0 else f'{1 / rate:.3g} s each')
        if self._total is not None and done >= self._total:
            parts.append(f'took {_clock(duration_s)}')
        elif self._total is not None and rate > 0:
            parts.append(f'{_clock((self._total - done) / rate)} left')
        return ', '.join(parts + [self._note] * bool(self._note))

    def _with_bar(self) -> Iterator[Any]:
        from rich import progress as rich_progress

        began = time.monotonic()
        columns = (
            '{task.description}',
            rich_progress.BarColumn(),
            rich_progress.MofNCompleteColumn(),
            '{task.fields[rate]}',
            rich_progress.TimeElapsedColumn(),
            rich_progress.TimeRemainingColumn(),
            '{task.fields[note]}',
        )
        with rich_progress.Progress(*columns) as bar:
            task = bar.add_task(
                self._description, total=self._total, completed=self._start, rate='', note=''
            )
            for count, item in enumerate(self._items, start=1):
                yield item
                rate = f'{count / max(time.monotonic() - began, 1e-9):.3g}/s'
                bar.update(task, advance=1, rate=rate, note=self._note)


def progress(
    iterable_or_total: Iterable[Any] | int,
    description: str,
    *,
    total: int | None = None,
    start: int = 0,
) -> Progress:
    """Iterates with a report of count, rate and time left, by process 0 only.

    Args:
      iterable_or_total: what to iterate over; a number n means `range(start, n)`.
      description: what is being done.
      total: number of items, including `start`, where the iterable does not know its length.
      start: items already done by an earlier process; they count as done but not in the rate.
    """
    if isinstance(iterable_or_total, int):
        items, total = range(start, iterable_or_total), iterable_or_total
    else:
        items = iterable_or_total
        if total is None and (length := operator.length_hint(items, -1)) >= 0:
            total = start + length
    return Progress(items, description, total=total, start=start)


def _clock(duration_s: float) -> str:
    minutes, seconds = divmod(round(duration_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{seconds:02}'
