"""Several processes that compute one metric together.

All call the same function with the same features; each looks at its share of blocks of rows, and
what they found is exchanged where it is needed.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

T = TypeVar('T')


class Workers(NamedTuple):
    """The processes, as one of them sees them.

    Attributes:
      index: of this one, 0..count-1.
      count: of all.
      gather: arrays of one shape and dtype in all workers, as a tuple -> such a tuple of every
        worker, in order; a call that all make.
    """

    index: int
    count: int
    gather: Callable[[tuple[Any, ...]], list[tuple[Any, ...]]]

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Those of `items` that this worker looks at; every item is one of exactly one worker."""
        return items[self.index :: self.count]


ALONE = Workers(0, 1, lambda arrays: [arrays])
