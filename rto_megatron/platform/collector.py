"""Python's garbage collector rests while a process imports.

What imports make stays, and looking at it again and again takes a seventh of a rank's imports.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def resting() -> Iterator[None]:
    """No collection while inside; those that follow leave out all that there is by then."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
