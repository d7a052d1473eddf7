"""Signals that end a command become an exception, so that what it was about to write is removed."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

NAMES = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class Ended(BaseException):
    """A signal asked the process to end. No `Exception`: nobody takes it for an error of a model or a library."""

    def __init__(self, number: int) -> None:
        self.code = 128 + number  # as shells state it
        super().__init__(NAMES[signal.Signals(number)])


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Raise `Ended` where the process is told to end meanwhile. A second signal ends it at once, as it would without this.

    Only the main thread may say what signals do; elsewhere nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = {number: signal.getsignal(number) for number in NAMES}

    def end(number: int, _: FrameType | None) -> None:
        for own in NAMES:
            signal.signal(own, signal.SIG_DFL)
        raise Ended(number)

    try:
        for number in NAMES:
            signal.signal(number, end)
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
