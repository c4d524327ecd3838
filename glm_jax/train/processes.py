"""Several processes of one run: the first writes what all would write, and what it decides by its files all do."""

from collections.abc import Callable
from itertools import count
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint.multihost import get_barrier_sync_fn

Result = TypeVar("Result")

_meetings = count()
_LONGEST = 24 * 3600 * 1000  # milliseconds; a writer that dies is noticed by its missing heartbeat, long before


def writer() -> bool:
    """Whether this process is the one that writes logs, settings and results."""
    return jax.process_index() == 0


def agreed(answer: bool) -> bool:
    """The writer's answer, in every process: a collective that one of them leaves out would stop all others."""
    return answer if jax.process_count() == 1 else bool(multihost_utils.broadcast_one_to_all(np.int32(answer)))


def in_turn(do: Callable[[], Result]) -> Result:
    """Call `do` in the writer, then in the others, which find made what it made.

    They wait at a barrier of the coordinator, not in a collective: gloo gives one 30 seconds, and `do` may take hours. RuntimeError in
    the others where it raises in the writer.
    """
    if not writer():
        if not _told():
            raise RuntimeError("the first process failed in what all others wait for; what it printed tells why")
        return do()
    done = False
    try:
        result = do()
        done = True
    finally:
        _told(done)
    return result


def _told(done: bool = False) -> bool:
    """Wait for all processes; then, whether the writer has done it."""
    get_barrier_sync_fn()(key=f"the writer has done it {next(_meetings)}", timeout_ms=_LONGEST)
    return agreed(done)
