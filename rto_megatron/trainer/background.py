"""A thread for what waits on others while the ranks compute."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue


class Background:
    """Makes calls one behind the other in a thread of its own.

    The thread does not keep the process alive: a rank that ends, for whatever reason, does not wait for an answer. An
    executor of the standard library would.

    Example:
        answer = Background("pool").submit(lambda: ask(engine, request))
    """

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit[T](self, call: Callable[[], T]) -> Future[T]:
        """Makes the call once those before it are over; its future carries what it raises."""
        future: Future[T] = Future()

        def make() -> None:
            try:
                future.set_result(call())
            except BaseException as raised:  # whoever waits for the future raises it
                future.set_exception(raised)

        self._calls.put(make)
        return future

    def close(self) -> None:
        """Ends the thread behind the calls that were submitted; does not wait for it."""
        self._calls.put(None)

    def _run(self) -> None:
        while (make := self._calls.get()) is not None:
            make()
