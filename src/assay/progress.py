"""Progress bars on stderr for work that takes seconds; none where stderr is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Protocol, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

DELAY = 1.0
"""Seconds before a bar appears: short work shows none."""


class Bar(Protocol):
    """A bar that is moved by hand."""

    def update(self, n: float = 1) -> bool | None: ...


def progress(
    items: Iterable[Item], what: str, *, total: int | None = None, initial: int = 0
) -> Iterator[Item]:
    """Yield the items, with a bar labelled `what` that disappears at the end.

    `total` is the number of items where `items` has no length; `initial` of the total were done
    earlier. Bars nest: an inner one stands below the outer one."""
    if total is None and isinstance(items, Sized):
        total = len(items) + initial
    if _is_quiet():
        yield from items
        return
    yield from tqdm(
        items,
        desc=what,
        total=total,
        initial=initial,
        leave=False,
        delay=DELAY,
        dynamic_ncols=True,
    )


@contextmanager
def counted(total: int | None, what: str) -> Iterator[Bar]:
    """Open a bar that the caller moves with `update(n)`, for loops that are no plain iteration."""
    with tqdm(
        desc=what, total=total, disable=_is_quiet(), leave=False, delay=DELAY, dynamic_ncols=True
    ) as bar:
        yield bar


def _is_quiet() -> bool:
    """Return whether stderr is no terminal, or absent."""
    return sys.stderr is None or not getattr(sys.stderr, "isatty", lambda: False)()
