"""How far a build is: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

LINE_SECONDS = 10.0


@contextmanager
def show_progress(total: int, report: Callable[[str], None]) -> Iterator[Callable[[int], None]]:
    """Gives a function to be told how many images are done."""
    if sys.stderr.isatty():
        with tqdm(total=total, unit="image", unit_scale=True, smoothing=0.1) as bar:
            yield lambda num_done: bar.update(num_done - bar.n)
        return
    begin = last = time.monotonic()

    def tell(num_done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= LINE_SECONDS:
            last = now
            rate = num_done / (now - begin)
            left = f", {(total - num_done) / rate / 60:.0f} min left" if rate else ""
            report(f"{num_done} of {total} images, {rate:.0f} a second{left}")

    yield tell
