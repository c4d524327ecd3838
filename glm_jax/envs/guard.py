"""A time limit around other people's code: an environment that raises or hangs costs a task, not the run.

On the main thread an interval timer interrupts the call. Python delivers it between two bytecodes, so a single call
into C that never returns is not interrupted, nor is it on Windows, which has no such timer. On other threads, which
receive no signals, the call runs on a thread of its own that is left behind when its time is up: it goes on using its
core until it ends by itself or the process does.
"""

import signal
import threading
import time
from collections.abc import Callable
from typing import Any


class EnvironmentFailure(RuntimeError):
    """An environment raised, or did not return in time. `reason` is what a rollout counts."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class _Expired(BaseException):
    """Not an Exception, so that an `except Exception` in the guarded code does not swallow it."""


def call(function: Callable[..., Any], *arguments: Any, seconds: float = 5.0) -> Any:
    """The function's value; `EnvironmentFailure` where it raises ("raised ...") or takes too long ("timed out")."""
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer"):
        return _on_main_thread(function, arguments, seconds)
    return _on_another(function, arguments, seconds)


def _on_main_thread(function: Callable[..., Any], arguments: tuple, seconds: float) -> Any:
    expired = False

    def expire(*_: Any) -> None:
        nonlocal expired
        expired = True
        raise _Expired

    begun = time.monotonic()
    handler = signal.signal(signal.SIGALRM, expire)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, seconds)  # again and again: a bare except eats one
    try:
        value = function(*arguments)
    except _Expired:
        pass
    except Exception as error:
        if not expired:
            raise _raised(error) from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:  # somebody else's timer: what is left of it, at once where it should have rung meanwhile
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - begun), 1e-6), interval)
    if expired:
        raise EnvironmentFailure(f"timed out after {seconds:g} s")
    return value


def _on_another(function: Callable[..., Any], arguments: tuple, seconds: float) -> Any:
    outcome: list[tuple[bool, Any]] = []

    def work() -> None:
        try:
            outcome.append((True, function(*arguments)))
        except Exception as error:
            outcome.append((False, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise EnvironmentFailure(f"timed out after {seconds:g} s")
    well, value = outcome[0]
    if not well:
        raise _raised(value) from value
    return value


def _raised(error: Exception) -> EnvironmentFailure:
    return EnvironmentFailure(f"raised {type(error).__name__}: {error}")
