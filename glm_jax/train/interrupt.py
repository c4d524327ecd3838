"""Ctrl-C between two steps: the first one asks, and the second ends at once."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import jax


@contextlib.contextmanager
def asked() -> Iterator[Callable[[], bool]]:
    """Within, the first Ctrl-C is noted, and the function given says so: whoever asks it saves what there is and raises
    KeyboardInterrupt. Where several processes train, or something else listens, it is left alone: they would not end at one step.
    """
    on_main_thread = threading.current_thread() is threading.main_thread()
    if (
        jax.process_count() > 1
        or not on_main_thread
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield lambda: False
        return
    noted: list[int] = []

    def note(number: int, _frame: object) -> None:
        noted.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nending after this step, with a checkpoint; Ctrl-C again ends at once", file=sys.stderr, flush=True)

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(noted)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
